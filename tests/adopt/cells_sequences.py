"""Sequences: language models, taggers, padding, lengths."""

from cell import Cell
from setups import IMPORTS, TOKENS

CELLS = [
    Cell(
        "text classifier with lengths and three unpacked names",
        """
class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8, padding_idx=pad)
        self.lstm = nn.LSTM(8, 10, batch_first=True)
        self.out = nn.Linear(10, 2)
    def forward(self, text, lens):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(text), lens.cpu(), batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.lstm(packed)
        return self.out(hidden[-1])

tagger = Tagger()
opt = optim.Adam(tagger.parameters(), lr=0.01)
for epoch in range(2):
    epoch_loss = epoch_acc = 0
    for text, text_lengths, label in loader:
        opt.zero_grad()
        predictions = tagger(text, text_lengths)
        loss = F.cross_entropy(predictions, label)
        acc = (predictions.argmax(1) == label).float().mean()
        loss.backward()
        opt.step()
        epoch_loss += loss.item() * len(text)
        epoch_acc += acc.item() * len(text)
    print(f'\\tTrain Loss: {epoch_loss / 54:.3f} | Train Acc: {epoch_acc / 54 * 100:.2f}%')
""",
        TOKENS,
    ),
    Cell(
        "language model with a fresh hidden state a batch",
        """
class CharLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.rnn = nn.Embedding(vocab_size, 8), nn.GRU(8, 12, batch_first=True)
        self.out = nn.Linear(12, vocab_size)
    def init_hidden(self, batch_size):
        return torch.zeros(1, batch_size, 12)
    def forward(self, x, h):
        out, h = self.rnn(self.emb(x), h)
        return self.out(out), h

lm = CharLM()
opt = optim.Adam(lm.parameters(), lr=0.01)
for epoch in range(2):
    total_loss = 0.
    for seq, lens, _ in loader:
        h = lm.init_hidden(seq.size(0))
        logits, h = lm(seq[:, :-1], h)
        loss = F.cross_entropy(logits.reshape(-1, vocab_size), seq[:, 1:].reshape(-1))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 5)
        opt.step()
        total_loss += loss.item()
    ppl = math.exp(total_loss / len(loader))
    print(f"epoch {epoch} | ppl {ppl:8.2f}")
""",
        TOKENS,
    ),
    Cell(
        "sequence labels with ignored places",
        """
tagger = nn.Sequential(nn.Embedding(vocab_size, 8), nn.Linear(8, 3))
opt = optim.SGD(tagger.parameters(), lr=0.5)
for epoch in range(2):
    right = counted = 0
    for seq, lens, _ in loader:
        tags = torch.where(seq == pad, -100, seq % 3)
        opt.zero_grad()
        scores = tagger(seq)
        loss = F.cross_entropy(scores.view(-1, 3), tags.view(-1), ignore_index=-100)
        loss.backward()
        opt.step()
        active = tags != -100
        right += (scores.argmax(-1)[active] == tags[active]).sum().item()
        counted += active.sum().item()
    print(right, counted, f"{loss.item():.4f}")
""",
        TOKENS,
    ),
    Cell(
        "padding ignored by a criterion of the notebook",
        """
ce = nn.CrossEntropyLoss(ignore_index=pad)
lm = nn.Sequential(nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size))
opt = optim.Adam(lm.parameters(), lr=0.02)
for epoch in range(2):
    for seq, lens, _ in loader:
        opt.zero_grad()
        output = lm(seq[:, :-1])
        output_dim = output.shape[-1]
        output = output.contiguous().view(-1, output_dim)
        trg = seq[:, 1:].contiguous().view(-1)
        loss = ce(output, trg)
        loss.backward()
        opt.step()
    print(f"{loss.item():.4f}", output.shape[0] == trg.shape[0])
""",
        TOKENS,
    ),
    Cell(
        "transformer, sequence first",
        """
class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(vocab_size, 8)
        self.enc = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.head = nn.Linear(8, 2)
    def forward(self, src, mask):
        return self.head(self.enc(self.emb(src), src_key_padding_mask=mask)[0])

net = Small()
opt = optim.AdamW(net.parameters(), lr=3e-3)
for epoch in range(2):
    for seq, lens, y in loader:
        src = seq.t()
        mask = (src == pad).t()
        logits = net(src, mask)
        loss = F.cross_entropy(logits, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"{loss.item():.4f}")
""",
        TOKENS,
    ),
    Cell(
        "a collate function that pads",
        """
def collate(batch):
    xs, ys = zip(*batch)
    lens = torch.tensor([len(x) for x in xs])
    return nn.utils.rnn.pad_sequence(xs, batch_first=True), lens, torch.stack(ys)

ragged = [(torch.randn(random.randint(2, 5), 3), torch.tensor(i % 2)) for i in range(54)]
loader = DataLoader(ragged, batch_size=12, shuffle=True, collate_fn=collate)
rnn, head = nn.GRU(3, 6, batch_first=True), nn.Linear(6, 2)
both = nn.ModuleDict({"rnn": rnn, "head": head})
opt = optim.Adam(both.parameters(), lr=0.01)
for epoch in range(2):
    for seqs, lens, y in loader:
        packed = nn.utils.rnn.pack_padded_sequence(
            seqs, lens, batch_first=True, enforce_sorted=False)
        _, h = rnn(packed)
        loss = F.cross_entropy(head(h[-1]), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"{loss.item():.4f} {lens.sum().item()}")
""",
        IMPORTS,
    ),
]
