"""`%%hybrid_ablate` in a real front end: its table fills as it runs, Stop keeps what is done."""

import json

import pytest

pytestmark = pytest.mark.browser

READY = """
import json, torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
data = TensorDataset(torch.randn(640, 16), torch.randint(0, 4, (640,)))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loader = DataLoader(data, batch_size=16, shuffle=True)
before = [p.detach().clone() for p in model.parameters()]
%load_ext hybrid_magic
"""
LOOP = """
%%hybrid_ablate --variants fp32,ga --seeds 40 -o found
for epoch in range(20):
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
print("what a run prints")
"""
SAY = """
untouched = all(map(torch.equal, before, model.parameters()))
print("RESULT", json.dumps([found.outcome, len(found.trials), untouched]))
"""


def test_the_table_fills_while_a_loop_is_compared_and_stop_keeps_what_is_done(
    open_notebook, has_torch
):
    notebook = open_notebook([READY, LOOP, SAY])
    if not has_torch or notebook.kind != "lab":
        pytest.skip("one front end, with torch, is enough: the panel is tried in all three")
    notebook.run_all()
    cell = notebook.cell(1)
    cell.get_by_text("Run 3 of 80").wait_for(timeout=60_000)
    cell.locator("th[scope=row]", has_text="ga").wait_for(timeout=20_000)
    notebook.screenshot("ablation-running")
    cell.get_by_role("button", name="Stop").click()
    outcome, done, untouched = json.loads(notebook.printed(2, "RESULT"))
    assert outcome == "stopped"
    assert 2 <= done < 80
    assert untouched
    cell.get_by_text("stopped before its end").wait_for(timeout=20_000)
    cell.locator("img[src^='data:image/png']").wait_for(timeout=20_000)
    cell.get_by_role("button", name="Stop").wait_for(state="detached", timeout=5000)
    printed = cell.locator(".jp-OutputArea-output", has_text="what a run prints")
    assert printed.count() == 0
