"""A Jupyter server with its own folders, and a notebook of it open in headless Chromium.

HYBRID_MAGIC_FRONT_END may name the `bin` folder of another environment, so that old front ends and
kernels are driven from a new Playwright. Screenshots go to HYBRID_MAGIC_SCREENSHOTS, if given.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("HYBRID_MAGIC_FRONT_END", pathlib.Path(sys.executable).parent))
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
START_S, ACT_MS = 90, 60_000
NO_NEWS = '{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}'


class Notebook:
    """A notebook open in a page: runs its cells, moves its controls, reads what stands there."""

    def __init__(self, page, kind: str, address: str) -> None:
        self.page, self.kind, self._address = page, kind, address

    def open(self) -> None:
        path = "/doc/tree/t.ipynb?reset" if self.kind == "lab" else "/notebooks/t.ipynb"
        self.page.goto(self._address + path)
        if self.kind == "classic":
            self.page.wait_for_function(
                "window.Jupyter && Jupyter.notebook && Jupyter.notebook.kernel"
                " && Jupyter.notebook.kernel.is_connected() && !Jupyter.notebook.kernel_busy",
                timeout=ACT_MS,
            )
        else:
            self.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=ACT_MS)
        self.page.wait_for_timeout(3000)  # sooner, the classic notebook drops the view

    def run_all(self) -> None:
        if self.kind == "classic":
            self.page.evaluate("Jupyter.notebook.execute_all_cells()")
        else:
            self.page.get_by_role("menuitem", name="Run", exact=True).click()
            self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    @property
    def status(self):
        """The line of the panel that says what the run is doing."""
        return self.page.locator("[data-hybrid-magic=status]").first

    def step(self) -> int:
        return int(re.search(r"step ([\d,]+)", self.status.inner_text())[1].replace(",", ""))

    def button(self, name: str):
        return self.page.locator("button.jupyter-button, button.widget-button").filter(
            has_text=name
        )

    def drag(self, label: str, share: float) -> None:
        """Drag the handle of a slider to `share` of its track."""
        row = self._row(label)
        handle = row.locator(".noUi-handle, .ui-slider-handle").first.bounding_box()
        track = row.locator(".noUi-target, .ui-slider").first.bounding_box()
        height = handle["y"] + handle["height"] / 2
        mouse = self.page.mouse
        mouse.move(handle["x"] + handle["width"] / 2, height)
        mouse.down()
        mouse.move(track["x"] + share * track["width"], height, steps=8)
        mouse.up()

    def type_value(self, label: str, value: str) -> None:
        self._row(label).locator(".widget-readout").first.click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(value)
        self.page.keyboard.press("Enter")

    def _row(self, label: str):
        return (
            self.page.locator(".widget-inline-hbox, .widget-hslider").filter(has_text=label).first
        )

    def printed(self, start: str) -> str:
        """Wait for a printed line that starts with `start`, and return what follows it."""
        outputs = self.page.locator(".jp-OutputArea-output pre, .output_stdout pre")
        found = outputs.filter(has_text=start).last
        found.wait_for(timeout=ACT_MS)
        return found.inner_text().split(start, 1)[1]

    def screenshot(self, name: str) -> None:
        folder = os.environ.get("HYBRID_MAGIC_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=str(pathlib.Path(folder) / f"{name}.png"))


def front_end_here() -> list[str]:
    """Return the kinds of front end that the environment has: lab, notebook7 or classic."""
    kinds = ["lab"] if (BIN / "jupyter-lab").exists() else []
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        version = subprocess.check_output([BIN / "jupyter-notebook", "--version"], text=True)
        kinds.append("classic" if int(version.split(".")[0]) < 7 else "notebook7")
    return kinds


@pytest.fixture
def open_notebook(chromium, tmp_path):
    """Return a function: open_notebook(kind, cells) -> Notebook."""
    from playwright.sync_api import sync_playwright

    with contextlib.ExitStack() as stack:

        def open_it(kind: str, cells: list[str]) -> Notebook:
            if kind not in front_end_here():
                pytest.skip(f"{kind} is not installed in {BIN}")
            address = stack.enter_context(served(kind, tmp_path, cells))
            player = stack.enter_context(sync_playwright())
            browser = player.chromium.launch(executable_path=chromium, args=list(QUIET))
            stack.callback(browser.close)
            page = browser.new_page(viewport={"width": 1200, "height": 1000})
            notebook = Notebook(page, kind, address)
            notebook.open()
            return notebook

        yield open_it


@contextlib.contextmanager
def served(kind: str, folder: pathlib.Path, cells: list[str]):
    """Serve `cells` as t.ipynb from `folder`; yields the server's address."""
    (folder / "t.ipynb").write_text(json.dumps(notebook_of(cells)))
    settings = folder / "config/lab/user-settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(NO_NEWS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [BIN / ("jupyter-lab" if kind == "lab" else "jupyter-notebook"), "--no-browser"]
    command += ["--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    if kind == "classic":
        command += ["--NotebookApp.token=", "--NotebookApp.password="]
        command += [f"--notebook-dir={folder}"]
    else:
        command += ["--IdentityProvider.token=", "--ServerApp.password="]
        command += ["--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={folder}"]
    own = {"HOME": "", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data"}
    own |= {"JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    env = {**os.environ, **{name: str(folder / place) for name, place in own.items()}}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address + "/api", server, folder / "server.log")
        yield address
    finally:
        server.terminate()
        server.wait(20)


def wait_for(address: str, server: subprocess.Popen, log: pathlib.Path) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


def notebook_of(cells: list[str]) -> dict:
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": spec},
        "cells": [
            {
                "cell_type": "code",
                "id": f"cell-{at}",
                "metadata": {},
                "execution_count": None,
                "outputs": [],
                "source": source,
            }
            for at, source in enumerate(cells)
        ],
    }
