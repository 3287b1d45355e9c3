"""A real kernel, or a shell in a process of its own, for the tests that need one."""

import pathlib

import pytest
from kernel_client import FrontEnd
from notebook_process import Notebook


@pytest.fixture
def front_end(tmp_path: pathlib.Path):
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    made = FrontEnd(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def notebook_process(tmp_path_factory: pytest.TempPathFactory):
    made = Notebook(tmp_path_factory.mktemp("notebook"))
    yield made
    made.close()


@pytest.fixture
def empty_notebook(notebook_process: Notebook) -> Notebook:
    """A notebook in which nothing has been run but `%load_ext hybrid_magic`."""
    notebook_process.fresh()
    return notebook_process
