"""The options of a magic, made from TrainConfig: one field is one option and one help line.

Reads a magic's line into names and options, writes its help, offers completions. Checks of values
are the config's own. Knows no namespace and trains nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..config import AblateConfig, ProfileConfig, TrainConfig, flag_of
from ..errors import ConfigError

EXPLAIN = "--explain"


@dataclass(frozen=True)
class Magic:
    """A magic that trains; its options are the fields of its config, by their spelling."""

    name: str
    config: type[TrainConfig]
    what: tuple[str, ...]  # lines of its help

    @cached_property
    def options(self) -> dict[str, dataclasses.Field[Any]]:
        return {flag_of(item): item for item in dataclasses.fields(self.config)}


TRAIN = Magic(
    "hybrid_train",
    TrainConfig,
    (
        "Train the model that the notebook holds as a hybrid of mixed precision, gradient",
        "accumulation and adaptive batch scaling.",
    ),
)
ABLATE = Magic(
    "hybrid_ablate",
    AblateConfig,
    (
        "Train the same thing several ways, each from the model, optimizer and random state that",
        "are there now, and compare time, memory and accuracy. The model ends as the last hybrid",
        "run left it (--restore: as it was). Accuracy is what --val gives, or what a loop leaves",
        "in `accuracy`, `acc` or a --log name. Variants: hybrid is everything; else words joined",
        "by +: fp32 strict FP32, tf32 as PyTorch ships, mp mixed precision, ga accumulation,",
        "abs adaptive batch.",
    ),
)
PROFILE = Magic(
    "hybrid_profile",
    ProfileConfig,
    (
        "Take a few training steps, show where their time and memory go and what is most worth",
        "doing about it, and put everything back as it was. The steps are those of %%hybrid_train",
        "with the loader's own batch; options that say how long a run is are passed over.",
    ),
)
DEVICE_HELP = """%hybrid_device [-o NAME] [--plain]

Show what this machine offers a run: the devices that PyTorch can use, their memory and who holds
it, the precisions that they compute natively, where a run goes and which precision and memory it
takes when it is not told, and why. Where there is no GPU, or not all of one, it says what to do.

Options:
  -o NAME                                put the facts into NAME, as a plain dict
  --plain                                text only

Takes no memory of a GPU: what others hold of one that this notebook has not used yet is read from
its driver, where that tells."""

EXPORT_HELP = """%hybrid_export FILE

Write the last run of %%hybrid_train as a script that trains the same, on one device, on several or
on several machines: with python, with torchrun, or under Slurm (its first lines say how).

The script holds what the run depends on, as it was run: the statements of the notebook's cells that
make or change the model, the data, the optimizer and what the step reads, with their comments; the
step; the options. Prints, plots and other trainings are left out. A training loop of your own is
written as a step where that says all of it; what is left out is named.

FILE ends in .py. A file that was exported before is replaced while it is unchanged, any other file
is left alone."""


@dataclass
class Line:
    """A magic's line, read: the names given by position, and the options as text."""

    model: str | None = None
    loader: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def read(line: str, magic: Magic = TRAIN) -> Line:
    """Return what `line` says: `[MODEL] [LOADER] [--option value] [--option=value] [--flag]`.

    Raises:
        ConfigError: an option that does not exist, lacks its value, or is given twice.
    """
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(
            f"the line cannot be read ({error}); wanted pairs of quotes; close them"
        ) from None
    found = Line()
    names: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            names.append(word)
            continue
        flag, equals, value = word.partition("=")
        item = magic.options.get(flag)
        if item is None:
            near = difflib.get_close_matches(flag, magic.options, n=1)
            do = f"did you mean {near[0]}?" if near else f"see %%{magic.name}? for every option"
            raise ConfigError(f"there is no option {flag}; {do}")
        if item.name in found.options:
            raise ConfigError(f"{flag} is given twice; wanted it once; leave one out")
        if isinstance(item.default, bool):
            if equals:
                raise ConfigError(f"{flag} takes no value, but has {value}; write just {flag}")
            found.options[item.name] = True
        elif equals:
            found.options[item.name] = value
        elif words and not words[0].startswith("--") and words[0] not in magic.options:
            found.options[item.name] = words.pop(0)
        else:
            raise ConfigError(f"{flag} has no value; wanted {flag} {item.metadata['metavar']}")
    if len(names) > 2:
        raise ConfigError(
            f"{' '.join(names)} are {len(names)} names; wanted [MODEL] [LOADER]; give options "
            "as --option value"
        )
    found.model, found.loader = [*names, None, None][:2]
    return found


def without_explain(line: str) -> tuple[bool, str]:
    """Return whether the line asks only to `--explain`, and the rest of it."""
    words = line.split()
    return EXPLAIN in words, " ".join(word for word in words if word != EXPLAIN)


def help_text(magic: Magic) -> str:
    """Return the documentation of a training magic: usage, what it does, and a line an option."""
    lines = [
        f"%%{magic.name} [MODEL] [LOADER] [options]",
        "",
        *magic.what,
        "The cell is one of three:",
        "- the training loop that you have, with its loss.backward() and optimizer.step(), at top",
        "  level or in functions: it runs as written, its steps on the hybrid engine",
        "- the forward pass of one step: `batch` is what the loader yields, on the device; leave",
        "  the loss in `loss`",
        f"- nothing (or the line magic %{magic.name}): the step is inferred",
        "MODEL and LOADER are names; left out, the one model and the one DataLoader of the",
        "notebook are taken (of several loaders, train*); a loop names its own.",
        f"{EXPLAIN} says what would be done with the cell, and runs nothing.",
        "",
        "Options:",
    ]
    for flag, item in magic.options.items():
        head = f"  {flag} {item.metadata['metavar']}".rstrip()
        default = _default(item.default)
        lines.append(f"{head:<38} {item.metadata['help']}{default}")
    return "\n".join(lines)


def _default(value: Any) -> str:
    if value in (None, False):
        return ""
    said = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return f" (default {said})"


def complete(text: str, namespace: Mapping[str, Any], magic: Magic = TRAIN) -> list[str]:
    """Return completions of the last word of a magic's line: options, their choices, or names."""
    before, last = ["", *text.replace("=", " ").split(" ")][-2:]
    if last.startswith("-"):
        return [flag for flag in (*magic.options, EXPLAIN) if flag.startswith(last)]
    item = magic.options.get(before)
    if item is not None and not isinstance(item.default, bool):
        choices = [choice for choice in item.metadata["metavar"].split("|") if choice.islower()]
        if choices:
            return [choice for choice in choices if choice.startswith(last)]
    return sorted(name for name in namespace if name.startswith(last) and not name.startswith("_"))
