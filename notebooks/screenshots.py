"""Make the README's pictures: the panel in the middle of a run, in JupyterLab, light and dark.

    python -m notebooks.screenshots [--width 1000] [--folder notebooks]

Trains the quickstart's network on its digits in a real front end (headless Chromium), does what a
person does, and keeps the cell as a PNG when several decisions have been taken.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from tests.browser.front_end import QUIET, Notebook, served

HERE = pathlib.Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHARP = 2  # pixels of the picture for one of the page
DECISIONS = 3  # before the one by hand
SLOWEST_MS = 300_000

READY = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(2)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train_loader = DataLoader(TensorDataset(x[:1408], y[:1408]), batch_size=16, shuffle=True)
test_loader = DataLoader(TensorDataset(x[1408:], y[1408:]), batch_size=389)
model = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.4), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
%load_ext hybrid_magic
"""
TRAIN = """
%%hybrid_train
for epoch in range(3000):
    model.train()
    for x, y in train_loader:
        optimizer.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        loss.backward()
        optimizer.step()
    if epoch % 100 == 0:
        model.eval()
        accuracy = sum((model(x).argmax(1) == y).sum().item() for x, y in test_loader) / 389
        print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy {accuracy:.3f}")
"""


def picture(dark: bool, width: int) -> bytes:
    """Return the training cell as PNG bytes: `width` is the page's, in CSS pixels."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"no browser is installed; wanted one of {', '.join(BROWSERS)}")
    programs = pathlib.Path(sys.executable).parent
    with (
        tempfile.TemporaryDirectory() as folder,
        served("lab", pathlib.Path(folder), programs, sys.executable, dark) as server,
        sync_playwright() as player,
    ):
        browser = player.chromium.launch(executable_path=found, args=list(QUIET))
        view: Any = {"width": width, "height": 1400}
        page = browser.new_page(viewport=view, device_scale_factor=SHARP)
        notebook = Notebook(page, server, server.write([READY, TRAIN]))
        notebook.open()
        notebook.run_all()
        notebook.wait_for_training()
        play(notebook)
        drawn = notebook.cell(1).screenshot()
        browser.close()
    return drawn


def play(notebook: Notebook) -> None:
    """Wait for some decisions, take one by hand, wait for another, and take the hand away."""
    marks = notebook.cell(1).locator("svg[aria-label^=Batch] line")
    marks.nth(DECISIONS - 1).wait_for(state="attached", timeout=SLOWEST_MS)
    notebook.type_value("Learning rate", "0.5")
    marks.nth(marks.count() + 1).wait_for(state="attached", timeout=SLOWEST_MS)
    notebook.page.mouse.move(0, 0)
    notebook.page.evaluate("document.activeElement.blur()")
    notebook.page.add_style_tag(content=".jp-cell-toolbar, .jp-Collapser { visibility: hidden; }")
    notebook.wait_for_step_after(notebook.step())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=1000, help="of the page, in CSS pixels")
    parser.add_argument("--folder", type=pathlib.Path, default=HERE)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a network this small gains nothing from two
    for name, dark in (("light", False), ("dark", True)):
        path = arguments.folder / f"panel_{name}.png"
        path.write_bytes(picture(dark, arguments.width))
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
