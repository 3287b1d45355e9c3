"""What importing costs, in processor seconds. Each measurement is a process of its own, the best of
a few: a busy machine must not fail it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

HEAVY = ["torch", "IPython", "ipywidgets", "matplotlib", "numpy", "tqdm", "PIL", "psutil", "pynvml"]


def run(program: str) -> str:
    """Return the last line that `program` prints in a process of its own.

    Compiled files may be kept, as they are where a person runs it; the first run makes them.
    """
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=150,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_importing_the_package_loads_nothing_heavy():
    loaded = json.loads(
        run(
            "import json, sys, hybrid_magic;"
            f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
        )
    )
    assert loaded == []


def test_importing_the_package_takes_under_50_ms():
    program = (
        "import time; began = time.process_time(); import hybrid_magic;"
        "print(time.process_time() - began)"
    )
    assert min(float(run(program)) for _ in range(8)) < 0.05


def test_reading_a_saved_run_needs_no_torch(tmp_path):
    path = str(tmp_path / "run.jsonl")
    program = (
        "import sys, hybrid_magic as hm;"
        f"hm.Run(config={{}}, environment={{}}, outcome='finished').save({path!r});"
        f"print(hm.load_run({path!r}).outcome, 'torch' in sys.modules)"
    )
    assert run(program) == "finished False"


def test_loading_the_extension_adds_under_100_ms_to_torch():
    program = (
        "import time, torch\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "began = time.process_time()\n"
        "shell.run_line_magic('load_ext', 'hybrid_magic')\n"
        "took = time.process_time() - began\n"
        "assert shell.find_cell_magic('hybrid_train')\n"
        "print(took)"
    )
    assert min(float(run(program)) for _ in range(4)) < 0.1


def test_names_that_the_package_offers_are_there():
    program = (
        "import hybrid_magic as hm\n"
        "assert set(hm.__all__) <= set(dir(hm))\n"
        "[getattr(hm, name) for name in hm.__all__]\n"
        "try:\n"
        "    hm.nothing\n"
        "except AttributeError as error:\n"
        "    print(error)"
    )
    assert run(program) == "module 'hybrid_magic' has no attribute 'nothing'"
