"""Runs in new processes, none of which may outlive its test, nor a file that it made."""

import os
import pathlib
import tempfile

import launched
import pytest

import hybrid_magic.run


@pytest.fixture
def temporary(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """The folder for temporary files, without any of ours when the test is over; its path is as
    short as a person's, for sockets are in it. (`tmp_path` is made before it is in use.)"""
    with tempfile.TemporaryDirectory(prefix="hm-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setattr(hybrid_magic.run, "last_run", None)
        yield pathlib.Path(folder)
        assert launched.gone(pathlib.Path(folder))
        mine = ("torchinductor", "pymp")  # torch's and multiprocessing's, of the process of tests
        assert [n for n in os.listdir(folder) if not n.startswith(mine)] == []
