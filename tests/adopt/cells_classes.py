"""Several trainings in a cell; loops in methods, in helpers, round a model's own step."""

from cell import RUNS, Cell
from setups import HF, IMAGES, MLP, VECTORS

CELLS = [
    Cell(
        "one function called twice with two models",
        """
def learn(net, lr, epochs=2):
    opt = optim.Adam(net.parameters(), lr=lr)
    curve = []
    for _ in range(epochs):
        for x, y in train_loader:
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            curve.append(loss.item())
    return curve

small, large = MLP(4), MLP(24)
curves = {"small": learn(small, 1e-2), "large": learn(large, 5e-3)}
print({name: f"{c[-1]:.3f}" for name, c in curves.items()})
""",
        MLP,
    ),
    Cell(
        "several trainings over learning rates",
        """
results = {}
for lr in (0.01, 0.1):
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))
    opt = optim.SGD(net.parameters(), lr=lr)
    for epoch in range(2):
        total = 0.0
        for x, y in train_loader:
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            total += loss.item()
    results[lr] = total / len(train_loader)
    print(f"lr={lr}: {results[lr]:.4f}")
print(min(results, key=results.get))
""",
        VECTORS,
    ),
    Cell(
        "two loops one after the other: frozen body, then everything",
        """
for p in model.fc1.parameters():
    p.requires_grad = False
opt = optim.SGD(filter(lambda p: p.requires_grad, model.parameters()), lr=0.1)
for x, y in train_loader:
    opt.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    opt.step()
print("head", loss.item())

for p in model.parameters():
    p.requires_grad = True
opt = optim.SGD(model.parameters(), lr=0.01)
for x, y in train_loader:
    opt.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    opt.step()
print("all", loss.item())
""",
        MLP,
    ),
    Cell(
        "a Trainer class",
        """
class Trainer:
    def __init__(self, model, loader, lr):
        self.model, self.loader = model, loader
        self.optimizer = optim.SGD(model.parameters(), lr=lr)
        self.losses = []

    def fit(self, epochs):
        for epoch in range(epochs):
            self.model.train()
            for x, y in self.loader:
                self.optimizer.zero_grad()
                loss = F.cross_entropy(self.model(x), y)
                loss.backward()
                self.optimizer.step()
                self.losses.append(loss.item())
            print(epoch, f"{self.losses[-1]:.4f}")

trainer = Trainer(model, train_loader, 0.05)
trainer.fit(2)
""",
        MLP,
        RUNS,
        piecewise=True,
    ),
    Cell(
        "a module with training_step and a loop outside",
        """
class Lit(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)
    def configure_optimizers(self):
        return optim.Adam(self.parameters(), lr=1e-2)

lit = Lit()
opt = lit.configure_optimizers()
for epoch in range(2):
    outputs = []
    for batch in trainloader:
        loss = lit.training_step(batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        outputs.append(loss.detach())
    print(f"Epoch [{epoch}], train_loss: {torch.stack(outputs).mean().item():.4f}")
""",
        IMAGES,
    ),
    Cell(
        "a method of an earlier cell's class",
        """
learner = Learner(model, train_loader)
for epoch in range(2):
    learner.one_epoch()
print(learner.count)
""",
        HF.replace("train_dataloader", "train_loader")
        + """
class Learner:
    def __init__(self, model, data):
        self.model, self.data, self.count = model, data, 0
        self.opt = optim.SGD(model.parameters(), lr=0.1)
    def one_epoch(self):
        for batch in self.data:
            self.opt.zero_grad()
            self.model(**batch).loss.backward()
            self.opt.step()
            self.count += len(batch["labels"])
""",
        RUNS,
        piecewise=True,
    ),
    Cell(
        "helper functions defined in the loop body",
        """
for epoch in range(2):
    def accuracy(scores, y):
        return (scores.argmax(1) == y).float().mean().item()
    for x, y in train_loader:
        def loss_of(inputs):
            return criterion(model(inputs), y)
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
    print(f"{accuracy(model(X), Y):.3f} {loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "a loss written as a function with an auxiliary result",
        """
def get_loss(net, batch):
    images, labels = batch
    scores = net(images)
    return F.cross_entropy(scores, labels), scores

optimizer = optim.SGD(net.parameters(), lr=0.1)
for epoch in range(2):
    n = hits = 0
    for batch in trainloader:
        optimizer.zero_grad()
        loss, scores = get_loss(net, batch)
        loss.backward()
        optimizer.step()
        hits += (scores.argmax(-1) == batch[1]).sum().item()
        n += len(batch[1])
    print(f"{hits}/{n} {loss:.4f}")
""",
        IMAGES,
    ),
]
