"""A cell's text: its form, its step, its names, and where its mistakes are told."""

import re

import pytest

SETUP = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from hybrid_magic.notebook.cell import make_step, read_cell

torch.manual_seed(0)
net = nn.Linear(4, 3)
pairs = TensorDataset(torch.randn(16, 4), torch.randint(0, 3, (16,)))
train_loader = DataLoader(pairs, batch_size=8)
running, total, factor = 0.0, 0, 2

def step_of(text, log=(), line=""):
    return make_step(get_ipython(), read_cell(get_ipython(), text, line), log)

def form(text, log=()):
    try:
        step = step_of(text, log)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "bare" if step is None else "step"

def result(text, batch, log=()):
    return step_of(text, log)(None, batch)
"""


@pytest.fixture
def notebook(empty_notebook):
    assert empty_notebook.run(SETUP).error is None
    return empty_notebook


def form(notebook, text, log=()):
    return notebook.value(f"form({text!r}, {log!r})")


def result(notebook, text, batch=3, log=()):
    """Return what the step made of `text` gives for `batch`."""
    return notebook.value(f"result({text!r}, {batch!r}, {log!r})")


def arrows(ran) -> list[tuple[int, str]]:
    """Return the lines that a printed traceback points to, outermost first."""
    found = re.findall(r"^-+> (\d+) (.*)$", ran.out, re.MULTILINE)
    return [(int(number), text.strip()) for number, text in found]


# -- which form


@pytest.mark.parametrize("text", ["", "\n\n", "   \n", "# later\n", "\n# a\n\n# b"])
def test_a_cell_without_a_statement_is_bare(notebook, text):
    assert form(notebook, text) == "bare"


@pytest.mark.parametrize(
    ("text", "gives"),
    [
        ("loss = batch * 2", 6),
        ("batch * 2", 6),
        ("loss = batch * 2\nprint('seen', end='')", 6),
        ("loss = batch * 2\nloss", 6),
        ("other, loss = 1, batch * 2", 6),
        ("(other, [loss, *rest]) = 1, [batch * 2, 3]", 6),
        ("loss: float = batch * 2", 6),
        ("if batch:\n    loss = batch * 2\nelse:\n    loss = 0", 6),
        ("with torch.no_grad():\n    loss = batch * 2", 6),
        ("loss = 0\nfor number in range(batch):\n    loss += 2", 6),
        ("for loss in (1, batch * 2):\n    pass", 6),
        ("try:\n    loss = batch / 0\nexcept ZeroDivisionError:\n    loss = 6", 6),
        ("print(loss := batch * 2, end='')", 6),
        ("[loss := batch * 2 for _ in range(1)]\nNone", 6),
        ("double = lambda value: value * 2\nloss = double(batch)", 6),
        ("def double(value):\n    return value * 2\ndouble(batch)", 6),
        ("def double(loss):\n    loss = loss * 2\n    return loss\ndouble(batch)", 6),
        ("half = batch\nloss = sum([half for _ in range(2)])", 6),
        (
            "def outer():\n    def inner():\n        return batch\n    return inner() * 2\nouter()",
            6,
        ),
        ("class Twice:\n    by = 2\nloss = batch * Twice.by", 6),
        ("def down(n):\n    return 0 if n == 0 else 2 + down(n - 1)\ndown(batch)", 6),
        ("import math as arithmetic\narithmetic.prod([batch, 2])", 6),
        ("batch = batch * 2\nbatch", 6),
        ("text = '''\nnot = indented\n'''\nloss = batch * len(text.split()) - 3", 6),
        ("loss = (\n    batch\n    * 2\n)", 6),
        ("loss = batch * factor", 6),
    ],
)
def test_a_step_gives_the_loss_it_assigns_or_else_its_last_expression(notebook, text, gives):
    assert result(notebook, text) == gives


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x, y = batch", 2),
        ("out = batch\nfor x in out:\n    out = x", 3),
        ("def f():\n    loss = 1", 2),
        ("x = 1\n\nf = lambda: (loss := 1)", 4),
        ("x = [loss for loss in batch]", 2),
    ],
)
def test_a_step_that_leaves_no_loss_is_told_with_its_last_line(notebook, text, line):
    assert form(notebook, text) == (
        f"HybridMagicError: line {line}: the cell leaves no loss; wanted `loss = ...`, or the loss "
        "as its last expression; assign it"
    )


# -- names


def test_logged_names_are_given_beside_the_loss(notebook):
    text = "acc, ppl = batch, 2\nfor more in (1,):\n    deep = more\nloss = 6"
    assert result(notebook, text, log=["acc", "deep"]) == [6, {"acc": 3, "deep": 1}]
    assert result(notebook, "acc = 1\nbatch * 2", log=["acc"]) == [6, {"acc": 1}]


@pytest.mark.parametrize("text", ["loss = 1", "loss = 1\ndef f():\n    acc = 2"])
def test_a_name_to_log_that_the_cell_does_not_assign_is_told(notebook, text):
    assert form(notebook, text, ["acc"]) == (
        "HybridMagicError: --log acc: the cell assigns no acc; wanted a name it assigns; "
        "check its spelling"
    )


@pytest.mark.parametrize(
    ("text", "line", "name"),
    [
        ("loss = batch\nrunning += loss", 3, "running"),
        ("loss = batch\nwith torch.no_grad():\n    total += 1", 4, "total"),
        ("loss = batch\nif loss:\n\n    running -= 1", 5, "running"),
        ("loss = batch\nfor _ in range(2):\n    total += 1", 4, "total"),
        ("loss = batch\nrunning = running + loss", 3, "running"),
        ("loss, running = batch, running + 1", 2, "running"),
        ("running += batch\nrunning = 0\nloss = 1", 2, "running"),
    ],
)
def test_changing_a_number_of_the_notebook_is_refused_with_its_line(notebook, text, line, name):
    assert form(notebook, text) == (
        f"HybridMagicError: line {line}: {name} is changed but belongs to the notebook, and a "
        "step's names are its own; wanted a number of this step; assign it and record it with --log"
    )


@pytest.mark.parametrize(
    "text",
    [
        "running = 0\nrunning += batch\nloss = running",
        "if batch:\n    running = 0\nrunning += batch\nloss = running",
        "x = batch\nx = x + 1\nloss = x",
        "batch += 1\nloss = batch",
        "global running\nrunning += batch\nloss = running",
        "loss = [0]\nloss[0] += 1",
        "def f(): return 1\nf = torch.no_grad()(f)\nloss = f()",
        "import math as m\nm = m.pi\nloss = m",
        "total = sum(total for total in (1, 2))\nloss = total",
        "total = (lambda: total)\nloss = 1",
        "def f():\n    total = 0\n    total += 1\n    return total\nloss = f()",
    ],
)
def test_changing_a_number_of_the_step_is_its_own_business(notebook, text):
    assert form(notebook, text) == "step"


def test_the_names_of_a_step_do_not_leak_into_the_notebook(notebook):
    before = notebook.value("sorted(n for n in globals() if n[0] != '_')")
    cell = (
        "%%hybrid_train\nx, y = batch\nout = net(x)\ndef inner(): return y\n"
        "loss = F.cross_entropy(out, inner())"
    )
    assert notebook.run(cell).error is None
    assert notebook.value("sorted(n for n in globals() if n[0] != '_')") == before
    assert notebook.value("[n for n in globals() if 'hybrid_model' in n]") == []


def test_the_notebooks_own_step_and_model_keep_their_meaning(notebook):
    notebook.run("step, model = 5, net")
    assert result(notebook, "loss = step + batch") == 8
    cell = "%%hybrid_train\nx, y = batch\nassert step == 5\nF.cross_entropy(model(x), y)"
    assert notebook.run(cell).error is None
    assert notebook.value("[step, model is net]") == [5, True]


def test_a_step_sees_what_the_notebook_makes_later(notebook):
    notebook.run("step = step_of('loss = batch * later')\nlater = 7")
    assert notebook.value("step(None, 3)") == 21


# -- IPython's own lines, tracebacks, sources


def test_magic_and_shell_lines_work_in_a_step(notebook):
    assert result(notebook, "here = %pwd\nsaid = !echo 7\nloss = [here, int(said[0])]")[1] == 7
    assert result(notebook, "%pwd\n!true\nloss = batch") == 3


@pytest.mark.parametrize("options", ["", " --log x", " --plain --log x,y  # as it was"])
def test_an_error_in_the_cell_points_to_the_persons_own_line(notebook, options):
    ran = notebook.run(
        f"%%hybrid_train{options}\nx, y = batch\n\nout = net(x)\n1 / 0\nloss = out.sum()"
    )
    assert ran.error == "ZeroDivisionError"
    assert arrows(ran)[-1] == (5, "1 / 0")


def test_an_error_below_the_cell_shows_the_way_there(notebook):
    notebook.run("def helper(x):\n    return x.no_such_thing")
    ran = notebook.run(
        "%%hybrid_train\nx, y = batch\ndef inner():\n    return helper(\n        x)\nloss = inner()"
    )
    assert ran.error == "AttributeError"
    assert arrows(ran)[-3][1] in ("loss = inner()", "inner()")
    assert [line for line, _ in arrows(ran)][-3::2] == [6, 2]
    assert arrows(ran)[-2][0] in (4, 5)
    assert "hybrid_magic" not in ran.out.replace("hybrid_magic.notebook.cell", "")


def test_a_statement_over_several_lines_and_a_text_over_several_keep_the_count(notebook):
    ran = notebook.run(
        '%%hybrid_train\ntext = """one\ntwo\n  three"""\nx, y = batch\nloss = (net(x)\n   .sum())\n'
        "1 / 0"
    )
    assert arrows(ran)[-1] == (8, "1 / 0")


def test_inspect_gives_the_source_of_the_step_and_of_what_it_defines(notebook):
    inner = "def double(value):\n    # twice\n    return value * 2\n"
    notebook.run("import inspect, textwrap")
    text = inner + "loss = textwrap.dedent(inspect.getsource(double))"
    assert result(notebook, text) == inner
    notebook.run(f"step = step_of({text!r}, (), '%%hybrid_train --epochs 3')")
    source = notebook.value("inspect.getsource(step)").splitlines()
    assert source[0].startswith("def step(")
    assert source[0].endswith("# %%hybrid_train --epochs 3")
    assert source[1:] == ["    " + line for line in text.splitlines()]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = batch\nloss = net(x", 3),
        ("x = batch\n\nif x\n    loss = x", 4),
        ("x = batch\n  loss = x", 3),
        ("x = batch\nnonlocal x\nloss = x", 3),  # found by the compiler, not the parser
        ("loss = batch\nfrom math import *", 3),
    ],
)
def test_a_syntax_error_is_told_at_the_persons_own_line(notebook, text, line):
    ran = notebook.run(f"%%hybrid_train\n{text}")
    assert ran.error in ("SyntaxError", "IndentationError")
    assert ran.message.endswith(f", line {line})")
    assert text.splitlines()[line - 2].strip() in ran.out


def test_the_cell_is_named_as_the_cell_that_runs(notebook):
    ran = notebook.run("%%hybrid_train\n1 / 0\nloss = 1")
    count = notebook.value("len(In) - 1")
    named = set(re.findall(r"In\[(\d+)\]|<ipython-input-(\d+)-", ran.out))
    assert {int("".join(pair)) for pair in named} == {count}, ran.out
