"""`%%hybrid_train --processes 2` in a real kernel: results, errors and interrupts of its cells."""

import re
import time

import pytest
from kernel_client import FrontEnd, printed
from launched import SETUP, gone

CELL = """%%hybrid_train model loader --processes 2 --precision fp32 --batch fixed {options}
x, y = batch
rank = os.environ["RANK"]
{body}
loss = F.cross_entropy(model(x), y)
"""


@pytest.fixture
def front_end(temporary, tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TMPDIR", str(temporary))
    made = FrontEnd(tmp_path)
    made.run("%load_ext hybrid_magic\nimport hybrid_magic as hm" + SETUP)
    yield made
    made.close()


def error_of(messages):
    (content,) = [each["content"] for each in messages if each["msg_type"] == "error"]
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in content["traceback"]]
    return content["ename"], "\n".join(plain)


@pytest.mark.thorough
def test_a_cell_trains_in_two_processes(front_end, temporary):
    body = "print('hello from', rank) if model.training else None"
    seen = front_end.run(CELL.format(options="-o mine", body=body))
    assert set(printed(seen).splitlines()) == {"hello from 0"}
    shown = [each for each in seen if each["msg_type"] in ("display_data", "update_display_data")]
    assert any("finished" in each["content"]["data"].get("text/plain", "") for each in shown)
    counted = "int(model.norm.num_batches_tracked), len(optimizer.state)"
    look = f"mine is hm.last_run, mine.steps, {counted}"
    assert front_end.text(f"print({look})") == "True 8 8 6\n"

    name, shown = error_of(front_end.run(CELL.format(options="", body="raise Odd(int(rank))")))
    assert name == "Odd"
    assert re.search(r"^-+> 4 +raise Odd\(int\(rank\)\)$", shown, re.MULTILINE)
    assert "hybrid_magic" not in shown
    assert gone(temporary)

    body = "time.sleep(0.01)\nprint('deep') if model.norm.num_batches_tracked > 10 else None"
    cell = front_end.send(CELL.format(options="--epochs 5000 -o mine", body=body))
    while "deep" not in printed([front_end.client.get_iopub_msg(timeout=60)]):
        pass
    began = time.monotonic()
    front_end.manager.interrupt_kernel()
    name, shown = error_of(front_end.until_idle(cell))
    assert time.monotonic() - began < 5
    assert name == "KeyboardInterrupt"
    assert "the run ended at a whole step" in shown
    look = "mine.outcome, mine.steps + 8 == int(model.norm.num_batches_tracked)"
    assert front_end.text(f"print({look})") == "interrupted True\n"
