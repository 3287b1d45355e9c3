"""The cells that come before: imports, a few dozen samples, a model small enough for a test.

54 samples in batches of 12: the last batch is half one, so its pieces are uneven too.
"""

IMPORTS = """
import copy, itertools, math, random, time
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""

VECTORS = (
    IMPORTS
    + """
X = torch.randn(54, 8)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
train_set, test_set = TensorDataset(X, Y), TensorDataset(X[:18] + 0.1, Y[:18])
train_loader = DataLoader(train_set, batch_size=12, shuffle=True)
test_loader = DataLoader(test_set, batch_size=9)
"""
)

MLP = (
    VECTORS
    + """
class MLP(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, hidden), nn.Linear(hidden, 3)
    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))

model = MLP().to(device)
criterion = nn.CrossEntropyLoss()
optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
"""
)

IMAGES = (
    IMPORTS
    + """
images = torch.randn(54, 1, 8, 8)
labels = (images.mean((1, 2, 3)) > 0).long()
trainset = TensorDataset(images, labels)
trainloader = DataLoader(trainset, batch_size=12, shuffle=True)
testloader = DataLoader(TensorDataset(images[:18], labels[:18]), batch_size=9)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc = nn.Linear(4 * 3 * 3, 2)
    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        return self.fc(torch.flatten(x, 1))

net = Net()
"""
)

NUMBERS = (
    IMPORTS
    + """
x_train = torch.randn(54, 5)
y_train = x_train @ torch.tensor([[1.0], [-2.0], [0.5], [0.0], [3.0]]) + 0.1 * torch.randn(54, 1)
x_val, y_val = x_train[:12] + 0.05, y_train[:12]
train_dl = DataLoader(TensorDataset(x_train, y_train), batch_size=12, shuffle=True)
val_dl = DataLoader(TensorDataset(x_val, y_val), batch_size=12)
reg = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
"""
)

TOKENS = (
    IMPORTS
    + """
vocab_size, pad = 12, 0
tokens = torch.randint(1, vocab_size, (54, 7))
lengths = torch.randint(3, 8, (54,))
tokens[torch.arange(7)[None] >= lengths[:, None]] = pad
classes = (tokens.sum(1) > 25).long()
loader = DataLoader(TensorDataset(tokens, lengths, classes), batch_size=12, shuffle=True)
"""
)

HF = (
    TOKENS
    + """
from dataclasses import dataclass

@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor

class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, 2)
    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask.unsqueeze(-1).float()
        logits = self.head((self.embed(input_ids) * mask).sum(1) / mask.sum(1))
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)

class Reviews(Dataset):
    def __len__(self):
        return len(tokens)
    def __getitem__(self, i):
        mask = (tokens[i] != pad).long()
        return {"input_ids": tokens[i], "attention_mask": mask, "labels": classes[i]}

train_dataloader = DataLoader(Reviews(), batch_size=12, shuffle=True)
eval_dataloader = DataLoader(Reviews(), batch_size=18)
model = Classifier()
optimizer = optim.AdamW(model.parameters(), lr=5e-3)
"""
)
