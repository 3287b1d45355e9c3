"""Run the quickstart without a browser: a line a cell, the runs' tables, and a page to look at.

    python notebooks/demo.py           what `make demo` does
    python notebooks/demo.py --keep    also keep its outputs, and the README's picture

Knows nothing of the package: it executes the notebook as a person's Jupyter would.
"""

from __future__ import annotations

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
NOTEBOOK = HERE / "01_quickstart.ipynb"
PICTURE = HERE / "01_quickstart.png"
PAGE = HERE.parent / "build" / "01_quickstart.html"
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
    if arguments not in ([], ["--keep"]):
        print(f"demo.py was given {arguments}; wanted nothing or --keep", file=sys.stderr)
        return 2
    # Networks this small gain nothing from a second thread, and on a busy machine they wait for it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    began = time.perf_counter()
    error = execute(notebook)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(
        HTMLExporter(template_name="lab").from_notebook_node(notebook)[0], encoding="utf-8"
    )
    for table in filter(is_table, outputs(notebook, "text/plain")):
        print(f"\n{table}")
    print(f"\n{time.perf_counter() - began:.0f} s in all; the page with its figures: {PAGE}")
    if error is not None:
        print(f"\na cell failed:\n{error}", file=sys.stderr)
        return 1
    if arguments:
        keep(notebook)
    return 0


def is_table(text: str) -> bool:
    return text.startswith("outcome ")


def keep(notebook: Any) -> None:
    """Write the outputs into the notebook, and its last figure beside it."""
    nbformat.write(notebook, NOTEBOOK)
    PICTURE.write_bytes(base64.b64decode(outputs(notebook, "image/png")[-1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
