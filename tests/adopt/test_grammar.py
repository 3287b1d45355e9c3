"""Loops put together from idioms at random: the same result as the plain cell, or a refusal."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from setups import MLP

TARGETS = {  # target -> what it needs in the body
    "x, y": "",
    "(x, y)": "",
    "[x, y]": "",
    "batch": "x, y = batch",
    "data": "x = data[0].to(device)\ny = data[1].to(device)",
    "x, *rest": "y = rest[0]",
}
WRAPPERS = [  # (iterable, target round the batch's own)
    ("train_loader", "{}"),
    ("tqdm(train_loader)", "{}"),
    ("enumerate(train_loader)", "i, ({})"),
    ("enumerate(tqdm(train_loader), start=1)", "i, ({})"),
    ("tqdm(enumerate(train_loader), total=len(train_loader))", "i, ({})"),
    ("itertools.islice(train_loader, 4)", "{}"),
    ("zip(range(4), train_loader)", "i, ({})"),
]
FORWARDS = [
    "{loss} = criterion(model(x), y)",
    "out = model(x)\n{loss} = criterion(out, y)",
    "out = model(x)\n{loss} = F.nll_loss(F.log_softmax(out, dim=1), y)",
    "with torch.enable_grad():\n    out = model(x)\n    {loss} = criterion(out, y)",
    "h = F.relu(model.fc1(x))\nout = model.fc2(h)\n{loss} = criterion(out, y)",
    "out = model(x)\nmain = criterion(out, y)\nside = out.pow(2).mean()\n{loss} = main + side / 10",
    "out = model(x)\n{loss} = criterion(out, y)\n{loss} = {loss} + model.fc1.weight.pow(2).mean()",
    "out = model(x)\n{loss} = criterion(out, y)\nif epoch:\n    {loss} = {loss} * 0.5",
    "x = x * 1.5\nx = x.flatten(1)\nout = model(x)\n{loss} = F.cross_entropy(input=out, target=y)",
    "out = model(x)\n{loss} = F.cross_entropy(out, y, reduction='sum') / len(x)",
    "{loss}, out = (lambda o: (criterion(o, y), o))(model(x))",
    "if n < 4:\n    lam = 0.5\n    {loss} = lam * criterion(model(x), y)\n\
else:\n    {loss} = criterion(model(x), y)",
    "warmth *= 0.95\nout = model(x) / warmth\n{loss} = criterion(out, y)",
    "steps += 1\n{loss} = criterion(model(x), y) * min(1.0, steps / 4)",
    "def loss_of(inputs):\n    return criterion(model(inputs), y)\n{loss} = loss_of(x)",
    "terms = {{'ce': criterion(model(x), y)}}\nterms['l1'] = model.fc2.weight.abs().sum() / 100\n\
{loss} = sum(terms.values())",
    "x = -x if coin.pop() else x\n{loss} = criterion(model(x), y)",
    "out = model(x)\n{loss} = sum(criterion(o[None], t[None]) for o, t in zip(out, y)) / len(y)",
]
ZERO = ["opt.zero_grad()", "model.zero_grad()", "opt.zero_grad(set_to_none=True)"]
LOGGING = [
    "running += {loss}.item()",
    "history.append({loss}.item())",
    "hits += (model(x).argmax(1) == y).sum().item()",
    "seen += x.size(0)\nseen_y = y",
    "n += 1\nif n % 2 == 0:\n    print(f'{{n}} {{{loss}.item():.4f}}')",
    "print('%d %.3f' % (n, {loss}), end=' ')",
    "rows.append({{'loss': float({loss}), 'n': len(y), 'mean': x.mean().item()}})",
    "worst = max(worst, {loss}.item())",
    "last = {loss}.detach().clone()",
    "counts = torch.bincount(y, minlength=3)\ntotal_counts += counts",
    "bests = sorted([*bests, {loss}.item()])[:3]",
    "if {loss}.item() < worst_seen:\n    kept_x = x\n    worst_seen = {loss}.item()",
    "with torch.no_grad():\n    for x, y in test_loader:\n        hits += (y == 0).sum().item()",
    "print(f'{{torch.cat([model(x), x], 1).sum().item():.3f}}')",
    "print(type({loss}).__name__, {loss}.requires_grad, x.shape[1])",
    # no name is kept for a gradient: where gradients add up, torch goes on writing into it
    "norms.append(sum(p.grad.norm().item() for p in model.parameters() if p.grad is not None))",
]
CLIPS = [
    "",
    "nn.utils.clip_grad_norm_(model.parameters(), 0.5)",
    "norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)\nnorms.append(norm.item())",
    "nn.utils.clip_grad_value_(model.parameters(), 0.02)",
]
SCHEDULERS = [
    "",
    "lr_scheduler.StepLR(opt, 2, 0.7)",
    "lr_scheduler.LambdaLR(opt, lambda s: 1 / (1 + s))",
]
GUARDS = [
    "",
    "if len(x) < 12:\n    continue",
    "if seen > 40:\n    break",
    "if {loss}.item() < 0.8:\n    print('low')\n    break",
]
START = """
running, hits, seen, n, worst, steps, warmth = 0.0, 0, 0, 0, -math.inf, 0, 2.0
history, rows, norms, bests, worst_seen, coin = [], [], [], [], math.inf, [0, 1] * 20
total_counts = torch.zeros(3, dtype=torch.long)
"""
END = (
    "print(running, hits, seen, n, worst, steps, f'{warmth:.4f}', len(history), len(rows))\n"
    "print(norms, bests, worst_seen, len(coin), total_counts)\n"
)
PLACES = [
    "top",
    "function",
    "later",
    "with",
    "if",
    "try",
    "inner function",
    "class",
    "while",
    "else",
]


def inside(text: str, head: str) -> str:
    return f"{head}\n{textwrap.indent(text, '    ')}"


@st.composite
def loops(draw) -> tuple[str, str]:
    """A cell with a training loop, and the cell after it."""
    loss = draw(st.sampled_from(["loss", "cost", "l"]))
    own, unpack = draw(st.sampled_from(sorted(TARGETS.items())))
    iterable, round_it = draw(st.sampled_from(WRAPPERS))
    zero, place = draw(st.sampled_from(ZERO)), draw(st.integers(0, 4))
    clip, scheduler = draw(st.sampled_from(CLIPS)), draw(st.sampled_from(SCHEDULERS))
    per_batch, guard = draw(st.booleans()), draw(st.sampled_from(GUARDS))
    forward = draw(st.sampled_from(FORWARDS)).format(loss=loss)
    logged = [
        line.format(loss=loss) for line in draw(st.lists(st.sampled_from(LOGGING), max_size=4))
    ]
    early = draw(st.integers(0, len(logged)))  # so many are written before the step
    accumulate = draw(st.sampled_from([1, 1, 1, 2]))
    scale = "" if accumulate == 1 else f"{loss} = {loss} / {accumulate}"
    step = "\n".join([clip, "opt.step()", "sched.step()" if scheduler and per_batch else ""])
    if place == 3:
        step += f"\n{zero}"
    if accumulate > 1:
        step = inside(step.strip("\n") + f"\n{zero}", f"if (n + 1) % {accumulate} == 0:")
        logged = ["n += 1", *[line for line in logged if not line.startswith("n += 1")]]
        early = 0
    guard, late = (guard, "") if "{loss}" not in guard else ("", guard.format(loss=loss))
    body = [
        unpack,
        guard,
        zero if place == 0 and accumulate == 1 else "",
        forward,
        scale,
        zero if place == 1 and accumulate == 1 else "",
        *logged[:early],
        f"{loss}.backward()",
        step,
        *logged[early:],
        late,
    ]
    target = round_it.format(own)
    batches = inside("\n".join(filter(None, body)), f"for {target} in {iterable}:")
    epoch = [
        zero if place == 2 else "",
        "model.train()",
        batches,
        "sched.step()" if scheduler and not per_batch else "",
        "with torch.no_grad():\n    print(epoch, criterion(model(X), Y).item())",
    ]
    epochs = inside("\n".join(filter(None, epoch)), "for epoch in range(2):")
    adam = draw(st.booleans())
    opt = (
        "opt = optim.Adam(model.parameters(), 0.01)"
        if adam
        else "opt = optim.SGD(model.parameters(), 0.1)"
    )
    setup = "\n".join(filter(None, [START.strip(), opt, scheduler and f"sched = {scheduler}"]))
    return placed(draw(st.sampled_from(PLACES)), setup, epochs)


def placed(place: str, setup: str, epochs: str) -> tuple[str, str]:
    whole = f"{setup}\n{epochs}\n{END}"
    match place:
        case "function":
            return inside(
                whole, "def fit(model, train_loader):"
            ) + "\nfit(model, train_loader)\n", ""
        case "later":
            return inside(whole, "def fit(model, train_loader):"), "fit(model, train_loader)"
        case "inner function":
            inner = inside(whole, "def fit():") + "\nfit()"
            return inside(inner, "def outer():") + "\nouter()\n", ""
        case "class":
            method = inside(inside(whole, "def fit(self):"), "class Trainer:")
            return method + "\nTrainer().fit()\n", ""
        case "while":
            return f"{setup}\nepoch = 0\n{counted(epochs)}\n{END}", ""
        case "else":
            blocks = epochs + "\nelse:\n    print('all epochs')"
            return f"{setup}\n{blocks}\n{END}", ""
        case "with":
            return f"{setup}\n{inside(epochs, 'with torch.enable_grad():')}\n{END}", ""
        case "if":
            return f"{setup}\n{inside(epochs, 'if len(train_loader) > 1:')}\n{END}", ""
        case "try":
            blocks = (
                inside(epochs, "try:") + "\nexcept KeyboardInterrupt:\n    print('interrupted')"
            )
            return f"{setup}\n{blocks}\n{END}", ""
    return whole, ""


def counted(epochs: str) -> str:
    """Return an epoch loop as a while loop."""
    body = epochs.replace("for epoch in range(2):", "while epoch < 2:", 1)
    return body + "\n    epoch += 1"


def holds(twins, examples: int, *, pieces: bool) -> tuple[int, int]:
    """Try `examples` loops; return how many ran and how many were refused."""
    counts = {True: 0, False: 0}

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(loops())
    def try_one(cells):
        source, after = cells
        found = twins.verdict(MLP, source, after, pieces)
        assert found["wrong"] == [], f"{found}\n{source}"
        counts[found["refused"] is None] += 1

    try_one()
    return counts[True], counts[False]


def test_a_loop_of_idioms_gives_the_plain_loops_bits_and_letters_or_is_refused(twins):
    ran, refused = holds(twins, 60, pieces=False)
    assert refused <= ran / 10


@pytest.mark.thorough
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pieces", [False, True])
def test_many_loops_of_idioms_give_the_plain_loops_weights_or_are_refused(twins, pieces):
    ran, refused = holds(twins, 1000, pieces=pieces)
    assert refused <= ran / 10
