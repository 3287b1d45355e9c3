"""A training cell under `%%hybrid_train` against the same cell as it is written.

    OMP_NUM_THREADS=1 python -m benchmarks.own_loop [--blocks 7] [--steps 2000]

Both train in FP32 on the loader's own batches, in one IPython shell, by turns; the same weights and
the same numbers must come out. Without a panel, with records. Writes results/own_loop.json and .md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from IPython.core.interactiveshell import InteractiveShell

from hybrid_magic.engine.control import RunControl
from hybrid_magic.notebook import live

from . import loops, measure

HERE = pathlib.Path(__file__).resolve().parent
BASE, BATCHES = loops.BASE, loops.BATCHES
CELL = """
for epoch in range(epochs):
    running, correct = 0.0, 0
    for x, y in loader:
        optimizer.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        loss.backward()
        optimizer.step()
        running += loss.item()
        correct += (out.argmax(1) == y).sum().item()
    history.append((running / len(loader), correct))
"""
LINES = {
    "as it is written": None,
    "uncut": f"--precision fp32 --batch fixed --micro {BASE}",
    "in four micro-batches": f"--precision fp32 --batch fixed --micro {BASE // 4}",
}


class Unseen:
    """A view that shows nothing."""

    def __init__(self, *, plain: bool) -> None:
        del plain
        self.control = RunControl()

    def __call__(self, _: Any) -> None:
        pass

    def close(self, _: Any) -> None:
        pass


def cell(shell: Any, work: loops.Work, line: str | None, epochs: int) -> Callable[[], Any]:
    """Return what runs the cell once, on a fresh model and loader."""
    model, loader, optimizer = work.fresh()
    shell.user_ns.update(model=model, loader=loader, optimizer=optimizer, epochs=epochs, history=[])
    torch.manual_seed(loops.SEED)
    if line is None:
        return lambda: shell.run_cell(CELL)
    return lambda: shell.run_cell_magic("hybrid_train", line, CELL)


def outcome(shell: Any) -> tuple[list[torch.Tensor], list[Any]]:
    return [p.detach() for p in shell.user_ns["model"].parameters()], shell.user_ns["history"]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2000, help="in a block")
    parser.add_argument("--work", type=int, help="only the first N works")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "own_loop.json")
    arguments = parser.parse_args(given)
    command = f"python -m benchmarks.own_loop --blocks {arguments.blocks} --steps {arguments.steps}"
    facts = measure.environment(command, str(loops.SEED))
    live.open_view = Unseen  # type: ignore[assignment]
    shell = InteractiveShell.instance()
    shell.run_cell("%load_ext hybrid_magic\nimport torch.nn.functional as F")
    rows = []
    for work in [each for each in loops.WORKS if each.accumulate == 1][: arguments.work]:
        steps = min(arguments.steps, work.steps)
        epochs = work.epochs(steps)
        found: dict[str, tuple[list[torch.Tensor], list[Any]]] = {}

        def prepared(line: str | None, work: Any = work, epochs: int = epochs) -> Callable[[], Any]:
            return lambda: cell(shell, work, line, epochs)

        for name, line in LINES.items():
            cell(shell, work, line, 1)()
            found[name] = outcome(shell)
        timings = measure.paired_blocks(
            {name: prepared(line) for name, line in LINES.items()}, arguments.blocks
        )
        plain = timings["as it is written"]
        for name in list(LINES)[1:]:
            ratio = measure.ratio(timings[name], plain)
            pairs = zip(found[name][0], found["as it is written"][0], strict=True)
            apart = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
            rows.append(
                {
                    "work": work.name,
                    "cell": name,
                    "cpu_ratio": [ratio.value, ratio.low, ratio.high],
                    "n": ratio.n,
                    "cpu_us_per_step": 1e6
                    * statistics.median(timing.cpu_s for timing in timings[name])
                    / (epochs * BATCHES),
                    "plain_cpu_us_per_step": 1e6
                    * statistics.median(timing.cpu_s for timing in plain)
                    / (epochs * BATCHES),
                    "weights_differ_by": apart,
                    "same_numbers": found[name][1] == found["as it is written"][1],
                }
            )
            print(rows[-1])
    facts["load"] = measure.system_load()
    saved = json.dumps({"environment": facts, "rows": rows}, default=measure.plain, indent=1)
    arguments.json.write_text(saved + "\n", encoding="utf-8")
    arguments.json.with_suffix(".md").write_text(page(facts, rows), encoding="utf-8")


def page(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# A training cell under the one line, against the same cell as it is written",
        "",
        f"`{facts['command']}`",
        "",
        "CPU time, median of paired ratios with its 95 % bootstrap interval.",
        "",
        "| work | cell | n | ratio | us a step, ours / plain | weights differ by | same numbers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        value, low, high = row["cpu_ratio"]
        lines.append(
            f"| {row['work']} | {row['cell']} | {row['n']} | {value:.2f} [{low:.2f}, {high:.2f}] | "
            f"{row['cpu_us_per_step']:.0f} / {row['plain_cpu_us_per_step']:.0f} | "
            f"{row['weights_differ_by']:.1e} | {'yes' if row['same_numbers'] else 'to rounding'} |"
        )
    lines += ["", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
