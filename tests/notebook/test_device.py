"""`%hybrid_device` says what there is, what a run would choose, and what to do about it."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import sys
import types
from typing import Any

import fake_machine
import pytest
import torch
from fake_machine import A100, GIB, H100, P100, T4
from IPython.core.error import UsageError
from notebook_process import Notebook

from hybrid_magic.engine import host as hosts
from hybrid_magic.engine.machine import read_machine
from hybrid_magic.notebook import device_advice, device_page
from hybrid_magic.telemetry import nvml

PLACES = ("TPU_ACCELERATOR_TYPE", "KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_URL_BASE", "COLAB_RELEASE_TAG")


class FakeGauge:
    """What NVML would open: readings of a GPU, or none of them."""

    name, driver_version, total_bytes, power_limit_w = "Tesla T4", "550.54.15", 15 * GIB, 70.0

    def __init__(self) -> None:
        self.reading = nvml.GpuReading(6 * GIB, 0.42, 31.7, 55.0, 1590.0, 2100.0, 1e6)
        self.closed = 0

    def read(self) -> nvml.GpuReading:
        return self.reading

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a product's notebook, nor NVML, nor an error of an earlier test."""
    for name in (*PLACES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.setattr(nvml, "open_gpu", lambda uuid, pci_bus_id=None: None)
    for name in ("last_exc", "last_value"):
        monkeypatch.delattr(sys, name, raising=False)
    there = hosts.read_host()
    cores = dataclasses.replace(
        there, cores=8, usable_cores=8, threads=8, nvidia_driver=None, nvidia_gpus=()
    )
    system(monkeypatch, cores)


def system(patch: pytest.MonkeyPatch, host: hosts.Host | None = None, **changed: Any) -> None:
    """Have the host be another than it is."""
    from hybrid_magic.engine import machine

    before = host or machine.read_host()
    patch.setattr(machine, "read_host", lambda: dataclasses.replace(before, **changed))


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch):
    """Run the magic; return what it showed, and the namespace that it wrote into."""
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(device_page, "display", lambda bundle, raw: shown.append(bundle))
    shell = types.SimpleNamespace(user_ns={})

    def run(line: str = "") -> tuple[dict[str, str], dict[str, Any]]:
        shown.clear()
        device_page.show(shell, line)
        return (shown[0] if shown else {}), shell.user_ns

    return run


def said(bundle: dict[str, str]) -> str:
    """Return the text on one line."""
    return " ".join(bundle["text/plain"].split())


def rows_of(page: str) -> list[list[str]]:
    """Return the cells of the HTML's tables and the items of its lists, as they are read."""
    found = re.findall(r"<(?:tr|li)>(.*?)</(?:tr|li)>", page, re.DOTALL)
    cells = (re.split(r"</t[hd]><t[hd][^>]*>", row) for row in found)
    words = ([re.sub(r"<[^>]+>", "", cell) for cell in row] for row in cells)
    return [[html.unescape(cell).replace("\N{NO-BREAK SPACE}", " ") for cell in r] for r in words]


# -- GPUs


def test_a_t4_computes_in_fp16_and_is_not_taken_in_by_emulated_bf16(monkeypatch, ask):
    fake_machine.install(monkeypatch, T4)
    text = said(ask()[0])
    assert "cuda:0 Tesla T4, compute capability 7.5, 15.0 GiB" in text
    assert "--precision auto fp16 with loss scaling: compute capability 7.5 has fp16 tensor" in text
    assert "--memory 0.9 12.6 GiB: 90 % of the 14.0 GiB that others leave of 15.0 GiB" in text
    assert "cuda:0 native none native emulated fp16" in text
    assert "torch.cuda.is_bf16_supported() says yes" in text
    assert "cuDNN 9.1.0" in text


@pytest.mark.parametrize("gpu", [A100, H100], ids=lambda gpu: gpu.name)
def test_an_a100_and_what_came_after_compute_in_bf16_and_need_no_advice(monkeypatch, ask, gpu):
    fake_machine.install(monkeypatch, gpu)
    text = said(ask()[0])
    assert f"{gpu.name}, compute capability {gpu.capability[0]}.0" in text
    assert "--precision auto bf16: compute capability" in text
    assert "cuda:0 native native native native bf16" in text
    assert "what you should know" not in text


def test_a_p100_is_measured_and_a_torch_without_its_kernels_is_told(monkeypatch, ask):
    fake_machine.install(monkeypatch, P100, built=("sm_60", "sm_70"))
    text = said(ask()[0])
    assert (
        "the faster of fp32 and fp16, measured as each run starts: compute capability 6.0" in text
    )
    assert "not built for" not in text
    fake_machine.install(monkeypatch, P100)
    assert (
        'this torch was not built for Tesla P100-PCIE-16GB, and fails on it with "no kernel '
        'image"; take another GPU, or install a torch built for compute capability 6.0'
    ) in said(ask()[0])
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert '"no kernel image"; choose Settings > Accelerator > GPU T4 x2, or' in said(ask()[0])


def test_of_two_gpus_it_says_which_one_a_run_takes_and_how_to_take_the_other(monkeypatch, ask):
    fake_machine.install(monkeypatch, T4, T4, current=1)
    bundle, _ = ask()
    text = said(bundle)
    assert "a run takes cuda:1, unless the model is on another GPU already, or --device" in text
    assert "a run uses one of the 2 GPUs; --device cuda:0 takes another" in text
    assert [row[0] for row in rows_of(bundle["text/html"])].count("cuda:0") == 3


def test_a_busy_gpu_leaves_cells_empty_and_says_when_more_is_known(monkeypatch, ask):
    fake_machine.install(monkeypatch, dataclasses.replace(T4, free_bytes=None))
    bundle, _ = ask()
    text = said(bundle)
    assert "memory device total allocated reserved for a run cuda:0 15.0 GiB 0 B 0 B 13.5" in text
    assert "13.5 GiB: 90 % of 15.0 GiB, less what others hold, which is known once a run" in text


def test_gauges_are_shown_and_closed_and_tell_what_others_hold(monkeypatch, ask):
    gauge = FakeGauge()
    monkeypatch.setattr(nvml, "open_gpu", lambda uuid, pci_bus_id=None: gauge)
    fake_machine.install(monkeypatch, dataclasses.replace(T4, in_use=False))
    bundle, names = ask("-o facts")
    text = said(bundle)
    assert "cuda:0 42 % 32 of 70 W 55 \N{DEGREE SIGN}C 1590 of 2100 MHz" in text
    assert "NVIDIA driver 550.54.15" in text
    assert "6.0 GiB of cuda:0 are held by others" in text
    assert gauge.closed == 1
    assert names["facts"]["gauges"]["cuda:0"]["power_w"] == 31.7
    assert names["facts"]["devices"][0]["others_bytes"] == 6 * GIB
    gauge.reading = nvml.GpuReading()
    assert "at this moment" not in said(ask()[0])


def test_memory_that_an_error_may_hold_points_to_hybrid_free(monkeypatch, ask):
    held = dataclasses.replace(A100, allocated_bytes=GIB, reserved_bytes=GIB, free_bytes=39 * GIB)
    fake_machine.install(monkeypatch, held)
    assert "%hybrid_free" not in said(ask()[0])
    monkeypatch.setattr(sys, "last_value", torch.OutOfMemoryError("x"), raising=False)
    assert "keeps its last error (OutOfMemoryError)" in said(ask()[0])
    assert "%hybrid_free gives that back" in said(ask()[0])
    fake_machine.install(monkeypatch, A100)
    assert "%hybrid_free" not in said(ask()[0])


def test_gpus_that_are_hidden_are_told(monkeypatch, ask):
    system(monkeypatch, nvidia_gpus=("Tesla T4", "Tesla T4"), nvidia_driver="550")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    fake_machine.install(monkeypatch, T4)
    assert "CUDA_VISIBLE_DEVICES='1' shows torch 1 of the 2 GPUs" in said(ask()[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    fake_machine.install_none(monkeypatch, cuda="12.6", why="No CUDA GPUs are available")
    text = said(ask()[0])
    assert "CUDA_VISIBLE_DEVICES='-1' hides 2 GPUs (Tesla T4 and others) from torch; unset" in text


# -- no GPU


def test_without_a_gpu_it_says_so_and_what_that_means(monkeypatch, ask):
    fake_machine.install_none(monkeypatch, cuda="12.6", why="Found no NVIDIA driver")
    text = said(ask()[0])
    assert "a run takes the CPU, for want of a GPU that torch can use" in text
    assert "there is no GPU that torch can use: none was found" in text
    assert "without a GPU a run computes on 8 cores of the CPU" in text
    assert "Found no NVIDIA driver" not in text


@pytest.mark.parametrize(
    ("variables", "tpu", "words"),
    [
        ({"COLAB_RELEASE_TAG": "x"}, False, "Runtime > Change runtime type > T4 GPU in Google Co"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "x"}, False, "Settings > Accelerator > GPU T4 x2 in Kaggle's"),
        (
            {"KAGGLE_URL_BASE": "x", "COLAB_RELEASE_TAG": "x"},  # Kaggle's image is of Colab's
            True,
            "Settings > Accelerator > GPU T4 x2 in Kaggle's",
        ),
    ],
)
def test_on_colab_and_kaggle_it_says_where_a_gpu_is_chosen(monkeypatch, ask, variables, tpu, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if tpu:
        monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-8")
    fake_machine.install_none(monkeypatch, cuda=None)
    text = said(ask()[0])
    assert text.startswith("notebook " + ("Kaggle" if "Kaggle" in words else "Google Colab"))
    assert words in text
    assert ("a TPU was chosen" if tpu else "no GPU was chosen") in text
    fake_machine.install(monkeypatch, T4)
    text = said(ask()[0])
    assert "was chosen" not in text
    assert "a session with a GPU counts against your quota" in text


def test_colab_is_known_by_its_module_too(monkeypatch):
    assert device_advice.place_here() is None
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    place = device_advice.place_here()
    assert place is not None
    assert place.name == "Google Colab"


@pytest.mark.parametrize("by", ["the system", "NVML"])
def test_a_torch_for_cpus_beside_an_nvidia_gpu_is_told(monkeypatch, ask, by):
    fake_machine.install_none(monkeypatch, cuda=None)
    if by == "NVML":
        monkeypatch.setattr(nvml, "open_gpu", lambda uuid, pci_bus_id=None: FakeGauge())
    else:
        system(monkeypatch, nvidia_gpus=("Tesla T4",), nvidia_driver="550.54.15")
    text = said(ask()[0])
    assert f"Tesla T4 is in this machine, and torch {torch.__version__} is built for CPUs" in text
    assert "install a torch built for CUDA" in text
    assert "NVIDIA driver 550.54.15" in text


def test_a_driver_that_torch_cannot_use_is_told_in_torchs_words(monkeypatch, ask):
    system(monkeypatch, nvidia_driver="418.40")
    fake_machine.install_none(monkeypatch, cuda="12.6", why="The NVIDIA driver is too old")
    assert (
        "an NVIDIA driver (418.40) is in this machine, and torch cannot use it: The NVIDIA driver "
        "is too old; update the driver"
    ) in said(ask()[0])


def test_more_threads_than_a_container_has_cores_are_told(monkeypatch, ask):
    fake_machine.install_none(monkeypatch, cuda=None)
    system(monkeypatch, cores=64, usable_cores=2.5, threads=64)
    text = said(ask()[0])
    assert "2.5 of 64 cores to be used here; torch computes in 64 threads" in text
    assert "64 threads on 2.5 cores, which wait for each other; torch.set_num_threads(2)" in text


# -- how it is shown


def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much to say as there can be, in names that HTML would take for its own."""
    evil = dataclasses.replace(P100, name="<b>GPU</b> & 'co' {x}", allocated_bytes=GIB)
    fake_machine.install(monkeypatch, evil, dataclasses.replace(T4, name="<i>"))
    system(monkeypatch, nvidia_gpus=("<u>",) * 3, processor="<img src=x>")
    monkeypatch.setattr(nvml, "open_gpu", lambda uuid, pci_bus_id=None: FakeGauge())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "<script>0,1</script>")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: [][0])
    monkeypatch.setattr(sys, "last_value", ValueError(), raising=False)


def test_text_and_html_say_the_same(monkeypatch, ask):
    everywhere(monkeypatch)
    bundle, _ = ask()
    rows = rows_of(bundle["text/html"])
    assert len(rows) > 20
    text = said(bundle)
    for row in rows:
        assert " ".join(cell for cell in row if cell) in text, row
    assert len(text) - len(" ".join(" ".join(filter(None, row)) for row in rows)) < 120
    assert max(map(len, bundle["text/plain"].splitlines())) <= 100


def test_every_name_is_escaped_and_the_page_brings_no_style_of_its_own(monkeypatch, ask):
    everywhere(monkeypatch)
    page = ask()[0]["text/html"]
    for tag in ("<b>GPU", "<i>", "<u>", "<img", "<script", "<style"):
        assert tag not in page
    assert {"color: inherit"} == set(re.findall(r"[a-z-]*color: [^;\"]+", page))


def test_what_torch_says_of_a_broken_cudnn_is_passed_on(monkeypatch, ask):
    everywhere(monkeypatch)
    assert "- list index out of range" in ask()[0]["text/plain"]


def test_o_gives_everything_as_a_plain_dict(monkeypatch, ask):
    everywhere(monkeypatch)
    _, names = ask("-o facts")
    facts = json.loads(json.dumps(names["facts"]))
    assert facts["chosen"] == "cuda:0"
    assert facts["devices"][1]["precisions"]["bf16"] == "emulated"
    assert facts["devices"][1]["auto"]["name"] == "fp16"
    assert facts["place"] is None
    assert len(facts["notes"]) >= 4


def test_plain_is_text_alone(monkeypatch, ask, capsys):
    fake_machine.install(monkeypatch, T4)
    assert ask("--plain -o facts")[0] == {}
    out = capsys.readouterr().out
    assert out.startswith("a run takes ")
    assert out == device_page.text(page_now()) + "\n"


def page_now() -> Any:
    from hybrid_magic.notebook.device_words import page_of

    return page_of(read_machine(), {}, None, None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--json", "%hybrid_device takes no --json; wanted"),
        ("model", "%hybrid_device takes no model; wanted"),
        ("--plain=1", "%hybrid_device takes no --plain=1; wanted"),
        ("-o", "-o has no name; wanted"),
        ("-o a -o b", "-o is given twice; wanted"),
        ("-o 2x", "-o is '2x'; wanted a name such as"),
        ("-o class", "-o is 'class'; wanted a name such as"),
        ("-o 'a", "the line cannot be read (No closing quotation); wanted"),
    ],
)
def test_a_wrong_argument_is_one_line_and_shows_nothing(ask, capsys, line, words):
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        ask(line)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is UsageError
    assert capsys.readouterr().out == ""


# -- in a notebook


def test_in_a_notebook(empty_notebook: Notebook):
    ran = empty_notebook.run("%hybrid_device --plain -o machine")
    assert (ran.error, ran.err) == (None, "")
    assert "--precision auto  " in ran.out
    assert empty_notebook.value("machine['versions']['torch']") == str(torch.__version__)
    assert empty_notebook.value("machine['devices'][-1]['device']") == "cpu"
    ran = empty_notebook.run(
        "from IPython.utils.capture import capture_output\n"
        "with capture_output() as shown:\n    %hybrid_device"
    )
    assert ran.error is None
    assert empty_notebook.value("sorted(shown.outputs[0].data)") == ["text/html", "text/plain"]
    assert empty_notebook.value("len(shown.outputs), shown.stdout, shown.stderr") == [1, "", ""]
    ran = empty_notebook.run("%hybrid_device --json")
    assert ran.error == "UsageError"
    assert "Traceback" not in ran.out + ran.err
