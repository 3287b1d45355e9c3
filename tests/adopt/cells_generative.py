"""Images and vectors without a class: autoencoders, segmentation, mixing, contrasts."""

from cell import RUNS, Cell
from setups import IMAGES, MLP, VECTORS

CELLS = [
    Cell(
        "variational autoencoder, summed losses",
        """
class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.mu, self.logvar = nn.Linear(64, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.dec = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 64), nn.Sigmoid())
    def forward(self, x):
        h = F.relu(self.enc(x))
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return self.dec(z), mu, logvar

def loss_function(recon_x, x, mu, logvar):
    bce = F.binary_cross_entropy(recon_x, x, reduction='sum')
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kld

vae = VAE()
optimizer = optim.Adam(vae.parameters(), lr=1e-3)
for epoch in range(2):
    train_loss = 0
    for batch_idx, (data, _) in enumerate(trainloader):
        data = torch.sigmoid(data.view(-1, 64))
        optimizer.zero_grad()
        recon_batch, mu, logvar = vae(data)
        loss = loss_function(recon_batch, data, mu, logvar)
        loss.backward()
        train_loss += loss.item()
        optimizer.step()
        if batch_idx % 2 == 0:
            print(epoch, batch_idx, loss.item() / len(data))
    print('====> Average loss: {:.4f}'.format(train_loss / len(trainloader.dataset)))
""",
        IMAGES,
        whole="noise drawn in the model",
    ),
    Cell(
        "autoencoder that discards the labels",
        """
ae = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
opt = optim.Adam(ae.parameters(), lr=1e-2, weight_decay=1e-5)
outputs = []
for epoch in range(2):
    for img, _ in trainloader:
        recon = ae(img)
        loss = nn.MSELoss()(recon, img.flatten(1))
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f'Epoch:{epoch+1}, Loss:{loss.item():.4f}')
    outputs.append((epoch, img, recon))
print(outputs[-1][2].shape)
""",
        IMAGES,
    ),
    Cell(
        "denoising with noise drawn in the loop",
        """
ae = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
opt = optim.Adam(ae.parameters(), lr=1e-2)
for epoch in range(2):
    for img, _ in trainloader:
        noisy = img + 0.3 * torch.randn(*img.shape)
        noisy = noisy.clamp(-2, 2)
        loss = F.mse_loss(ae(noisy), img.flatten(1))
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"{loss.item():.4f}")
""",
        IMAGES,
        whole="noise drawn in the slice",
    ),
    Cell(
        "segmentation with dice and pixel accuracy",
        """
unet = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
opt = optim.Adam(unet.parameters(), lr=1e-2)
for epoch in range(2):
    pixels = hits = 0
    for img, _ in trainloader:
        mask = (img[:, 0] > 0.3).long()
        opt.zero_grad()
        out = unet(img)
        loss = F.cross_entropy(out, mask)
        loss.backward()
        opt.step()
        preds = out.argmax(1)
        hits += (preds == mask).sum().item()
        pixels += torch.numel(preds)
    print(f"{hits}/{pixels} {hits / pixels * 100:.2f} {loss.item():.4f}")
""",
        IMAGES,
    ),
    Cell(
        "mixup",
        """
alpha = 0.4
for epoch in range(2):
    for x, y in train_loader:
        lam = np.random.beta(alpha, alpha)
        index = torch.randperm(x.size(0))
        mixed = lam * x + (1 - lam) * x[index]
        optimizer.zero_grad()
        out = model(mixed)
        loss = lam * criterion(out, y) + (1 - lam) * criterion(out, y[index])
        loss.backward()
        optimizer.step()
    print(f"{lam:.3f} {loss.item():.4f}")
""",
        MLP,
        RUNS,
        whole="samples of one batch are mixed",
    ),
    Cell(
        "contrastive with two views",
        """
encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
opt = optim.Adam(encoder.parameters(), lr=1e-3)
for epoch in range(2):
    for x, _ in train_loader:
        view1 = x + 0.1 * torch.randn_like(x)
        view2 = x + 0.1 * torch.randn_like(x)
        z1, z2 = F.normalize(encoder(view1), dim=1), F.normalize(encoder(view2), dim=1)
        logits = z1 @ z2.T / 0.5
        labels = torch.arange(len(x))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(loss.item())
""",
        VECTORS,
        RUNS,
        whole="the other samples of the batch are the negatives",
    ),
    Cell(
        "dropout and batch norm in the model",
        """
bn = nn.Sequential(
    nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
optimizer = optim.AdamW(bn.parameters(), lr=1e-2, weight_decay=1e-2)
for ep in range(2):
    bn.train()
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(bn(x), y, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
    bn.eval()
    print(ep, loss.item(), (bn(X).argmax(1) == Y).float().mean().item())
""",
        VECTORS,
        whole="dropout and batch statistics",
    ),
]
