"""A real kernel for the tests that need one."""

import pathlib

import pytest
from kernel_client import FrontEnd


@pytest.fixture
def front_end(tmp_path: pathlib.Path):
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    made = FrontEnd(tmp_path)
    yield made
    made.close()
