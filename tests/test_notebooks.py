"""The lessons: they run, and what they left in the saved file reads well without a kernel."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from hybrid_magic.datasets import FOLDER

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DATA = {"03_resnet50_cifar100", "04_transformer_imdb"}  # train on what the data folder holds
MOST_BYTES = 700_000  # five runs, each with a figure and a table, at most 300 kB a run
WIDGET = "application/vnd.jupyter.widget-view+json"


def saved(path: pathlib.Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path: pathlib.Path) -> list[dict]:
    return saved(path)["cells"]


def outputs(path: pathlib.Path) -> list[dict]:
    return [output for cell in cells(path) for output in cell.get("outputs", [])]


def test_the_lessons_are_here():
    on_data = sorted(DATA)
    there = [path.stem for path in NOTEBOOKS]
    on_more = ["05_profile", "06_resume_and_scale"]
    assert there == ["01_quickstart", "02_ablation", *on_data, *on_more]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestSavedNotebook:
    def test_every_code_cell_was_run_in_order(self, path):
        code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))

    def test_no_cell_failed(self, path):
        assert [output for output in outputs(path) if output["output_type"] == "error"] == []

    def test_what_a_run_left_is_seen_without_a_kernel(self, path):
        kinds = [set(output.get("data", {})) for output in outputs(path)]
        assert not [kind for kind in kinds if WIDGET in kind], "a widget is blank without a kernel"
        assert any("image/png" in kind for kind in kinds)
        assert any({"text/html", "text/plain"} <= kind for kind in kinds)

    def test_no_state_of_widgets_is_kept(self, path):
        assert "widgets" not in saved(path)["metadata"]

    def test_every_picture_has_words_in_its_place(self, path):
        pictures = [output for output in outputs(path) if "image/png" in output.get("data", {})]
        assert all(picture["metadata"]["image/png"]["alt"] for picture in pictures)

    def test_it_is_small_and_names_no_machine(self, path):
        text = path.read_text(encoding="utf-8")
        assert len(text) < MOST_BYTES
        for trace in ("/home/", "/root/", "/Users/", "/work/", "/tmp/", "site-packages"):
            assert trace not in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_and_says_where_its_page_is():
    page = ROOT / "build" / "01_quickstart.html"
    page.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "notebooks/demo.py"], cwd=ROOT, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr
    assert str(page) in done.stdout
    assert "finished" in done.stdout
    assert "the same weights as the plain loop, to the last bit: True" in page.read_text("utf-8")


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS[1:]])
def test_a_lesson_runs_headless(name):
    if name in DATA and not os.environ.get(FOLDER):
        pytest.skip(f"{FOLDER} names no folder with CIFAR-100 and IMDB")
    saved_before = (ROOT / f"notebooks/{name}.ipynb").read_bytes()
    command = [sys.executable, "notebooks/demo.py", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    shown = {"05_profile": "a step", "06_resume_and_scale": "2 processes train"}
    assert shown.get(name, "Ablation: ") in done.stdout
    assert (ROOT / f"notebooks/{name}.ipynb").read_bytes() == saved_before, "only --keep may write"


def test_a_notebook_that_is_not_here_is_told_with_those_that_are():
    command = [sys.executable, "notebooks/demo.py", "05_nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no notebook 05_nothing; wanted one of 01_quickstart, 02_ablation" in done.stderr


def test_a_demo_that_fails_says_so_with_its_exit_code(tmp_path):
    (tmp_path / "notebooks").mkdir()
    program = tmp_path / "notebooks/demo.py"
    program.write_text((ROOT / "notebooks/demo.py").read_text("utf-8"), encoding="utf-8")
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": []}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}}
    notebook["cells"] = [cell | {"source": "1 / 0"}]
    (tmp_path / "notebooks/01_quickstart.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert (tmp_path / "build/01_quickstart.html").exists()
