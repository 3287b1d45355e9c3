"""`%%hybrid_train` as a person runs it: what it prints, what it leaves, what it never touches."""

import pathlib

import pytest

import hybrid_magic

PACKAGE = str(pathlib.Path(hybrid_magic.__file__).parent)

SETUP = '''
import gc, hashlib, os, random, signal, threading, weakref
import numpy, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import hybrid_magic as hm

torch.manual_seed(0)
images, labels = torch.randn(48, 4), torch.randint(0, 3, (48,))

def make_net():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, 3))

def make_loader(dataset=None, **options):
    dataset = TensorDataset(images, labels) if dataset is None else dataset
    return DataLoader(dataset, batch_size=8, shuffle=True, **options)

net = make_net()
train_loader = make_loader()

class Pairs:
    """Does `at_sample[n]` when its nth sample is read."""
    def __init__(self, at_sample):
        self.at_sample, self.read = at_sample, 0
    def __len__(self):
        return 48
    def __getitem__(self, index):
        self.read += 1
        self.at_sample.get(self.read, lambda: None)()
        return images[index], labels[index]

def fail():
    raise LookupError("the file of this sample is gone")

def interrupt():
    raise KeyboardInterrupt

def press_ctrl_c():
    press = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
    press.start()
    press.join()

def as_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

def fingerprint():
    """Return a hash of everything that a refused magic must leave alone."""
    space = {k: v for k, v in globals().items() if k[0] != "_" and k not in ("In", "Out")}
    found = [sorted((name, id(value)) for name, value in space.items())]
    found += [random.getstate(), as_bytes(torch.get_rng_state()), str(numpy.random.get_state())]
    for value in space.values():
        if isinstance(value, nn.Module):
            found += [(name, as_bytes(t)) for name, t in value.state_dict().items()]
            found += [(p.requires_grad, p.grad is None) for p in value.parameters()]
            found += [module.training for module in value.modules()]
        if isinstance(value, torch.optim.Optimizer):
            found.append(str(value.state_dict()))
    return hashlib.sha256(repr(found).encode()).hexdigest()

def weights(model):
    return hashlib.sha256(b"".join(map(as_bytes, model.parameters()))).hexdigest()

def modes(model):
    return [module.training for module in model.modules()]

def no_grads(model):
    return all(p.grad is None for p in model.parameters())
'''
STEP = "\nx, y = batch\nout = net(x)\nloss = F.cross_entropy(out, y)"


@pytest.fixture
def notebook(empty_notebook):
    ran = empty_notebook.run(SETUP)
    assert ran.error is None, ran.out
    return empty_notebook


def is_one_line(ran) -> str:
    """Check that a person's mistake was told in one line and nothing else, and return the line."""
    assert ran.error == "UsageError", ran.out + ran.err
    assert ran.out == ""
    assert ran.err == f"UsageError: {ran.message}\n"
    assert "\n" not in ran.message
    return ran.message


# -- it trains


@pytest.mark.parametrize(
    "cell",
    [
        "%hybrid_train --epochs 2 -o run",
        "%%hybrid_train --epochs 2 -o run",
        "%%hybrid_train --epochs 2 -o run\n# nothing here",
        "%%hybrid_train net train_loader --epochs 2 -o run" + STEP,
        "%%hybrid_train --epochs=2 -o run\nx, y = batch\nF.cross_entropy(net(x), y)",
        "turns = 2\n%hybrid_train --epochs {turns} -o run",
    ],
)
def test_it_trains_and_leaves_the_run(notebook, cell):
    before = notebook.value("weights(net)")
    ran = notebook.run(cell)
    assert ran.error is None, ran.out
    assert notebook.value("[run.outcome, run.samples_seen, len(run.history)]") == [
        "finished",
        96,
        notebook.value("run.steps"),
    ]
    assert notebook.value("hm.last_run is run")
    assert notebook.value("weights(net)") != before
    assert notebook.value("no_grads(net)")
    assert "finished" in ran.out
    assert "Out[" not in ran.out


def test_the_bare_form_says_what_it_took_and_inferred(notebook):
    notebook.run("opt = torch.optim.SGD(net.parameters(), lr=0.1)")
    out = notebook.run("%hybrid_train").out
    for said in ("model: net", "loader: train_loader", "optimizer: opt", "cross-entropy"):
        assert said in out


def test_logged_names_and_validation_are_in_the_run(notebook):
    notebook.run("test_loader = make_loader()")
    ran = notebook.run(
        "%%hybrid_train --val test_loader --log acc -o run --epochs 2"
        + STEP
        + "\nacc = (out.argmax(1) == y).float().mean()"
    )
    assert ran.error is None, ran.out
    assert notebook.value("[m['epoch'] for m in run.metrics]") == [1, 2]
    assert 0 <= notebook.value("run.metrics[-1]['acc']") <= 1
    assert notebook.value("all('acc' in step.logged for step in run.history)")


def test_the_optimizer_that_was_found_is_the_one_that_steps(notebook):
    notebook.run("opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)\n%hybrid_train")
    assert notebook.value("len(opt.state)") == 6
    assert notebook.value("opt.param_groups[0]['lr']") == 0.1


def test_the_help_of_the_magic_is_the_options(notebook):
    for kind in ("line", "cell"):
        text = notebook.value(f"get_ipython().find_{kind}_magic('hybrid_train').__doc__")
        assert text.startswith("%%hybrid_train [MODEL] [LOADER] [options]")
        assert "--max-batch N" in text


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("%hybrid_train --ep", ["--epochs"]),
        ("%%hybrid_train net tr", ["train_loader"]),
        ("%%hybrid_train --precision f", ["fp32", "fp16"]),
        ("%%hybrid_train --val=tr", ["train_loader"]),
    ],
)
def test_tab_completes_options_choices_and_names(notebook, line, offered):
    asked = f"get_ipython().complete(None, {line!r}, {len(line)})[1]"
    assert set(notebook.value(asked)) >= set(offered)
    cell = f"{line}\nx, y = batch"
    notebook.run(
        "from IPython.core.completer import provisionalcompleter\n"
        "def offers(code, at):\n"
        "    with provisionalcompleter():\n"
        "        return [one.text for one in get_ipython().Completer.completions(code, at)]"
    )
    assert notebook.value(f"offers({cell!r}, {len(line)})")[: len(offered)] == offered


def test_a_model_that_was_left_in_eval_mode_trains_and_is_left_so(notebook):
    notebook.run("net.eval()")
    ran = notebook.run("%hybrid_train -o run")  # its BatchNorm must be seen: no micro-batch of 1
    assert ran.error is None, ran.out
    assert not any(notebook.value("modes(net)"))


# -- mistakes

MISTAKES = {
    "no model": ("del net", "%hybrid_train", "the notebook holds no model; wanted "),
    "several models": ("b = make_net()", "%hybrid_train", "the notebook holds 2 models: net "),
    "a frozen model": (
        "net.requires_grad_(False)",
        "%hybrid_train net",
        "net has only frozen parameters; wanted at least one with requires_grad=True; ",
    ),
    "only frozen models": (
        "net.requires_grad_(False)",
        "%hybrid_train",
        "the notebook holds only frozen models (net); wanted ",
    ),
    "a half-precision model": (
        "net.half()",
        "%hybrid_train",
        "net has 6 parameters of torch.float16; wanted FP32 weights, ",
    ),
    "a bfloat16 model": (
        "net.bfloat16()",
        "%%hybrid_train" + STEP,
        "net has 6 parameters of torch.bfloat16; wanted FP32 weights, ",
    ),
    "a model that is none": (
        "other = 3",
        "%hybrid_train other",
        "other is a int; wanted a torch.nn.Module; ",
    ),
    "an optimizer of the model that was": (
        "opt = torch.optim.Adam(net.parameters())\nnet = make_net()",
        "%hybrid_train",
        "opt holds 6 of 6 parameters that are not net's; wanted an optimizer of this model; ",
    ),
    "the same, named": (
        "opt = torch.optim.Adam(net.parameters())\nnet = make_net()",
        "%hybrid_train --optimizer opt",
        "opt holds 6 of 6 parameters that are not net's; wanted an optimizer of this model; ",
    ),
    "an optimizer partly of others": (
        "extra = nn.Parameter(torch.zeros(3))\nopt = torch.optim.Adam([*net.parameters(), extra])",
        "%%hybrid_train" + STEP,
        "opt holds 1 of 7 parameters that are not net's; wanted an optimizer of this model; ",
    ),
    "two optimizers": (
        "a, b = (torch.optim.SGD(net.parameters(), lr=lr) for lr in (0.1, 0.2))",
        "%hybrid_train",
        "the notebook holds 2 optimizers of net: a (SGD), b (SGD); wanted one; ",
    ),
    "an optimizer that is none": (
        "opt = 'adam'",
        "%hybrid_train --optimizer opt",
        "opt is a str; wanted a torch.optim.Optimizer",
    ),
    "an optimizer with a closure": (
        "opt = torch.optim.LBFGS(net.parameters())",
        "%hybrid_train",
        "opt is LBFGS, which asks for the loss many times a step; wanted ",
    ),
    "a learning rate beside an optimizer": (
        "opt = torch.optim.SGD(net.parameters(), lr=0.1)",
        "%hybrid_train --lr 0.2",
        "--lr 0.2 is for a fresh AdamW, but opt is used and has its own learning rate; ",
    ),
    "a scheduler of another optimizer": (
        (
            "opt = torch.optim.SGD(net.parameters(), lr=0.1)\n"
            "old = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(net.parameters(), lr=0.1), 1)"
        ),
        "%hybrid_train --optimizer opt --scheduler old",
        "the scheduler belongs to another optimizer than the one that trains; ",
    ),
    "two criteria": (
        "a, b = nn.CrossEntropyLoss(), nn.MSELoss()",
        "%hybrid_train",
        "the notebook holds 2 criteria: a (CrossEntropyLoss), b (MSELoss); wanted one; ",
    ),
    "no loader": ("del train_loader", "%hybrid_train", "the notebook holds no DataLoader; wanted "),
    "an empty loader": (
        "train_loader = make_loader(drop_last=True, dataset=TensorDataset(images[:4], labels[:4]))",
        "%hybrid_train",
        "train_loader is empty; wanted at least one batch; ",
    ),
    "an empty list": (
        "batches = []",
        "%hybrid_train net batches",
        "batches is empty; wanted at least one batch; ",
    ),
    "a generator that has ended": (
        "batches = (b for b in [])",
        "%hybrid_train net batches",
        "batches yields nothing; wanted at least one batch; ",
    ),
    "a loader that is none": (
        "batches = 3",
        "%hybrid_train net batches",
        "batches is a int; wanted a DataLoader or an iterable of batches; ",
    ),
    "a loader whose dataset fails": (
        "train_loader = make_loader(Pairs({1: fail}))",
        "%hybrid_train",
        "train_loader failed on its first batch (LookupError: the file of this sample is gone); ",
    ),
    "a generator for two epochs": (
        "batches = (b for b in list(train_loader))",
        "%hybrid_train net batches --epochs 2",
        "batches can be read only once, and --epochs is 2; wanted something that can be read ",
    ),
    "a validation loader that is none": (
        "held_out = 3",
        "%hybrid_train --val held_out",
        "held_out is a int; wanted a DataLoader or an iterable of batches",
    ),
    "a model's name": ("", "%hybrid_train nett", "the notebook has no nett; wanted the name of "),
    "a loader's name": ("", "%hybrid_train net x", "the notebook has no x; wanted the name of "),
    "an option's name": ("", "%hybrid_train --ephocs 3", "there is no option --ephocs; did you "),
    "an option's value": ("", "%hybrid_train --epochs many", "--epochs is 'many'; wanted a whole "),
    "a name for the run": ("", "%hybrid_train -o my-run", "-o is 'my-run'; wanted a name such as "),
    "an option to come": ("", "%hybrid_train --compile", "--compile is not built yet"),
    "a folder forgotten": ("", "%hybrid_train --resume", "--resume is given without --checkpoint "),
    "a seed and a mistake": (
        "",
        "%hybrid_train nett --seed 1",
        "the notebook has no nett; wanted ",
    ),
    "a name to log that is not there": (
        "",
        "%%hybrid_train --log acc" + STEP,
        "--log acc: the cell assigns no acc; wanted ",
    ),
    "a name to log without a step": ("", "%hybrid_train --log acc", "--log is for a step that "),
    "a step that calls backward": (
        "",
        "%%hybrid_train" + STEP + "\nloss.backward()",
        "line 5: no optimizer steps where this backward() is called",
    ),
    "a step without a loss": (
        "",
        "%%hybrid_train\nx, y = batch",
        "line 2: the cell leaves no loss",
    ),
    "a device that is not there": ("", "%hybrid_train --device tpu9", "--device"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_touches_nothing(notebook, mistake):
    setup, cell, told = MISTAKES[mistake]
    assert notebook.run(setup).error is None
    before = notebook.value("fingerprint()")
    assert is_one_line(notebook.run(cell)).startswith(told)
    assert notebook.value("fingerprint()") == before
    assert notebook.value("hm.last_run") is None


@pytest.mark.parametrize(
    ("setup", "cell", "told"),
    [
        (
            "batches = [torch.zeros(4, 4)] * 3",
            "%hybrid_train net batches",
            "a batch of batches is a Tensor; ",
        ),
        (
            "",
            "%%hybrid_train" + STEP + "\nloss = loss.item()",
            "the step gave a float; wanted one ",
        ),
        ("", "%%hybrid_train" + STEP + "\nloss = out", "the step gave a tensor of shape ("),
        ("", "%%hybrid_train\nloss = torch.ones(())", "the step gave a loss without a gradient; "),
        ("", "%%hybrid_train\nNone", "the step gave a NoneType; wanted one number "),
    ],
)
def test_a_mistake_that_the_first_batch_shows_is_one_line_too(notebook, setup, cell, told):
    notebook.run(setup)
    notebook.run("net.eval()")
    before = notebook.value("[weights(net), modes(net)]")
    ran = notebook.run(cell)
    assert ran.error == "UsageError", ran.out
    assert ran.message.startswith(told)
    assert "Traceback" not in ran.out
    assert notebook.value("[weights(net), modes(net)]") == before
    assert notebook.value("no_grads(net)")


def test_a_mistake_leaves_the_run_before_as_the_last_one(notebook):
    notebook.run("%hybrid_train -o run")
    notebook.run("%hybrid_train nett -o other")
    assert notebook.value("[hm.last_run is run, 'other' in globals()]") == [True, False]


# -- errors of the person's own code


@pytest.mark.parametrize(
    ("setup", "cell", "error", "line"),
    [
        (
            "train_loader = make_loader(Pairs({20: fail}))",
            "%%hybrid_train --precision fp32 --batch fixed --micro 8 -o run" + STEP,
            "LookupError",
            'raise LookupError("the file of this sample is gone")',
        ),
        (
            "seen = []",
            "%%hybrid_train --precision fp32 --batch fixed --micro 8 -o run"
            + STEP
            + "\nseen.append(1)\nif len(seen) == 3:\n    1 / 0",
            "ZeroDivisionError",
            "1 / 0",
        ),
        (
            "net.add_module('bad', nn.Linear(7, 7))",
            "%hybrid_train --precision fp32 --micro 8 -o run",
            "RuntimeError",
            "",
        ),
    ],
)
def test_an_error_in_the_persons_code_keeps_its_traceback_and_leaves_a_whole_step(
    notebook, setup, cell, error, line
):
    notebook.run(f"{setup}\nnet[1].eval()\nnet.eval()\nnet[3].train()\nhm_modes = modes(net)")
    ran = notebook.run(cell)
    assert ran.error == error
    assert line in ran.out
    for ours in ("notebook/magics.py", "engine/train.py", "engine/step.py"):
        assert f"{PACKAGE}/{ours}" not in ran.out
    assert notebook.value("modes(net) == hm_modes")
    assert notebook.value("no_grads(net)")
    assert notebook.value("[run.outcome, hm.last_run is run]") == ["failed", True]
    assert error in notebook.value("run.error")
    assert "failed" in ran.out


# -- interrupts


@pytest.mark.parametrize("how", ["interrupt", "press_ctrl_c"])
def test_an_interrupt_leaves_a_whole_step_and_the_run_and_the_next_one_goes_on(notebook, how):
    notebook.run(
        f"train_loader = make_loader(Pairs({{30: {how}}}))\nnet.eval()\n"
        "opt = torch.optim.AdamW(net.parameters())"
    )
    ran = notebook.run(
        "%%hybrid_train --precision fp32 --batch fixed --micro 8 --epochs 3 -o run" + STEP
    )
    assert ran.error == "KeyboardInterrupt"
    assert "KeyboardInterrupt: the run ended at a whole step; hm.last_run holds it" in ran.out
    assert "Traceback" not in ran.out
    assert PACKAGE not in ran.out
    assert notebook.value("[run.outcome, hm.last_run is run]") == ["interrupted", True]
    steps = notebook.value("run.steps")
    assert steps == 3  # while waiting for data nothing is held back
    assert notebook.value("{int(state['step']) for state in opt.state.values()} == {run.steps}")
    assert notebook.value("len(run.history)") == steps
    assert notebook.value("no_grads(net) and not any(modes(net))")
    assert notebook.value("signal.getsignal(signal.SIGINT) is signal.default_int_handler")
    before = notebook.value("weights(net)")
    assert notebook.run("%hybrid_train --micro 8 -o more").error is None
    assert notebook.value("more.outcome") == "finished"
    assert notebook.value("weights(net)") != before
    assert notebook.value("{int(state['step']) for state in opt.state.values()}.pop()") == (
        steps + notebook.value("more.steps")
    )


def test_an_interrupt_inside_a_forward_pass_waits_for_the_step(notebook):
    notebook.run("seen = []\nopt = torch.optim.AdamW(net.parameters())")
    ran = notebook.run(
        "%%hybrid_train --precision fp32 --batch fixed --micro 4 -o run"
        + STEP
        + "\nseen.append(1)\nif len(seen) == 3:\n    press_ctrl_c()"
    )
    assert ran.error == "KeyboardInterrupt"
    assert notebook.value("[run.steps, len(seen)]") == [2, 4]
    assert notebook.value("{int(state['step']) for state in opt.state.values()}.pop()") == 2


def test_a_second_interrupt_does_not_wait_and_still_leaves_a_whole_step(notebook):
    notebook.run("seen, before = [], weights(net)\nopt = torch.optim.AdamW(net.parameters())")
    ran = notebook.run(
        "%%hybrid_train --precision fp32 --batch fixed --micro 4 -o run"
        + STEP
        + "\nseen.append(1)\nif len(seen) == 1:\n    press_ctrl_c(); press_ctrl_c()\n"
        "    seen.append(2)"
    )
    assert ran.error == "KeyboardInterrupt"
    assert notebook.value("[run.steps, seen, weights(net) == before]") == [0, [1], True]
    assert notebook.value("no_grads(net) and len(opt.state) == 0")


def test_an_interrupt_before_the_first_step_says_that_nothing_was_trained(notebook):
    notebook.run("train_loader = make_loader(Pairs({2: press_ctrl_c}))")
    before = notebook.value("[weights(net), modes(net)]")
    ran = notebook.run("%hybrid_train -o run")
    assert ran.error == "KeyboardInterrupt"
    assert "KeyboardInterrupt: nothing had been trained" in ran.out
    assert PACKAGE not in ran.out
    assert notebook.value("[hm.last_run, 'run' in globals()]") == [None, False]
    assert notebook.value("[weights(net), modes(net)]") == before


def test_an_interrupted_step_keeps_no_tensor_alive(notebook):
    notebook.run("held = []")
    notebook.run(
        "%%hybrid_train --precision fp32"
        + STEP
        + "\nheld.append(weakref.ref(out))\nraise KeyboardInterrupt"
    )
    assert notebook.value("[len(held), held[0]() is None]") == [1, True]
