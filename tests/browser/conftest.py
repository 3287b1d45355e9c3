"""One front end, one Chromium and one server for all browser tests; a notebook for each.

    HYBRID_MAGIC_STACK       lab (left out: this one), notebook7 or classic
    HYBRID_MAGIC_FRONT_END   `bin` folder of the environment that has it; left out: this one's
    HYBRID_MAGIC_KERNEL      Python that the kernel runs in; left out: this one
    HYBRID_MAGIC_SCREENSHOTS folder that pictures are kept in; left out: none are

`nox -s browser` makes the environments of all three stacks and runs the tests on each.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest
from front_end import KINDS, QUIET, Notebook, served

BIN = pathlib.Path(os.environ.get("HYBRID_MAGIC_FRONT_END", pathlib.Path(sys.executable).parent))
PYTHON = os.environ.get("HYBRID_MAGIC_KERNEL", sys.executable)
KIND = os.environ.get("HYBRID_MAGIC_STACK", "lab")


def front_ends_here() -> list[str]:
    """Return the kinds of front end that the environment has."""
    kinds = ["lab"] if (BIN / "jupyter-lab").exists() else []
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        version = subprocess.check_output([BIN / "jupyter-notebook", "--version"], text=True)
        kinds.append("classic" if int(version.split(".")[0]) < 7 else "notebook7")
    return kinds


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    assert KIND in KINDS, f"HYBRID_MAGIC_STACK is {KIND}; wanted one of {', '.join(KINDS)}"
    if KIND not in front_ends_here():
        pytest.skip(f"{KIND} is not installed in {BIN}")
    with served(KIND, tmp_path_factory.mktemp("jupyter"), BIN, PYTHON) as made:
        yield made


@pytest.fixture(scope="session")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        made = player.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield made
        made.close()


@pytest.fixture
def open_notebook(server, browser, request):
    """Return a function: open_notebook(cells) -> Notebook. The kernel ends with the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    opened = []

    def open_it(cells: list[str]) -> Notebook:
        opened.append(Notebook(context.new_page(), server, server.write(cells)))
        opened[-1].open()
        return opened[-1]

    yield open_it
    for notebook in opened:
        notebook.screenshot(f"end-of-{request.node.name}"[:60])
    context.close()
    server.end_kernels()


@pytest.fixture(scope="session")
def has_torch() -> bool:
    """Whether the kernel can train for real; else a made-up training takes its place."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    return subprocess.run([PYTHON, "-c", code], check=False).returncode == 0
