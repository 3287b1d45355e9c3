"""The notebook in a process of its own that runs every cell of the corpus, plain and hybrid."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "notebook"))

from notebook_process import Notebook  # noqa: E402 - found by the line above


class Twins:
    """Asks `twins.py`, which runs inside the notebook's process, over the notebook's pipe."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._notebook = Notebook(folder)
        self._notebook.value(f"__import__('sys').path.insert(0, {str(HERE)!r})")

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any, **options: Any) -> Any:
            return self._notebook.value(f"__import__('twins').{name}(*{args!r}, **{options!r})")

        return ask

    def close(self) -> None:
        self._notebook.close()


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory):
    made = Twins(tmp_path_factory.mktemp("twins"))
    yield made
    made.close()
