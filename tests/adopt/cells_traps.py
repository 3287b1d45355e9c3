"""What tempts to a wrong cut: state, chance, names of one branch, gradients read too early."""

from cell import RUNS, Cell
from setups import IMAGES, MLP

CELLS = [
    Cell(
        "a temperature that cools from step to step",
        """
temperature = 2.0
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        temperature = max(0.5, temperature * 0.9)
        loss = criterion(model(x) / temperature, y)
        loss.backward()
        optimizer.step()
    print(f"{temperature:.4f} {loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "a centre that follows the features",
        """
centre = torch.zeros(16)
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        features = F.relu(model.fc1(x))
        loss = criterion(model.fc2(features), y) + 0.01 * (features - centre).pow(2).mean()
        loss.backward()
        optimizer.step()
        centre = 0.9 * centre + 0.1 * features.detach().mean(0)
    print(f"{loss.item():.4f} {centre.sum().item():.4f}")
""",
        MLP,
        RUNS,
    ),
    Cell(
        "a flip that chance decides for the whole batch",
        """
optimizer = optim.SGD(net.parameters(), lr=0.05)
for epoch in range(2):
    flipped = 0
    for imgs, lbls in trainloader:
        if random.random() < 0.5:
            imgs = imgs.flip(-1)
            flipped += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(net(imgs), lbls)
        loss.backward()
        optimizer.step()
    print(flipped, f"{loss.item():.4f}")
""",
        IMAGES,
        RUNS,
        whole="chance is asked once a piece",
    ),
    Cell(
        "a worst batch kept with its inputs",
        """
worst = (-1.0, None)
for epoch in range(2):
    for batch in train_loader:
        x, y = batch
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        if loss.item() > worst[0]:
            worst = (loss.item(), batch)
print(f"{worst[0]:.4f}", worst[1][0].shape, worst[1][1].tolist())
""",
        MLP,
    ),
    Cell(
        "names that one branch alone gives",
        """
for epoch in range(2):
    for i, (x, y) in enumerate(train_loader):
        if i % 2 == 1:
            strength = 0.5 + i / 10
            other = x.flip(1)
            optimizer.zero_grad()
            loss = strength * criterion(model(other), y)
        else:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    print(f"{strength:.2f} {loss.item():.4f}")
""",
        MLP,
        RUNS,
    ),
    Cell(
        "a list that the forward pass takes from",
        """
signs = [1, -1] * 10
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x * signs.pop()), y)
        loss.backward()
        optimizer.step()
    print(len(signs), f"{loss.item():.4f}")
""",
        MLP,
        RUNS,
    ),
    Cell(
        "gradients read before the new ones are there",
        """
norms = []
for epoch in range(2):
    for x, y in train_loader:
        loss = criterion(model(x), y)
        grad = model.fc1.weight.grad
        norms.append(0.0 if grad is None else grad.norm().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(" ".join(f"{norm:.4f}" for norm in norms))
""",
        MLP,
        RUNS,
    ),
    Cell(
        "a name left by a batch that was passed over",
        """
for x, *rest in train_loader:
    y = rest[0]
    if len(x) < 12:
        continue
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
print(f"{loss.item():.4f}")
""",
        MLP,
    ),
]
