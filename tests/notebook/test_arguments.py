import pytest

from hybrid_magic import ConfigError
from hybrid_magic.config import TrainConfig
from hybrid_magic.notebook import arguments
from hybrid_magic.notebook.arguments import complete, read

NAMESPACE = {"net": 1, "train_loader": 2, "test_loader": 3, "_private": 4}


def refused(line: str) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_options(read(line).options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "model", "loader", "options"),
    [
        ("", None, None, {}),
        ("   ", None, None, {}),
        ("net", "net", None, {}),
        ("net train_loader", "net", "train_loader", {}),
        ("--epochs 3 net", "net", None, {"epochs": "3"}),
        ("net --epochs 3 train_loader", "net", "train_loader", {"epochs": "3"}),
        ("--epochs=3", None, None, {"epochs": "3"}),
        ("--log acc,ppl", None, None, {"log": "acc,ppl"}),
        ("--log 'acc, ppl'", None, None, {"log": "acc, ppl"}),
        ('--memory "8 GiB"', None, None, {"memory": "8 GiB"}),
        ('--memory="8 GiB" net', "net", None, {"memory": "8 GiB"}),
        ("--plain", None, None, {"plain": True}),
        ("--plain net", "net", None, {"plain": True}),
        ("-o run --plain", None, None, {"o": "run", "plain": True}),
        ("-o=run", None, None, {"o": "run"}),
        ("--max-batch 64 --lr-scale sqrt", None, None, {"max_batch": "64", "lr_scale": "sqrt"}),
        ("--seed -1", None, None, {"seed": "-1"}),
        ("net  # my first run --epochs 9", "net", None, {}),
    ],
)
def test_a_line_is_read(line, model, loader, options):
    found = read(line)
    assert (found.model, found.loader, found.options) == (model, loader, options)


def test_a_line_becomes_a_checked_config():
    line = read("--epochs 3 --batch=64 --memory '8 GiB' --log acc,ppl --plain")
    config = TrainConfig.from_options(line.options)
    assert (config.epochs, config.batch, config.memory) == (3, 64, 8 * 1024**3)
    assert (config.log, config.plain, config.precision) == (("acc", "ppl"), True, "auto")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--precison fp32", "there is no option --precison; did you mean --precision?"),
        ("--precison=fp32", "there is no option --precison; did you mean --precision?"),
        ("-epochs 3", "there is no option -epochs; did you mean --epochs?"),
        ("--xyzzy", "there is no option --xyzzy; see %%hybrid_train? for every option"),
        ("--epochs 3 --epochs 4", "--epochs is given twice; wanted it once; leave one out"),
        ("--epochs=3 --epochs 3", "--epochs is given twice; wanted it once; leave one out"),
        ("--plain --plain", "--plain is given twice; wanted it once; leave one out"),
        ("--epochs", "--epochs has no value; wanted --epochs N"),
        ("--epochs --plain", "--epochs has no value; wanted --epochs N"),
        ("--epochs -o run", "--epochs has no value; wanted --epochs N"),
        ("-o --plain", "-o has no value; wanted -o NAME"),
        ("--plain=yes", "--plain takes no value, but has yes; write just --plain"),
        (
            "a b c",
            "a b c are 3 names; wanted [MODEL] [LOADER]; give options as --option value",
        ),
        (
            "--log 'acc",
            "the line cannot be read (No closing quotation); wanted pairs of quotes; close them",
        ),
        (
            "--seed -1",
            (
                "--seed is '-1'; wanted a whole number of at least 0; see %%hybrid_train? for "
                "every option"
            ),
        ),
        (
            "--epochs=",
            (
                "--epochs is ''; wanted a whole number of at least 1; see %%hybrid_train? for "
                "every option"
            ),
        ),
    ],
)
def test_a_mistake_in_the_line_is_told_in_one_line(line, told):
    assert refused(line) == told


def test_every_option_that_takes_a_value_says_what_when_it_is_missing():
    for flag, item in arguments.TRAIN.options.items():
        if not isinstance(item.default, bool):
            assert refused(flag) == f"{flag} has no value; wanted {flag} {item.metadata['metavar']}"


def test_the_help_names_every_option_with_its_values_and_default():
    text = arguments.help_text(arguments.TRAIN)
    lines = text.splitlines()
    assert lines[0] == "%%hybrid_train [MODEL] [LOADER] [options]"
    for flag, item in arguments.TRAIN.options.items():
        start = f"  {flag} {item.metadata['metavar']}".rstrip() + " "
        (line,) = [line for line in lines if line.startswith(start)]
        assert line.endswith(f" (default {item.default})") == (item.default not in (None, False))


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        (" --ep", ["--epochs"]),
        (" net --m", ["--minutes", "--max-batch", "--micro", "--memory"]),
        (" -", [*arguments.TRAIN.options, arguments.EXPLAIN]),
        (" --precision ", ["auto", "fp32", "bf16", "fp16"]),
        (" --precision f", ["fp32", "fp16"]),
        (" --precision=f", ["fp32", "fp16"]),
        (" --accum ", ["auto"]),
        (" ", ["net", "test_loader", "train_loader"]),
        (" net tr", ["train_loader"]),
        (" --val te", ["test_loader"]),
        (" --val=te", ["test_loader"]),
        (" --plain n", ["net"]),
        ("", ["net", "test_loader", "train_loader"]),
    ],
)
def test_what_tab_offers(text, offered):
    assert complete(text, NAMESPACE) == offered
