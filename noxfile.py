"""Sessions: tests, lint, types, notebooks, browser, bench, compat (older Jupyter stacks)."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
STACKS = {
    "colab": ["ipython==7.34.0", "ipykernel==6.17.1", "ipywidgets==7.7.1"],
    "kaggle": ["ipython==7.34.0", "ipykernel==6.17.1", "ipywidgets==8.1.5"],
}


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    session.install("-e", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    session.install("-e", ".[dev]")
    session.run("pyright")


@nox.session
def notebooks(session: nox.Session) -> None:
    session.install("-e", ".[dev]")
    session.run("python", "-m", "pytest", "-m", "", "tests/test_notebooks.py", *session.posargs)


def python_3_13() -> str:
    """Return a Python 3.13 that runs (pyenv's shims on PATH may not); "3.13" where none does."""
    root = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    found = [shutil.which("python3.13"), *map(str, root.glob("versions/3.13*/bin/python3.13"))]
    for path in filter(None, found):
        if subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode == 0:
            return path
    return "3.13"  # nox says that it is not here, and skips the session


@nox.session
@nox.parametrize(
    "python,stack",
    [(None, "lab"), (None, "notebook7"), (python_3_13(), "classic")],
    ids=["lab", "notebook7", "classic"],
)
def browser(session: nox.Session, stack: str) -> None:
    """Drive the panel in JupyterLab, Notebook 7 on ipykernel 6, or the classic notebook of Colab.

    The session's environment holds what is old: the kernel, and for the classic notebook its
    server. Chromium is driven from the environment that runs nox, where that has Playwright.
    """
    env = {"HYBRID_MAGIC_STACK": stack}
    driver: str = sys.executable
    if importlib.util.find_spec("playwright") is None:
        if stack == "classic":
            session.skip("playwright is not in the environment that runs nox (see `make browser`)")
        session.install("-e", ".[dev]")
        driver = "python"
    if stack == "notebook7":
        borrow_packages(session)
        session.install("ipykernel==6.31.0")
        env["HYBRID_MAGIC_KERNEL"] = str(pathlib.Path(session.bin, "python"))
    elif stack == "classic":
        session.install(*STACKS["colab"], "notebook==6.5.7", *DRAWN)
        env["HYBRID_MAGIC_FRONT_END"] = session.bin
        env["HYBRID_MAGIC_KERNEL"] = str(pathlib.Path(session.bin, "python"))
    tests = ["-m", "pytest", "-m", "browser", "tests/browser", *session.posargs]
    session.run(driver, *tests, env=env, external=True)


DRAWN = ["matplotlib", "pillow", "tqdm"]  # what a panel needs, where nothing is trained for real


@nox.session
def bench(session: nox.Session) -> None:
    """Run one program of benchmarks/: `nox -s bench -- benchmarks/NAME.py [arguments]`."""
    session.install("-e", ".[dev]")
    programs = sorted(str(path) for path in pathlib.Path("benchmarks").glob("*.py"))
    if not session.posargs:
        session.error(f"no program named; wanted one of {', '.join(programs)} after `--`")
    session.run("python", *session.posargs)


@nox.session
@nox.parametrize("stack", list(STACKS), ids=list(STACKS))
def compat(session: nox.Session, stack: str) -> None:
    """Run what meets IPython and widgets on the stack that a hosted notebook ships."""
    session.install(*STACKS[stack])
    borrow_packages(session)
    session.install("--no-deps", "-e", ".")
    tests = ["-m", "pytest", "-m", "not browser and not slow"]
    for chosen in COMPAT[stack]:
        session.run("python", *tests, *chosen, *session.posargs, env={"OMP_NUM_THREADS": "1"})


CLOCKED = [f"tests/notebook/test_{name}.py" for name in ("live", "pump")]
HEADLESS = "tests/notebook/test_headless.py"  # the programs that run notebooks are today's
SCRIPTS = [f"tests/notebook/test_export_{name}.py" for name in ("dataflow", "runs")]  # no widget
NOT_AT_ONCE = [f"--ignore={path}" for path in (*CLOCKED, HEADLESS, *SCRIPTS)]
TWO_AT_ONCE = ["-n", "2", "--dist", "loadfile", *NOT_AT_ONCE]
SHOWN = "test_with_a_front_end_the_panel_stays_and_what_it_asks_is_in_the_records"
COMPAT = {
    "colab": [
        [*TWO_AT_ONCE, "tests/notebook", "tests/test_import.py", "tests/test_readme.py"],
        ["tests/notebook/test_pump.py", f"tests/notebook/test_live.py::{SHOWN}"],
    ],
    # Kaggle's differs in ipywidgets alone: what meets no widget is not run again.
    "kaggle": [
        ["tests/notebook/test_panel.py", f"tests/notebook/test_live.py::{SHOWN}"],
    ],
}


def borrow_packages(session: nox.Session) -> None:
    """Let the session see the packages of the environment that runs nox, behind its own.

    PyTorch is some gigabytes; the pinned stack is all that has to differ. An environment of another
    Python, or without PyTorch, has nothing to lend: then everything is installed.
    """
    ask = (
        "import sys, sysconfig; print(sys.version_info[:2], sysconfig.get_path('purelib'), sep='|')"
    )
    version, there = str(session.run("python", "-c", ask, silent=True)).strip().split("|")
    lent = pathlib.Path(sysconfig.get_path("purelib"))
    if version == str(sys.version_info[:2]) and (lent / "torch").is_dir():
        pathlib.Path(there, "borrowed.pth").write_text(f"{lent}\n")
    else:
        session.install("-e", ".[dev]")
