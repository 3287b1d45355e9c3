"""What an error held is given back, what others hold is left alone, and a debugger still works.

Every tensor made by `made` is watched by a weak reference; a case fails when one of its own is
alive afterwards while the error still is.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import io
import pdb
import sys
import threading
import types
import weakref

import pytest
import torch

from hybrid_magic.engine import letting_go
from hybrid_magic.engine.letting_go import let_go

WATCHED: list[weakref.ref] = []
KEPT: list = []


@pytest.fixture(scope="module", autouse=True)
def _what_was_there_before_is_not_searched():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_watched():
    WATCHED.clear()
    KEPT.clear()
    yield
    KEPT.clear()


def made(*shape: int) -> torch.Tensor:
    tensor = torch.ones(*(shape or (3,)), requires_grad=True) * 2
    WATCHED.append(weakref.ref(tensor))
    return tensor


def alive() -> int:
    return sum(each() is not None for each in WATCHED)


def fail(*_, **__):
    raise RuntimeError("as it happens")


class Holder:
    def __init__(self, value) -> None:
        self.value = value

    def work(self):
        fail()


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value) -> None:
        self.value = value


class Word(str):
    pass


class Output(collections.OrderedDict):
    """As a Transformers model gives: its items are its attributes, too."""

    def __init__(self, **items) -> None:
        super().__init__(items)
        self.__dict__.update(items)


Pair = collections.namedtuple("Pair", "x y")


def a_local():
    x = made(32, 10)
    fail(x)


def an_argument():
    fail(made())


def deep_arguments():
    def down(x, left):
        return down(x + 0, left - 1) if left else fail()

    down(made(), 20)


def containers():
    listed, keyed, key = [[made()]], {"a": {"b": made()}}, {made(): 1}
    several, pair, ringed = {made()}, Pair(made(), 1), []
    ringed.append((ringed, made()))
    queue, by_default = collections.deque([made()]), collections.defaultdict(list, a=[made()])
    many = [made() for _ in range(40)]
    fail(listed, keyed, key, several, pair, ringed, queue, by_default, many)


def objects():
    word = Word("plain to see")
    word.value = made()
    only_there = made()
    by_default = lambda x=only_there: x
    del only_there
    own, slotted, output = Holder(made()), Slotted(made()), Output(logits=made())
    layer = torch.nn.Linear(2, 2)
    WATCHED.append(weakref.ref(layer.weight))
    method, builtin, part = own.work, made().mul, functools.partial(fail, made())
    iterator, mapped = iter([made()]), map(made().add, [1])
    fail(own, slotted, output, layer, method, builtin, part, iterator, mapped, by_default)


def a_method():
    Holder(made()).work()


def graphs():
    x = made()
    loss = (x * x).sum()
    WATCHED.append(weakref.ref(loss))
    node = loss.grad_fn
    del x
    fail(node)


def backward():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, made())
            ctx.extra = made()
            return x * 1

        @staticmethod
        def backward(ctx, *gradients):
            saved = ctx.saved_tensors
            fail(saved)

    x = made()
    loss = Bad.apply(x * x).sum()
    loss.backward()


def a_hook():
    x = made()
    y = x * x
    y.register_hook(lambda gradient: fail(gradient, x))
    y.sum().backward()


def a_closure():
    x = made()

    def inner():
        return fail(x)

    inner()


def a_closure_that_writes():
    x = y = None

    def inner():
        nonlocal x, y
        x = y = made()
        fail()

    inner()


def a_closure_of_a_function_that_has_returned():
    def make():
        x = made()
        return lambda: fail(x)

    make()()


def a_closure_that_calls_itself():
    x = made()

    def walk(left):
        return walk(left - 1) if left else fail(x)

    walk(3)


def closures_that_call_each_other():
    x = made()

    def even(left):
        return odd(left - 1) if left else fail(x)

    def odd(left):
        return even(left - 1)

    even(4)


def an_argument_that_is_shared():
    def outer(x):
        def inner():
            fail(x)

        inner()

    outer(made())


def a_function_in_a_shared_variable():
    x = made()
    work = lambda: fail(x)

    def inner():
        work()

    inner()


def a_comprehension():
    tensors = (made() for _ in range(3))
    return [fail(x) for x in tensors]


def nested_comprehensions():
    return {i: [fail(x, y) for x in [made()]] for i, y in enumerate([made()])}


def a_generator():
    def batches():
        x = made()
        yield x
        fail(x)

    for batch in batches():
        seen = batch
    del seen


def a_waiting_generator():
    def batches():
        x = made()
        while True:
            yield x

    stream = batches()
    next(stream)
    fail()


def a_context():
    @contextlib.contextmanager
    def within():
        x = made()
        yield x

    with within() as x:
        fail(x)


def from_another():
    x = made()
    try:
        an_argument()
    except RuntimeError as error:
        y = made()
        raise ValueError("another") from error
    del x, y


def during_another():
    try:
        a_closure()
    except RuntimeError:
        a_local()


def from_none():
    try:
        a_local()
    except RuntimeError:
        raise ValueError("hidden") from None


def cut_off():
    def between():
        x = made()
        try:
            fail(x)
        except RuntimeError as error:
            raise error.with_traceback(None)  # noqa: B904

    between()


def called_through_one_that_cut_it_off():
    def outer():
        x = made()
        inner()
        del x

    def inner():
        raise RuntimeError

    try:
        outer()
    except RuntimeError as error:
        error.__traceback__ = error.__traceback__.tb_next.tb_next
        raise


def kept_in_variables():
    try:
        a_local()
    except RuntimeError as error:
        found = error
        everything = sys.exc_info()
    fail(found, everything)


def in_a_thread():
    found = []

    def work():
        x = made()
        try:
            fail(x)
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    raise found[0]


def said():
    x = made()
    assert x.sum() < 0, x


def as_an_argument():
    raise ValueError("values", made(), [made()])


def as_an_attribute():
    error = ValueError("values")
    error.logits = made()
    error.more = {"a": made()}
    raise error


def a_wrong_attribute():
    Output(logits=made()).logitz  # noqa: B018


def a_wrong_attribute_of_a_tensor():
    made().sise()


def a_tensor_returned_by_a_generator():
    def inner():
        yield from ()
        return made()

    next(inner())


def a_coroutine():
    async def work():
        x = made()
        await other(x)

    async def other(x):
        fail(x)

    with contextlib.closing(work()) as running:
        running.send(None)


CASES = [
    a_local, an_argument, deep_arguments, containers, objects, a_method, graphs, backward, a_hook,
    a_closure, a_closure_that_writes, a_closure_of_a_function_that_has_returned,
    a_closure_that_calls_itself, closures_that_call_each_other, an_argument_that_is_shared,
    a_function_in_a_shared_variable, a_comprehension, nested_comprehensions, a_generator,
    a_waiting_generator, a_context, from_another, during_another, from_none, cut_off,
    called_through_one_that_cut_it_off, kept_in_variables, in_a_thread, said, as_an_argument,
    as_an_attribute, a_wrong_attribute, a_wrong_attribute_of_a_tensor,
    a_tensor_returned_by_a_generator, a_coroutine,
]  # fmt: skip


def error_of(case) -> BaseException:
    try:
        case()
    except BaseException as error:  # noqa: BLE001 - the cases raise whatever they like
        found = error
    return found


def frames_of(error: BaseException) -> dict[str, types.FrameType]:
    frames, traceback = {}, error.__traceback__
    while traceback is not None:
        frames[traceback.tb_frame.f_code.co_name] = traceback.tb_frame
        traceback = traceback.tb_next
    return frames


@pytest.mark.parametrize("seen", [False, True], ids=["at once", "after it was shown"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nothing_lives_that_only_the_error_held(case, seen):
    error = error_of(case)
    gc.collect()
    assert alive(), "the case itself holds nothing: it shows nothing"
    if seen:  # showing an error, and a debugger, read the variables, which copies them (T3)
        for each in letting_go._chain([error]):
            for frame in frames_of(each).values():
                dict(frame.f_locals)
    freed = let_go(error)
    assert alive() == 0
    assert freed > 0
    assert let_go(error) == 0, "a second time there is nothing left to give back"


@pytest.mark.skipif(sys.version_info < (3, 13), reason="there a frame keeps a copy, too")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_where_variables_cannot_be_overwritten_they_go_altogether(case, monkeypatch):
    """As on Python 3.14, where a frame keeps what is overwritten in it."""
    monkeypatch.setattr(letting_go, "_CAN_OVERWRITE", False)
    error = error_of(case)
    assert let_go(error) > 0
    assert alive() == 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ExceptionGroup is there from 3.11 on")
def test_the_errors_of_a_group_are_let_go_of():
    inner = [error_of(a_local), error_of(a_closure)]
    group = ExceptionGroup("several", [*inner, ExceptionGroup("more", [error_of(said)])])  # noqa: F821
    del inner
    assert let_go(group) > 0
    assert alive() == 0


def test_a_traceback_alone_is_let_go_of():
    traceback = error_of(a_local).__traceback__
    assert let_go(traceback) > 0
    assert alive() == 0


def test_no_error_is_no_work():
    assert let_go(None) == 0


def test_errors_that_hold_each_other_end():
    one, other = error_of(a_local), error_of(a_closure)
    one.__context__, other.__cause__ = other, one
    assert let_go(one) > 0
    assert alive() == 0


def step_with_plain_values():
    rate, name, sizes, device = 0.1, "adam", [32, 10], torch.device("cpu")
    logits = made(32, 10)
    items = [logits]
    fail(rate, name, sizes, device, items)


def test_plain_values_stay_and_the_others_are_described():
    error = error_of(step_with_plain_values)
    let_go(error)
    values = frames_of(error)["step_with_plain_values"].f_locals
    assert (values["rate"], values["name"], values["sizes"]) == (0.1, "adam", [32, 10])
    assert values["device"] == torch.device("cpu")
    assert repr(values["logits"]) == "<Tensor float32 [32, 10] on cpu, given back>"
    assert repr(values["items"]) == "<list of 1, given back>"


def test_a_debugger_walks_the_frames_and_shows_them():
    error = error_of(step_with_plain_values)
    let_go(error)
    asked = "p x\nup\np rate\np sizes\np logits\nlist\np nothing\ndown\nwhere\nquit\n"
    printed = io.StringIO()
    debugger = pdb.Pdb(stdin=io.StringIO(asked), stdout=printed, nosigint=True, readrc=False)
    debugger.use_rawinput = False
    debugger.reset()
    debugger.interaction(None, error.__traceback__)
    text = printed.getvalue()
    assert "0.1" in text
    assert "[32, 10]" in text
    assert "<Tensor float32 [32, 10] on cpu, given back>" in text
    assert "logits = made(32, 10)" in text  # list
    assert 'raise RuntimeError("as it happens")' in text
    assert alive() == 0


def test_what_lives_elsewhere_stays_in_the_frames():
    model, trainer, data = torch.nn.Linear(2, 2), Holder(None), torch.utils.data.TensorDataset()

    def step(model, trainer, data, function):
        x = made()
        fail(x)

    error = error_of(lambda: step(model, trainer, data, fail))
    let_go(error)
    values = frames_of(error)["step"].f_locals
    assert values["model"] is model
    assert values["trainer"] is trainer
    assert values["data"] is data
    assert values["function"] is fail
    assert alive() == 0


def test_what_a_living_function_shares_is_left_alone():
    def step():
        x, y = made(), made()

        def hook():
            return x

        KEPT.append(hook)  # as a hook that a step leaves on the model
        fail(y)

    error = error_of(step)
    let_go(error)
    assert alive() == 1
    assert torch.is_tensor(KEPT[0]())
    KEPT.clear()
    let_go(error)
    assert alive() == 0, "and goes when the function is gone"


def test_what_a_living_function_reaches_through_another_is_left_alone():
    def step():
        x = made()

        def inner():
            return x

        def outer():
            return inner()

        KEPT.append(outer)
        inner_fails(inner)

    def inner_fails(function):
        function()
        fail()

    let_go(error_of(step))
    assert torch.is_tensor(KEPT[0]())


def test_the_variables_of_enclosing_functions_that_live_are_left_alone():
    x = made()  # of this function, which runs

    def step():
        y = x + 1
        fail(y, x)

    error = error_of(step)
    let_go(error)
    assert torch.is_tensor(x)
    assert frames_of(error)["step"].f_locals["x"] is x


def test_a_function_that_failed_can_be_called_again():
    def make():
        x = made()

        def step(good):
            return x if good else fail(x)

        return step

    step = make()
    let_go(error_of(lambda: step(False)))
    assert torch.is_tensor(step(True))


def test_frames_that_run_keep_their_variables():
    def work():
        x = made()
        try:
            fail(x)
        except RuntimeError as error:
            let_go(error)
            return torch.is_tensor(x)

    assert work()


def test_frames_that_run_in_another_thread_keep_their_variables():
    failed, go_on, answer = threading.Event(), threading.Event(), []

    def work():
        x = made()
        try:
            fail(x)
        except RuntimeError as error:
            answer.append(error)
        failed.set()
        go_on.wait(10)
        answer.append(torch.is_tensor(x))

    thread = threading.Thread(target=work)
    thread.start()
    failed.wait(10)
    let_go(answer[0])
    go_on.set()
    thread.join()
    assert answer[1] is True


def test_a_generator_that_goes_on_keeps_its_variables():
    def batches():
        x = made()
        while True:
            try:
                fail(x)
            except RuntimeError as error:
                yield error
            yield x

    stream = batches()
    error = next(stream)
    let_go(error)
    assert torch.is_tensor(next(stream))


def test_the_names_of_modules_and_cells_are_left_alone():
    """A cell's own names are the notebook's, and a class body's are the class's."""
    x = made()
    namespace = {"x": x, "fail": fail}
    error = error_of(lambda: exec(compile("y = x + 1\nfail(y)", "cell", "exec"), namespace))
    assert let_go(error) == 0 or torch.is_tensor(namespace["y"])
    assert torch.is_tensor(namespace["x"])
    assert torch.is_tensor(namespace["y"])


def test_an_error_says_the_same_as_before():
    for case in (said, as_an_argument, a_wrong_attribute_of_a_tensor):
        error = error_of(case)
        before = str(error), type(error), len(error.args)
        let_go(error)
        assert (str(error), type(error), len(error.args)) == before


def test_a_wrong_attribute_still_gets_its_suggestion():
    import traceback

    error = error_of(lambda: Holder(made()).wonk)
    before = "".join(traceback.format_exception_only(type(error), error))
    assert "Did you mean: 'work'" in before or sys.version_info < (3, 12)  # C code shows it there
    let_go(error)
    assert alive() == 0
    assert "".join(traceback.format_exception_only(type(error), error)) == before


def test_values_are_never_asked_anything():
    class Touchy:
        def __getattribute__(self, name):
            raise AssertionError(f"asked for {name}")

        def __repr__(self):
            raise AssertionError("shown")

        __eq__ = __len__ = __bool__ = __hash__ = __repr__

    def step():
        touchy, x = Touchy(), made()
        fail(touchy, [touchy], {"a": touchy}, x)

    assert let_go(error_of(step)) > 0
    assert alive() == 0


def test_an_interrupt_while_letting_go_does_not_end_it(monkeypatch):
    """The interrupt that strikes here holds the error, and what was in hand."""
    struck = []

    def words(value):
        if not struck:
            struck.append(True)
            raise KeyboardInterrupt
        return found(value)

    found = letting_go._words
    monkeypatch.setattr(letting_go, "_words", words)
    error = error_of(a_closure)
    caught = error_of(lambda: let_go(error))
    assert type(caught) is KeyboardInterrupt
    assert alive() == 0
