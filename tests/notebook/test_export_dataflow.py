"""What a script keeps of a notebook's cells, and where it stands: read off the text alone."""

import textwrap

import pytest

from hybrid_magic.adopt.arranging import arrange
from hybrid_magic.adopt.gathering import gather
from hybrid_magic.adopt.pieces import indented, pieces_of, undefined

IMPORTS = "import torch\nfrom torch import nn"


def gathered(*cells, needed=("model",), namespace=None):
    texts = [textwrap.dedent(cell).strip("\n") for cell in cells]
    pieces = [p for number, text in enumerate(texts, 1) for p in pieces_of(text, number)]
    return gather(pieces, set(needed), "model", namespace or {})


def kept(*cells, **options):
    return [piece.text for piece in gathered(*cells, **options).kept]


def test_the_newest_value_counts_and_what_it_is_made_from():
    cells = "a = 1\nmodel = Old(a)", "b = 2\nc = b + 1", "model = New(c)", "later = model"
    assert kept(*cells) == ["b = 2", "c = b + 1", "model = New(c)"]


def test_a_value_made_from_its_own_old_one_keeps_both():
    assert kept("model = load()", "model = model / 255") == [
        "model = load()",
        "model = model / 255",
    ]


@pytest.mark.parametrize(
    "change",
    [
        "model.fc = nn.Linear(2, 2)",
        "model.layers[0] = None",
        "model.load_state_dict(weights)",
        "_ = model.load_state_dict(weights)",
        "_ = model.apply(init)",
        "model.to('cuda')",
        "model.train()",
        "nn.init.zeros_(model.fc.weight)",
        "del model.head",
        "with torch.no_grad():\n    model.fc.weight.fill_(1)",
        "for p in model.parameters():\n    p.requires_grad = False",
        "for m in model.modules():\n    nn.init.ones_(m.weight)",
        "if True:\n    model.fc.weight.data *= 2",
        "register(model)",
        "nn.utils.parametrizations.weight_norm(model.fc)",
    ],
)
def test_what_changes_the_model_in_place_is_kept(change):
    made = "model = Net()"
    assert kept("import torch\nfrom torch import nn", made, change)[-2:] == [made, change]


@pytest.mark.parametrize(
    "telling",
    [
        "print(model)",
        "display(model)",
        "out = model(x)",
        "plt.plot(model.curve)",
        "plt.rcParams['figure.dpi'] = 90",
        "torch.save(model.state_dict(), 'w.pt')",
        "torchinfo.summary(model)",
        "show_grid(model)",
        "model.summary()",
        "model.zero_grad()",
        "torch.cuda.empty_cache()",
        "total = sum(p.numel() for p in model.parameters())",
        "for p in model.parameters():\n    total += p.numel()",
        "with torch.no_grad():\n    model.eval()\n    for x in xs:\n        n += model(x).sum()",
    ],
)
def test_what_only_tells_is_left_out(telling):
    head = IMPORTS + "\nimport matplotlib.pyplot as plt\nimport torchinfo"
    assert telling not in kept(head, "total, xs, x = 0, [], 1\nmodel = Net()", telling)


def test_a_part_that_is_changed_after_it_went_into_the_model_is_kept():
    cells = "body = Body()", "model = Net(body)", "for p in body.parameters():\n    p.grad = None"
    assert len(kept(*cells)) == 3


def test_another_name_for_a_part_is_the_part():
    cells = "model = Net()", "head = model.head", "head.bias = None", "other = Net()\nother.x = 1"
    assert kept(*cells) == ["model = Net()", "head = model.head", "head.bias = None"]


def test_a_function_reads_its_globals_as_they_are_when_it_is_called():
    cells = "def make():\n    return Net(width)", "width = 8", "model = make()", "depth = 2"
    assert kept(*cells) == [*cells[:3]]


def test_each_call_sees_the_globals_of_its_time():
    cells = (
        "def make():\n    return Net(width)",
        "width = 8\nbody = make()",
        "width = 16\nmodel = make(), body",
    )
    assert kept(*cells) == [
        cells[0], "width = 8", "body = make()", "width = 16", "model = make(), body"
    ]  # fmt: skip


def test_a_function_defined_anew_after_its_use_does_not_count():
    cells = "def make():\n    return 1", "model = make()", "def make():\n    return 2"
    assert kept(*cells) == [*cells[:2]]


def test_a_function_that_is_called_while_it_trains_sees_the_newest_globals():
    cells = "def collate(b):\n    return vocab", "model = Loader(collate)", "vocab = {}"
    assert kept(*cells) == [*cells]


def test_a_class_reads_its_own_names_first():
    cell = "class Net:\n    width = 8\n    depth = width\n    def f(self):\n        return torch"
    found = gathered("import torch", cell, "model = Net()")
    assert len(found.kept) == 3
    assert found.missing == set()


@pytest.mark.parametrize(
    ("function", "stays"),
    [
        ("def f(net):\n    net.bias = 0", True),
        ("def f(net):\n    for m in net.modules():\n        nn.init.zeros_(m.weight)", True),
        ("def g(m):\n    m.x = 1\ndef f(net):\n    g(net)", True),
        ("def f(net):\n    net.eval()\n    return net(1)", False),
        ("def f(net):\n    axes = plt.subplots(len(net))\n    axes[0].set_title('x')", False),
        ("def f(net):\n    net = dict(net)\n    print(net)", False),
    ],
)
def test_a_function_of_the_notebook_is_called_when_it_changes_what_it_is_given(function, stays):
    assert ("f(model)" in kept(IMPORTS, function, "model = Net()", "f(model)")) is stays


def test_of_seeds_in_a_row_the_last_of_each_kind_is_kept():
    head = "import random\nimport torch\nrandom.seed(1)\ntorch.manual_seed(1)"
    cells = head, "torch.manual_seed(2)", "model = Net()", "torch.manual_seed(3)"
    found = kept(*cells)
    assert found[2:] == [
        "random.seed(1)", "torch.manual_seed(2)", "model = Net()", "torch.manual_seed(3)"
    ]  # fmt: skip


def test_a_function_that_seeds_is_called():
    function = "import torch\ndef fix(n):\n    torch.manual_seed(n)"
    assert kept(function, "fix(3)", "model = Net()")[2:] == ["fix(3)", "model = Net()"]


@pytest.mark.parametrize(
    ("between", "drew"),
    [
        ("print(len(data))", []),
        ("n = len(data)", []),
        ("show(data)", ["cell [2], line 1"]),
        ("x = torch.rand(3)", ["cell [2], line 1"]),
        ("other = Net()", ["cell [2], line 1"]),
        ("for x in data:\n    pass", ["cell [2], line 1"]),
        ("x = torch.rand(3)\ntorch.manual_seed(1)", []),
    ],
)
def test_what_may_have_drawn_after_a_seed_is_named(between, drew):
    found = gathered("import torch\ndata = [1]\ntorch.manual_seed(0)", between, "model = Net()")
    assert [piece.place for piece in found.drew] == drew


@pytest.mark.parametrize(
    "training",
    [
        "for x in xs:\n    model(x).backward()\n    model.step()",
        "fit(model)",
        "log = fit(model)",
        "trainer = Trainer(model)\ntrainer.run()",
        "hm.train(model, xs)",
    ],
)
def test_other_trainings_are_left_out_and_named(training):
    head = """
    import hybrid_magic as hm
    def fit(net):
        net.loss.backward()
    class Trainer:
        def __init__(self, net):
            self.net = net
        def run(self):
            fit(self.net)
    """
    found = gathered(head, "model, xs = Net(), []", training)
    assert [piece.text for piece in found.kept] == ["model, xs = Net(), []"]
    assert len(found.trained) == 1


def test_a_training_of_what_was_made_anew_since_is_not_named():
    assert gathered("model = Net()", "model.loss.backward()", "model = Net()").trained == []


def test_a_name_that_nothing_makes_is_missing():
    assert gathered("model = Net(width)").missing == {"Net", "width"}


def test_the_text_is_the_persons_own():
    cell = """
    # the net
    # that we train
    @decorate  # once
    class Net:
        pass


    a = 1; model = (  # two
        Net(a),  # three
    )
    """
    decorated = "# the net\n# that we train\n@decorate  # once\nclass Net:\n    pass"
    assert kept(cell) == [decorated, "a = 1", "model = (  # two\n    Net(a),  # three\n)"]


# -- where it stands


def arranged(*cells, needed=("model",)):
    found = arrange(gathered(*cells, needed=needed).kept, set(needed))
    return found.imports, [p.text for p in found.module], [p.text for p in found.main]


def test_definitions_and_constants_stand_in_the_module_and_the_rest_in_main():
    cells = "x = load()", "SIZE = 3\ndef make(x):\n    return x * SIZE", "model = make(x)"
    assert arranged(*cells) == (
        [],
        ["SIZE = 3", "def make(x):\n    return x * SIZE"],
        ["x = load()", "model = make(x)"],
    )


def test_what_functions_read_stands_in_the_module_with_all_that_was_run_before():
    cells = "seed(0)\ndata = load()", "def make():\n    return data", "model = make()"
    _, module, main = arranged(*cells)
    assert module == ["seed(0)", "data = load()", "def make():\n    return data"]
    assert main == ["model = make()"]


def test_a_function_that_is_defined_twice_stays_in_its_place():
    cells = "def f():\n    return 1", "a = f()", "def f():\n    return 2", "model = f(), a"
    _, module, main = arranged(*cells)
    assert [*module, *main] == [*cells]


def test_a_name_of_the_module_is_not_changed_in_main():
    cells = "x = load()", "def f():\n    return x", "y = f()", "x = x + 1", "model = x, y"
    _, module, main = arranged(*cells)
    assert module[-1] == "x = x + 1"
    assert main == ["model = x, y"]


def test_imports_stand_first_once_and_only_what_is_needed_of_them():
    cells = (
        "import torch\nfrom a import b, c  # both",
        "x = torch.rand(b)",
        "import torch\nfrom __future__ import annotations",
        "model = torch.rand(x) if annotations else 0",
    )
    imports, *_ = arranged(*cells)
    assert imports == ["from __future__ import annotations", "import torch", "from a import b"]


def test_a_class_that_draws_where_it_stands_keeps_its_place():
    cells = "seed(0)\nx = load()", "class Net:\n    mask = torch.rand(3)", "model = Net(x)"
    assert arranged(*cells)[1] == ["seed(0)", "x = load()", "class Net:\n    mask = torch.rand(3)"]


def test_an_import_stays_below_what_it_depends_on():
    cells = 'import os\nos.environ["X"] = "1"\nimport torch', "model = torch.rand(os.n)"
    imports, module, main = arranged(*cells)
    assert imports == ["import os"]
    assert [module, main] == [
        [],
        ['os.environ["X"] = "1"', "import torch", "model = torch.rand(os.n)"],
    ]


# -- the words


def test_lines_inside_strings_stay_where_they_are():
    text = 'a = """one\ntwo"""\nb = (1 +\n     2)\n\nc = f"""{a}\nx"""'
    moved = indented(text)
    assert moved == '    a = """one\ntwo"""\n    b = (1 +\n         2)\n\n    c = f"""{a}\nx"""'
    scope = {}
    exec(f"def f():\n{moved}\n    return a, b, c", scope)
    assert scope["f"]() == ("one\ntwo", 3, "one\ntwo\nx")


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("def f(a):\n    return a + b", {"b"}),
        ("def f():\n    b = 1\n    return b", set()),
        ("class A:\n    x = 1\n    y = x + z", {"z"}),
        ("n = [i + k for i in range(3)]", {"k"}),
        ("import os.path as p\np.join", set()),
        ("def main():\n    x = 1\ndef g():\n    return x", {"x"}),
        ("x: int = 1\nx += 1", set()),
    ],
)
def test_a_name_that_a_program_never_makes_is_found(text, lost):
    assert undefined(text, {"range", "int"}) == lost


def test_the_kinds_of_names_are_read_off_the_notebook():
    text = "model = Net(n)", "n = 3\nn += 1", "model.freeze()"
    assert kept("n = 1", *text, namespace={"n": 3})[:2] == ["n = 1", "model = Net(n)"]
