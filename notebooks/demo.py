"""Run a lesson without a browser: a line a cell, the tables, and a page to look at.

    python notebooks/demo.py                        the quickstart: what `make demo` does
    python notebooks/demo.py 02_ablation            another one
    python notebooks/demo.py [NAME] --keep          also keep its outputs (of the quickstart, the
                                                    README's picture too)

Knows nothing of the package: it executes the notebook as a person's Jupyter would.
"""

from __future__ import annotations

import argparse
import base64
import os
import pathlib
import sys
import time
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

HERE = pathlib.Path(__file__).resolve().parent
QUICKSTART = "01_quickstart"
PAGES = HERE.parent / "build"
CELL_TIMEOUT_S = 600


class Progress:
    """Prints a line a code cell: its number, its first line and how long it took."""

    def __init__(self, cells: list[Any]) -> None:
        self.numbers = {}
        for at, cell in enumerate(cells):
            if cell.cell_type == "code":
                self.numbers[at] = len(self.numbers) + 1
        self.began = time.perf_counter()

    def start(self, cell: Any, cell_index: int) -> None:
        if cell_index in self.numbers:
            what = next(filter(None, cell.source.splitlines()))[:68]
            print(
                f"[{self.numbers[cell_index]:2}/{len(self.numbers)}] {what:68}", end="", flush=True
            )
            self.began = time.perf_counter()

    def end(self, cell_index: int, **_: Any) -> None:
        if cell_index in self.numbers:
            print(f" {time.perf_counter() - self.began:6.1f} s", flush=True)


def execute(notebook: Any) -> CellExecutionError | None:
    """Run every cell, the outputs put into `notebook`; return the error that stopped it, if any."""
    progress = Progress(notebook.cells)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # not the kernel's advice on its transport
        coalesce_streams=True,  # of a progress line, keep what stayed on the screen
        record_timing=False,  # times of day would be noise in the notebook's diff
        resources={"metadata": {"path": str(HERE)}},
        on_cell_start=progress.start,
        on_cell_executed=progress.end,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return error
    return None


def outputs(notebook: Any, kind: str) -> list[str]:
    """Return every output of the MIME type `kind`, in order."""
    found = [
        output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    ]
    return [data[kind] for data in found if kind in data]


def main(arguments: list[str]) -> int:
    asked = read_line(arguments)
    # Networks this small gain nothing from a second thread, and on a busy machine they wait for it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(HERE / f"{asked.name}.ipynb", as_version=4)
    began = time.perf_counter()
    error = execute(notebook)
    page = PAGES / f"{asked.name}.html"
    page.parent.mkdir(exist_ok=True)
    page.write_text(
        HTMLExporter(template_name="lab").from_notebook_node(notebook)[0], encoding="utf-8"
    )
    for table in filter(is_table, outputs(notebook, "text/plain")):
        print(f"\n{table}")
    print(f"\n{time.perf_counter() - began:.0f} s in all; the page with its figures: {page}")
    if error is not None:
        print(f"\na cell failed:\n{error}", file=sys.stderr)
        return 1
    if asked.keep:
        keep(notebook, asked.name)
    return 0


def read_line(arguments: list[str]) -> argparse.Namespace:
    """Return the name of a notebook that is here, and whether to keep its outputs."""
    names = sorted(path.stem for path in HERE.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description="Run a lesson without a browser.")
    parser.add_argument(
        "name", nargs="?", default=QUICKSTART, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--keep", action="store_true", help="write the outputs into the notebook")
    asked = parser.parse_args(arguments)
    if asked.name not in names:
        parser.error(f"there is no notebook {asked.name}; wanted one of {', '.join(names)}")
    return asked


def is_table(text: str) -> bool:
    return text.startswith(("outcome ", "Ablation: ")) or " a step" in text.partition("\n")[0]


def keep(notebook: Any, name: str) -> None:
    """Write the outputs into the notebook, without what only its kernel could show; of the
    quickstart, the last figure beside it."""
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, HERE / f"{name}.ipynb")
    if name == QUICKSTART:
        picture = base64.b64decode(outputs(notebook, "image/png")[-1])
        (HERE / f"{name}.png").write_bytes(picture)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
