"""TrainConfig: every option of a run, its help line, its check and its JSON key.

One field is one option of the magics (`max_batch` is `--max-batch`), one keyword of `hm.train`, one
help line and one JSON key. A value is checked when the config is made, whether it came as text from
a magic or as a Python value. Knows no torch and no notebook.
"""

from __future__ import annotations

import dataclasses
import difflib
import keyword
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError

Reader = Callable[[Any], Any]


def _bad(wanted: str) -> ValueError:
    return ValueError(wanted)


def _integer(least: int) -> Reader:
    def read(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else operator.index(value)
        except (TypeError, ValueError):
            number = None
        if isinstance(value, bool) or number is None or number < least:
            raise _bad(f"a whole number of at least {least}")
        return number

    return read


def _number(least: float, most: float = math.inf, *, above: bool = False) -> Reader:
    wanted = f"a number {'above' if above else 'of at least'} {least:g}"
    wanted += f" and at most {most:g}" if most < math.inf else ""

    def read(value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if (
            not math.isfinite(number)
            or number > most
            or number < least
            or (above and number == least)
        ):
            raise _bad(wanted)
        return number

    return read


def _one_of(*names: str, otherwise: Reader | None = None) -> Reader:
    def read(value: Any) -> Any:
        if isinstance(value, str) and value in names:
            return value
        if otherwise is None:
            raise _bad("one of " + ", ".join(names))
        try:
            return otherwise(value)
        except ValueError as error:
            raise _bad(f"one of {', '.join(names)}, or {error}") from None

    return read


_SIZE = re.compile(r"\s*([0-9.]+)\s*([KMGT]i?B|B)\s*", re.IGNORECASE)
_UNIT = {"": 1, "k": 1, "m": 2, "g": 3, "t": 4}


def _memory(value: Any) -> float | int:
    """Return a fraction of the device's memory (float), or a number of bytes (int)."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match:
        unit = match[2].lower()
        power = 0 if unit == "b" else _UNIT[unit[0]]
        try:
            size = float(match[1])
        except ValueError:
            size = 0.0
        size *= (1024 if "i" in unit else 1000) ** power
        if 1 <= size < math.inf:
            return int(size)
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        return value
    try:
        return _number(0, 1, above=True)(value)
    except ValueError:
        raise _bad("a fraction such as 0.9, or a size such as 8GiB") from None


def _names(value: Any) -> tuple[str, ...]:
    given: Any = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not given:
        raise _bad("names such as acc,ppl")
    names = tuple(str(name).strip() for name in given)  # type: ignore[reportUnknownVariableType]
    if not all(map(_is_name, names)):
        raise _bad("names such as acc,ppl")
    return names


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _is_name(value):
        raise _bad("a name such as run")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _bad("a name")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _bad("True or False")
    return value


def _option(default: Any, read: Reader, metavar: str, help: str, *, flag: str | None = None) -> Any:
    return field(
        default=default, metadata={"read": read, "metavar": metavar, "help": help, "flag": flag}
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Every option of a run, checked. `None` means that the option was not given.

    Raises:
        ConfigError: a value that cannot be used; it names the option, what was found and wanted.
    """

    epochs: int | None = _option(
        None, _integer(1), "N", "passes over the loader; 1 when no other end is given"
    )
    steps: int | None = _option(None, _integer(1), "N", "end after N optimizer steps")
    minutes: float | None = _option(None, _number(0, above=True), "T", "end after T minutes")
    val: str | None = _option(None, _text, "LOADER", "validate on this loader after every epoch")
    optimizer: str | None = _option(
        None, _text, "NAME", "the optimizer; else the one found, else AdamW"
    )
    lr: float | None = _option(
        None, _number(0, above=True), "X", "learning rate of a fresh AdamW (default 1e-3)"
    )
    loss: str | None = _option(
        None, _text, "NAME", "the criterion of a bare cell; else the one found"
    )
    scheduler: str | None = _option(
        None, _text, "NAME", "learning-rate scheduler, advanced by samples seen; else the one found"
    )
    log: tuple[str, ...] | None = _option(
        None, _names, "NAMES", "more numbers of the step to record: acc,ppl"
    )
    precision: str = _option(
        "auto",
        _one_of("auto", "fp32", "bf16", "fp16"),
        "auto|fp32|bf16|fp16",
        "what the model computes in",
    )
    batch: str | int = _option(
        "adaptive",
        _one_of("adaptive", "fixed", otherwise=_integer(1)),
        "adaptive|fixed|N",
        "the global batch: steered, the loader's own, or N samples",
    )
    policy: str = _option(
        "goodput",
        _one_of("goodput", "stability"),
        "goodput|stability",
        "how an adaptive batch is steered",
    )
    max_batch: int | None = _option(
        None,
        _integer(1),
        "N",
        "the most that the global batch may grow to (default 16 x the loader's)",
    )
    efficiency: float = _option(
        0.9,
        _number(0, 1),
        "X",
        "least statistical efficiency per sample of a grown batch; 1 keeps the loader's batch",
    )
    accum: str | int = _option(
        "auto",
        _one_of("auto", otherwise=_integer(1)),
        "auto|K",
        "micro-batches in a step; K pins them",
    )
    micro: str | int = _option(
        "auto",
        _one_of("auto", otherwise=_integer(1)),
        "auto|M",
        "samples in a micro-batch; M pins them",
    )
    memory: float | int = _option(
        0.9, _memory, "X", "memory budget: a fraction of the device's, or a size such as 8GiB"
    )
    lr_scale: str = _option(
        "auto",
        _one_of("auto", "none", "linear", "sqrt"),
        "auto|none|linear|sqrt",
        "the learning rate when the batch is not the loader's; auto: AdaScale for SGD, root for "
        "Adam",
    )
    warmup: str | int = _option(
        "auto",
        _one_of("auto", otherwise=_integer(0)),
        "N",
        "steps over which the learning rate is ramped",
    )
    reduction: str = _option(
        "auto",
        _one_of("auto", "mean", "sum"),
        "auto|mean|sum",
        "how the loss is reduced over samples; auto: read off the criterion in use",
    )
    clip: float | None = _option(None, _number(0, above=True), "X", "clip the gradient norm to X")
    seed: int | None = _option(
        None, _integer(0), "N", "seed Python, NumPy and torch before the run"
    )
    device: str | None = _option(None, _text, "D", "where to train: cuda, cuda:1, mps, cpu")
    compile: bool = _option(False, _flag, "", "compile the model (not built yet)")
    cache: str = _option(
        "off",
        _one_of("off", "ram", "device"),
        "off|ram|device",
        "keep samples after the first epoch (not built yet)",
    )
    workers: int | None = _option(
        None, _integer(0), "N", "loader worker processes, in place of the loader's"
    )
    checkpoint: str | None = _option(None, _text, "DIR", "write checkpoints to DIR (not built yet)")
    resume: bool = _option(False, _flag, "", "go on from the newest checkpoint (not built yet)")
    processes: int = _option(
        1, _integer(1), "N", "data-parallel over N local processes (not built yet)"
    )
    o: str | None = _option(None, _name, "NAME", "put the Run into NAME", flag="-o")
    plain: bool = _option(False, _flag, "", "text only, no widgets")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None and item.default is None:
                continue
            try:
                object.__setattr__(self, item.name, item.metadata["read"](value))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{flag_of(item)} is {value!r}; wanted {error}; see %%hybrid_train? for "
                    "every option"
                ) from None
        _refuse_unbuilt(self)
        _refuse_contradictions(self)

    def as_json(self) -> dict[str, Any]:
        """Return the options as plain JSON values, one key a field."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**values, "log": None if self.log is None else list(self.log)}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> TrainConfig:
        """Return the config of keyword options.

        Raises:
            ConfigError: an option that does not exist (the nearest one is named), or a bad value.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "the options are " + ", ".join(known)
                raise ConfigError(f"there is no option {name}; {hint}")
        return cls(**options)


def flag_of(item: dataclasses.Field[Any]) -> str:
    """Return the option's spelling in a magic: `--max-batch` for the field `max_batch`."""
    return item.metadata["flag"] or "--" + item.name.replace("_", "-")


def _refuse_unbuilt(config: TrainConfig) -> None:
    asked = {
        "--compile": config.compile,
        "--cache": config.cache != "off",
        "--checkpoint": config.checkpoint is not None,
        "--resume": config.resume,
        "--processes": config.processes != 1,
    }
    for flag, given in asked.items():
        if given:
            raise ConfigError(
                f"{flag} is not built yet in this version; the run was not started; leave it out"
            )


def _refuse_contradictions(config: TrainConfig) -> None:
    pinned = config.batch, config.accum, config.micro
    if all(isinstance(value, int) for value in pinned):
        batch, accum, micro = pinned
        if not (accum - 1) * micro < batch <= accum * micro:  # type: ignore[operator]
            raise ConfigError(
                f"--batch {batch} is not --accum {accum} micro-batches of --micro {micro}; "
                "wanted batch = accum x micro; leave one of the three out"
            )
    if (
        isinstance(config.batch, int)
        and config.max_batch is not None
        and config.batch > config.max_batch
    ):
        raise ConfigError(
            f"--batch {config.batch} is above --max-batch {config.max_batch}; wanted at most "
            "that; leave one out"
        )
