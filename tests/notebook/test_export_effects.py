"""What a script keeps of statements that change things otherwise than by a name of theirs: in
functions, through loops and decorators, by text. Read off the text alone."""

import textwrap

import pytest
from test_export_dataflow import gathered, kept

from hybrid_magic.adopt.pieces import pieces_of


class Module:
    """Stands in for a network of the notebook's namespace."""


def gone(*cells, **options):
    """Return the statements that are left out."""
    texts = [textwrap.dedent(cell).strip("\n") for cell in cells]
    every = [p.text for number, text in enumerate(texts, 1) for p in pieces_of(text, number)]
    return [text for text in every if text not in kept(*cells, **options)]


FREEZE = "def freeze():\n    for p in model.parameters():\n        p.requires_grad = False"
VOCAB = """
class Vocab:
    def __init__(self):
        self.ids = {}
    def count(self, values):
        for value in values:
            self.ids.setdefault(value, len(self.ids))
        return len(self.ids)
    def shown(self):
        return list(self.ids)
"""
SCALER = "class Scaler:\n    def fit(self, x):\n        self.mean = x.mean()"
AGENT = "class Agent:\n    def update(self, loss):\n        loss.backward()"
PATCH = "def to(kind):\n    def put(o):\n        setattr(kind, o.__name__, o)\n    return put"
EVERY_STATEMENT = {
    "a function freezes the global": (FREEZE, "model = Net()", "freeze()"),
    "a function fills the global": (
        "def build():\n    for w in words:\n        vocab.setdefault(w, 1)",
        "words, vocab = [], {}", "build()", "model = Net(vocab)",
    ),
    "a function shuffles what it is given": (
        "import random\ndef mix(items):\n    random.shuffle(items)", "order = [1]", "mix(order)",
        "model = Net(order)",
    ),
    "a function gives a global its value": (
        "lr = 1\ndef higher():\n    global lr\n    lr = 5", "higher()", "model = Net(lr)",
    ),
    "a function makes a global": ("def make():\n    global model\n    model = Net()", "make()"),
    "a function sets an attribute by its name": (
        "def put(m):\n    for n, c in m.named_children():\n        setattr(m, n, c)",
        "model = Net()", "put(model)",
    ),
    "a function calls itself": (
        "def put(m):\n    for n, c in m.named_children():\n        setattr(m, n, c); put(c)",
        "model = Net()", "put(model)",
    ),
    "functions call each other": (
        "def a(m):\n    b(m)\ndef b(m):\n    m.x = 1\n    a(m)", "model = Net()", "a(model)",
    ),
    "only one of what it is given is changed": (
        "def put(a, b):\n    b.x = a", "model = Net()", "put(1, model)",
    ),
    "a layer is put in, then changed": (
        "model, head = Net(), Head()", "model[2] = head", "head.weight.fill_(1)",
    ),
    "a layer is added, then changed": (
        "model, head = Net(), Head()", "model.add_module('x', head)", "head.bias = None",
    ),
    "a list grows, then its part changes": (
        "layers = []", "head = Head()", "layers.append(head)", "model = Net(*layers)",
        "head.bias = None",
    ),
    "a dict is filled, then its part changes": (
        "data, x = {}, load()", "data['x'] = x", "x -= 1", "model = Net(data)",
    ),
    "a method of its class": (
        "class Net:\n    pass", "model = Net()", "def forward(self):\n    pass",
        "Net.forward = forward",
    ),
    "an attribute of its class": ("class Cfg:\n    lr = 1", "cfg = Cfg()", "Cfg.lr = 2",
                                  "model = Net(cfg)"),
    "a decorator that adds to a class": (
        PATCH, "class Net:\n    pass", "@to(Net)\ndef forward(self):\n    pass", "model = Net()",
    ),
    "a registry": (
        "MODELS = {}\ndef register(f):\n    MODELS[f.__name__] = f\n    return f",
        "@register\ndef small():\n    return 1", "model = MODELS['small']()",
    ),
    "each of several": ("train, test = load(), load()",
                        "for df in (train, test):\n    df.drop(columns=['id'], inplace=True)",
                        "model = Net(train)"),
    "each layer": ("model = Net()", "for m in model.children():\n    m.reset_parameters()"),
    "each group": ("model = Net()", "for i, g in enumerate(model.groups):\n    g.update(lr=1)"),
    "a comprehension": ("model = Net()", "[p.requires_grad_(False) for p in model.parameters()]"),
    "a comprehension of calls": ("model = Net()", "[g.update(lr=1) for g in model.groups]"),
    "the parts of a list": ("model = Net()", "list(model.children())[0].requires_grad_(False)"),
    "the next part": ("model = Net()", "next(model.parameters()).requires_grad = False"),
    "a part by its name": ("model = Net()", "getattr(model, '0').weight.data.fill_(1)"),
    "modes of layers": (
        "model = Net()", "for m in model.modules():\n    if m.norm:\n        m.eval()",
    ),
    "a fit of an own class": (SCALER, "s = Scaler()", "s.fit(1)", "model = Net(s)"),
    "a tokenizer is trained": ("from tokenizers import Tokenizer", "tok = Tokenizer()",
                               "tok.train(['t.txt'], 3)", "model = Net(tok)"),
    "a fit without a name": ("from sklearn.feature_selection import SelectKBest",
                             "best = SelectKBest(k=3).fit(1, 2)", "model = Net(best)"),
    "a seed with a result": ("import torch", "_ = torch.manual_seed(7)", "model = Net()"),
    "a hook with a handle": ("model = Net()", "h = model[0].register_forward_hook(print)"),
    "a method that looks like looking": (VOCAB, "v = Vocab()", "v.count([1])", "model = Net(v)"),
    "a method with a result": (VOCAB, "v = Vocab()", "n = v.count([1])", "model = Net(v)"),
    "another type": ("model = Net()", "model.type(torch.float64)"),
    "a function that was imported": (
        "from torch import set_default_dtype, nn", "set_default_dtype(1)", "model = nn.Linear(1, 1)"
    ),
    "a layer whose name is a number later": (
        "model = Net()", "layer = model[2]", "layer.weight.data.zero_()", "n = layer = 3",
        "model.n = layer",
    ),
    "the path of modules": ("import sys", "sys.path.append('lib')", "model = Net()"),
    "the folder": ("import os", "os.chdir('data')", "model = Net()"),
    "a method of pandas": ("from tqdm import tqdm", "tqdm.pandas()", "model = Net()"),
    "functions without an end": (
        "def even(n):\n    return odd(n)\ndef odd(n):\n    return even(n)", "model = even(2)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("cells", EVERY_STATEMENT.values(), ids=EVERY_STATEMENT)
def test_every_statement_is_kept_that_changes_what_the_model_is(cells):
    namespace = {"layer": 3, "n": 3, "lr": 5, "cfg": {}, "model": Module()}
    assert gone(*cells, namespace=namespace) == []


@pytest.mark.parametrize(
    "cells",
    [
        (VOCAB + "\nv = Vocab()\nmodel = Net(v)", "print(v.shown())"),
        ("def f(a, b):\n    b.x = a", "other, model = Other(), Net()", "f(model, other)"),
        ("import matplotlib.pyplot as plt\nmodel = Net()", "fig, axes = plt.subplots(2)",
         "for i, ax in enumerate(axes):\n    ax.imshow(model[i])\n    ax.axis('off')",
         "for ax, (img, y) in zip(axes, model):\n    ax.imshow(img)\n    ax.set_title(y)"),
        ("model = Net()", "import os, tempfile", "os.chdir(tempfile.mkdtemp())"),
        ("import torch\nlosses, model = [], Net()", "losses.append(model(1).item())"),
        ("def even(n):\n    return odd(n)\ndef odd(n):\n    return even(n)\nmodel = Net()",
         "even(3)"),
    ],
)  # fmt: skip
def test_what_changes_something_else_is_left_out(cells):
    assert cells[-1] in gone(*cells, namespace={"losses": [], "other": 1.5})


@pytest.mark.parametrize(
    "statement",
    [
        "for p in xs:\n    model.x = p",
        "for p in xs: model.x = p",
        "for n, p in xs:\n    if n:\n        p.x = 1\n        model.x = p",
        "for i in range(3):\n    q = i\n    model.x = q",
        "with open('c') as file:\n    model.x = file.read()",
        "try:\n    model.x = 1\nexcept OSError as error:\n    print(error)",
        "model.x = [n for v in xs if (n := v + 1)]",
        "if (n := len(xs)) > 3:\n    model.x = n",
        "while (n := xs.next()):\n    model.x = n",
        "match xs:\n    case [first, *rest]:\n        model.x = first, rest",
    ],
)
def test_the_names_that_a_statement_makes_for_itself_are_not_missing(statement):
    builtin = {"open", "OSError", "print", "len", "range", "load", "Net"}
    assert gathered("xs = load()\nmodel = Net()", statement).missing <= builtin
    again = gathered("xs = load()\nmodel = Net()", statement, statement)
    assert [piece.text for piece in again.kept][-2:] == [statement, statement]
    assert again.missing <= builtin


def test_lines_are_counted_as_python_counts_them():
    cell = "# page\x0c 3\n# copied\u2028text\nlr = 0.1\nlr = 0.5\r\nmodel = Net(lr)"
    assert kept(cell) == ["lr = 0.5", "model = Net(lr)"]


def test_a_name_that_is_deleted_is_a_builtin_again():
    assert kept("list = [1]", "del list", "model = list(3)") == ["model = list(3)"]


@pytest.mark.parametrize(
    ("cell", "place"),
    [
        ("model = globals()['Net']()", 1),
        ("model = eval('Net')()", 1),
        ("def make():\n    return eval('Net')()\nmodel = make()", 1),
        ("exec('lr = 5')\nmodel = Net()", 1),
        ("globals()['lr'] = 5\nmodel = Net()", 1),
        ("globals().update(lr=5)\nmodel = Net()", 1),
        ("model = Net()\nmodel.eval()\nprint(globals())", None),
    ],
)
def test_what_reaches_names_by_their_text_is_known(cell, place):
    assert [piece.line for piece in gathered(cell).unseen] == [place] * (place is not None)


def test_a_sample_of_a_data_set_may_draw():
    class Dataset:
        pass

    class TensorDataset(Dataset):
        pass

    for kind, drew in ((Dataset, 1), (TensorDataset, 0), (list, 0)):
        cells = "import torch\ntorch.manual_seed(0)\nxs = load()", "x, y = xs[0]", "model = Net(xs)"
        assert len(gathered(*cells, namespace={"xs": kind()}).drew) == drew


def test_an_update_is_no_training_where_only_another_class_trains_in_its_own():
    cells = "cfg = {}", "cfg.update(lr=5)", "model = Net(cfg)"
    assert kept(AGENT, *cells, namespace={"cfg": {}}) == [*cells]
    found = gathered(AGENT, "model = Net()", "agent = Agent(model)", "agent.update(1)")
    assert [piece.text for piece in found.trained] == ["agent.update(1)"]
