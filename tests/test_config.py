import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_magic import ConfigError, HybridMagicError
from hybrid_magic.config import AblateConfig, ProfileConfig, TrainConfig, flag_of

FIELDS = dataclasses.fields(TrainConfig)
GIB = 1024**3

# The contract's options with their defaults (DESIGN 3.2), and what may be written for each.
DEFAULTS = {
    "epochs": None,
    "steps": None,
    "minutes": None,
    "val": None,
    "optimizer": None,
    "lr": None,
    "loss": None,
    "scheduler": None,
    "log": None,
    "precision": "auto",
    "batch": "adaptive",
    "policy": "goodput",
    "max_batch": None,
    "efficiency": 0.9,
    "accum": "auto",
    "micro": "auto",
    "memory": 0.9,
    "lr_scale": "auto",
    "warmup": "auto",
    "reduction": "auto",
    "clip": None,
    "seed": None,
    "device": None,
    "compile": False,
    "cache": "off",
    "workers": None,
    "checkpoint": None,
    "resume": False,
    "processes": 1,
    "o": None,
    "plain": False,
}
GOOD = [
    *[(name, "3", 3) for name in ("epochs", "steps", "batch", "max_batch", "accum", "micro")],
    *[(name, "0", 0) for name in ("warmup", "seed", "workers")],
    *[(name, "0.5", 0.5) for name in ("minutes", "lr", "efficiency", "memory", "clip")],
    *[(name, "1e-3", 1e-3) for name in ("minutes", "lr", "efficiency", "memory", "clip")],
    *[(name, "found", "found") for name in ("val", "optimizer", "loss", "scheduler", "o")],
    *[("precision", one, one) for one in ("auto", "fp32", "bf16", "fp16")],
    *[("batch", one, one) for one in ("adaptive", "fixed")],
    *[("policy", one, one) for one in ("goodput", "stability")],
    *[("lr_scale", one, one) for one in ("auto", "none", "linear", "sqrt")],
    *[("reduction", one, one) for one in ("auto", "mean", "sum")],
    *[(name, "auto", "auto") for name in ("accum", "micro", "warmup")],
    ("efficiency", "0", 0.0),
    ("efficiency", "1", 1.0),
    ("memory", "1", 1.0),
    ("memory", "8GiB", 8 * GIB),
    ("memory", "0.5 GiB", GIB // 2),
    ("memory", "8gb", 8_000_000_000),
    ("memory", "512MiB", 512 * 1024**2),
    ("memory", "4096B", 4096),
    ("memory", "1TiB", 1024 * GIB),
    ("log", "acc", ("acc",)),
    ("log", "acc, ppl", ("acc", "ppl")),
    ("device", "cuda:1", "cuda:1"),
    ("checkpoint", "runs/one", "runs/one"),
    ("cache", "off", "off"),
    ("processes", "4", 4),
]
GOOD_IN_PYTHON = [
    ("epochs", 3, 3),
    ("batch", 64, 64),
    ("lr", 1, 1.0),
    ("minutes", 2, 2.0),
    ("memory", 0.5, 0.5),
    ("memory", 8 * GIB, 8 * GIB),
    ("log", ["acc", "ppl"], ("acc", "ppl")),
    ("log", ("acc",), ("acc",)),
    ("plain", True, True),
    ("plain", False, False),
]
WHOLE = ["0", "-1", "1.5", "many", "", 0, -3, 1.5, True, [1]]
POSITIVE = ["0", "-1", "nan", "inf", "some", "", 0, -0.1, math.nan, math.inf, True, [1], 10**400]
SHARE = ["-0.1", "1.1", "nan", "much", -0.1, 1.01, math.inf, True, None]
CHOICE = ["fastest", "", "AUTO", 3.5, None, ["auto"]]
NAME = ["", 3, True, ["acc"]]
BAD = {
    "epochs": WHOLE,
    "steps": WHOLE,
    "minutes": POSITIVE,
    "val": NAME,
    "optimizer": NAME,
    "lr": POSITIVE,
    "loss": NAME,
    "scheduler": NAME,
    "log": ["", "acc,", "acc,,ppl", "a b", "class", 5, [], ["acc", 3], {"acc": 1}],
    "precision": [*CHOICE, "fp64", 16],
    "batch": [*CHOICE, "0", "-8", 0, True],
    "policy": CHOICE,
    "max_batch": WHOLE,
    "efficiency": SHARE,
    "accum": [*CHOICE, "0", 0, True],
    "micro": [*CHOICE, "0", 0, True],
    "memory": ["0", "1.5", "8", "8Gi", "0GiB", "0.5B", "1.2.3GiB", "GiB", "all", 0, -1, True, None],
    "lr_scale": [*CHOICE, "square"],
    "warmup": [*CHOICE, "-1", -1, True],
    "reduction": [*CHOICE, "none"],
    "clip": POSITIVE,
    "seed": ["-1", "1.5", "lucky", -1, 0.5, True],
    "device": NAME,
    "compile": ["yes", 1, None],
    "cache": [*CHOICE, "disk"],
    "workers": ["-1", "1.5", "two", -1, 0.5, True],
    "checkpoint": ["", 3, True],
    "resume": ["yes", 1, None],
    "processes": WHOLE,
    "o": ["", "my run", "my-run", "3x", "class", 3],
    "plain": ["yes", 1, None],
}


def refused(**options) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_options(options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_options_and_their_defaults_are_those_of_the_contract():
    config = TrainConfig()
    assert {item.name: getattr(config, item.name) for item in FIELDS} == DEFAULTS


@pytest.mark.parametrize(("name", "text", "value"), [*GOOD, *GOOD_IN_PYTHON])
def test_a_good_value_is_read_from_text_and_from_python(name, text, value):
    for given_value in (text, value):
        found = getattr(TrainConfig.from_options({name: given_value}), name)
        assert found == value
        assert type(found) is type(value)


def test_whole_numbers_of_other_libraries_become_plain_ones():
    numpy = pytest.importorskip("numpy")
    config = TrainConfig(steps=numpy.int64(7), lr=numpy.float32(0.5))
    assert type(config.steps) is int
    assert type(config.lr) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, values in BAD.items()
        for value in values
        if value is not None or DEFAULTS[name] is not None
    ],
)
def test_a_bad_value_is_told_in_one_line_with_what_was_found_wanted_and_to_do(name, value):
    (item,) = [item for item in FIELDS if item.name == name]
    message = refused(**{name: value})
    start = f"{flag_of(item)} is {value!r}; wanted "
    assert message.startswith(start)
    wanted, do = message[len(start) :].split("; ")
    assert wanted.startswith(("a ", "one of ", "names ", "True or False"))
    assert do == "see %%hybrid_train? for every option"


def test_every_option_has_its_bad_values_here():
    assert set(BAD) == set(DEFAULTS)
    covered = {name for name, _, _ in [*GOOD, *GOOD_IN_PYTHON]}
    # compile has no good value yet, and resume none of its own
    assert covered == set(DEFAULTS) - {"compile", "resume"}


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--compile", {"compile": True}),
        ("--cache", {"cache": "ram"}),
        ("--cache", {"cache": "device"}),
    ],
)
def test_an_option_that_a_later_version_builds_is_refused_and_not_ignored(flag, options):
    assert refused(**options).startswith(f"{flag} is not built yet")
    (name,) = options
    (item,) = [item for item in FIELDS if item.name == name]
    assert "(not built yet)" in item.metadata["help"]


def test_an_unknown_option_names_the_nearest_one():
    assert refused(precison="fp32") == "there is no option precison; did you mean precision?"
    assert refused(max_batchsize=3).endswith("did you mean max_batch?")
    nothing_near = refused(xyzzy=1)
    assert all(item.name in nothing_near for item in FIELDS)


def test_contradictions_are_refused():
    assert refused(batch=64, accum=4, micro=8).startswith(
        "--batch 64 is not --accum 4 micro-batches of --micro 8; wanted batch = accum x micro; "
    )
    assert refused(batch=64, accum=2, micro=64).startswith("--batch 64 is not --accum 2")
    assert refused(batch=64, max_batch=32).startswith("--batch 64 is above --max-batch 32; ")
    assert refused(resume=True) == (
        "--resume is given without --checkpoint DIR; wanted the folder to go on from; name it"
    )
    assert TrainConfig(checkpoint="runs", resume=True).resume
    with pytest.raises(ConfigError, match="--checkpoint runs is for one run, and an ablation is "):
        AblateConfig(checkpoint="runs")


@pytest.mark.parametrize(
    ("kind", "why"), [(AblateConfig, "an ablation compares "), (ProfileConfig, "a profile looks ")]
)
def test_several_processes_are_for_training(kind, why):
    with pytest.raises(ConfigError, match=f"--processes 2 is for %%hybrid_train, and {why}"):
        kind(processes=2)
    assert kind(processes="1").processes == 1


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 64, "accum": 4, "micro": 16},
        {"batch": 60, "accum": 4, "micro": 16},  # the last micro-batch is smaller
        {"batch": 64, "max_batch": 64},
        {"batch": "fixed", "accum": 4, "micro": 8},
        {"epochs": 3, "steps": 100, "minutes": 5},
    ],
)
def test_what_only_looks_like_a_contradiction_is_accepted(options):
    config = TrainConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_one_field_is_one_option_one_help_line_and_one_json_key():
    from hybrid_magic.notebook import arguments

    help_lines = arguments.help_text(arguments.TRAIN).split("Options:\n")[1].splitlines()
    assert len(FIELDS) == len(arguments.TRAIN.options) == len(help_lines)
    assert list(TrainConfig().as_json()) == [item.name for item in FIELDS]
    for item, (flag, field), line in zip(
        FIELDS, arguments.TRAIN.options.items(), help_lines, strict=True
    ):
        assert field is item
        assert flag == "-o" if item.name == "o" else flag == "--" + item.name.replace("_", "-")
        assert line.split()[0] == flag
        assert item.metadata["help"] in line


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "epochs": st.integers(1, 10**9),
            "minutes": st.floats(1e-6, 1e6),
            "log": st.lists(st.sampled_from(["acc", "ppl", "f1"]), min_size=1).map(tuple),
            "batch": st.sampled_from(["adaptive", "fixed"]) | st.integers(1, 10**6),
            "memory": st.floats(0.01, 1.0) | st.integers(2, 2**50),
            "warmup": st.just("auto") | st.integers(0, 10**6),
            "plain": st.booleans(),
            "o": st.sampled_from(["run", "first_run"]),
        },
    )
)
def test_a_config_comes_back_from_its_json(options):
    config = TrainConfig(**options)
    assert TrainConfig.from_options(json.loads(json.dumps(config.as_json()))) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 2  # type: ignore[misc]


def test_the_errors_are_ours_and_a_value_error():
    assert issubclass(ConfigError, HybridMagicError)
    assert issubclass(ConfigError, ValueError)
