"""TrainConfig: every option of a run, its help line, its check and its JSON key.

One field is one option of the magics (`max_batch` is `--max-batch`), one keyword of `hm.train`, one
help line and one JSON key. A value is checked when the config is made, whether it came as text from
a magic or as a Python value. Knows no torch and no notebook.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, TypeVar

from . import option_values as read
from .errors import ConfigError


def _option(
    default: Any, reader: read.Reader, metavar: str, help: str, *, flag: str | None = None
) -> Any:
    return field(
        default=default, metadata={"read": reader, "metavar": metavar, "help": help, "flag": flag}
    )


_Config = TypeVar("_Config", bound="TrainConfig")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Every option of a run, checked. `None` means that the option was not given.

    Raises:
        ConfigError: a value that cannot be used; it names the option, what was found and wanted.
    """

    epochs: int | None = _option(
        None, read.integer(1), "N", "passes over the loader; 1 when no other end is given"
    )
    steps: int | None = _option(None, read.integer(1), "N", "end after N optimizer steps")
    minutes: float | None = _option(None, read.number(0, above=True), "T", "end after T minutes")
    val: str | None = _option(
        None, read.text, "LOADER", "validate on this loader after every epoch"
    )
    optimizer: str | None = _option(
        None, read.text, "NAME", "the optimizer; else the one found, else AdamW"
    )
    lr: float | None = _option(
        None, read.number(0, above=True), "X", "learning rate of a fresh AdamW (default 1e-3)"
    )
    loss: str | None = _option(
        None, read.text, "NAME", "the criterion of a bare cell; else the one found"
    )
    scheduler: str | None = _option(
        None,
        read.text,
        "NAME",
        "learning-rate scheduler, advanced by samples seen; else the one found",
    )
    log: tuple[str, ...] | None = _option(
        None, read.names, "NAMES", "more numbers of the step to record: acc,ppl"
    )
    precision: str = _option(
        "auto",
        read.one_of("auto", "fp32", "bf16", "fp16"),
        "auto|fp32|bf16|fp16",
        "what the model computes in",
    )
    batch: str | int = _option(
        "adaptive",
        read.one_of("adaptive", "fixed", otherwise=read.integer(1)),
        "adaptive|fixed|N",
        "the global batch: steered, the loader's own, or N samples",
    )
    policy: str = _option(
        "goodput",
        read.one_of("goodput", "stability"),
        "goodput|stability",
        "how an adaptive batch is steered",
    )
    max_batch: int | None = _option(
        None,
        read.integer(1),
        "N",
        "the most that the global batch may grow to (default 16 x the loader's)",
    )
    efficiency: float = _option(
        0.9,
        read.number(0, 1),
        "X",
        "least statistical efficiency per sample of a grown batch; 1 keeps the loader's batch",
    )
    accum: str | int = _option(
        "auto",
        read.one_of("auto", otherwise=read.integer(1)),
        "auto|K",
        "micro-batches in a step; K pins them",
    )
    micro: str | int = _option(
        "auto",
        read.one_of("auto", otherwise=read.integer(1)),
        "auto|M",
        "samples in a micro-batch; M pins them",
    )
    memory: float | int = _option(
        0.9,
        read.memory,
        "X",
        "memory budget: a fraction of the device's, or a size such as 8GiB",
    )
    lr_scale: str = _option(
        "auto",
        read.one_of("auto", "none", "linear", "sqrt"),
        "auto|none|linear|sqrt",
        "the learning rate when the batch is not the loader's; auto: AdaScale for SGD, root for "
        "Adam",
    )
    warmup: str | int = _option(
        "auto",
        read.one_of("auto", otherwise=read.integer(0)),
        "N",
        "steps over which the learning rate is ramped",
    )
    reduction: str = _option(
        "auto",
        read.one_of("auto", "mean", "sum"),
        "auto|mean|sum",
        "how the loss is reduced over samples; auto: read off the criterion in use",
    )
    clip: float | None = _option(
        None, read.number(0, above=True), "X", "clip the gradient norm to X"
    )
    seed: int | None = _option(
        None, read.integer(0), "N", "seed Python, NumPy and torch before the run"
    )
    device: str | None = _option(None, read.text, "D", "where to train: cuda, cuda:1, mps, cpu")
    compile: bool = _option(False, read.flag, "", "compile the model (not built yet)")
    cache: str = _option(
        "off",
        read.one_of("off", "ram", "device"),
        "off|ram|device",
        "keep samples after the first epoch (not built yet)",
    )
    workers: int | None = _option(
        None, read.integer(0), "N", "loader worker processes, in place of the loader's"
    )
    checkpoint: str | None = _option(None, read.text, "DIR", "write checkpoints to the folder DIR")
    resume: bool = _option(False, read.flag, "", "go on from the newest checkpoint in DIR")
    processes: int = _option(
        1, read.integer(1), "N", "train in N processes of this machine, a GPU each, or on the CPU"
    )
    o: str | None = _option(None, read.name, "NAME", "put the Run into NAME", flag="-o")
    plain: bool = _option(False, read.flag, "", "text only, no widgets")

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

    @property
    def passes(self) -> int | None:
        """Epochs after which the run ends: 1 when no other end was asked for either."""
        none_given = self.epochs is self.steps is self.minutes is None
        return 1 if none_given else self.epochs

    def as_json(self) -> dict[str, Any]:
        """Return the options as plain JSON values, one key a field."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**values, "log": None if self.log is None else list(self.log)}

    @classmethod
    def from_options(cls: type[_Config], options: dict[str, Any]) -> _Config:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateConfig(TrainConfig):
    """Every option of an ablation: those of a run, and how it is varied.

    Raises:
        ConfigError: a value that cannot be used, or one that a variant contradicts.
    """

    variants: tuple[str, ...] = _option(
        ("fp32", "mp", "mp+ga", "hybrid"),
        read.variants,
        "NAMES",
        "ways to train: hybrid, or of fp32, tf32, mp, ga, abs one or several joined by +",
    )
    seeds: tuple[int, ...] = _option(
        (0,), read.seeds, "N|LIST", "how many seeds, or which (0,1,2); the first alone is 0"
    )
    restore: bool = _option(
        False, read.flag, "", "leave the model as it was; else as the last hybrid run left it"
    )

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if self.seed is not None:
            if self.seeds != (0,):
                raise ConfigError(
                    f"--seed {self.seed} and --seeds are given; wanted one of them; leave one out"
                )
            object.__setattr__(self, "seeds", (self.seed,))
        if self.checkpoint is not None:
            raise ConfigError(
                f"--checkpoint {self.checkpoint} is for one run, and an ablation is many; wanted "
                "no checkpoint; leave it out"
            )
        _refuse_processes(self, "an ablation compares runs of one process")
        mixed = [name for name in self.variants if "mp" in name.split("+")]
        if mixed and self.precision == "fp32":
            raise ConfigError(
                f"--precision fp32 leaves nothing for the variant {mixed[0]}; wanted what it mixes "
                "with: auto, bf16 or fp16; leave --precision or the variant out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig(TrainConfig):
    """Every option of a profile: those of a run, whose length is passed over, and what is written.

    Raises:
        ConfigError: a value that cannot be used.
    """

    steps: int | None = _option(
        None, read.integer(1), "N", "measure N steps (else as many as take 3 s, at most 30)"
    )
    trace: str | None = _option(
        None, read.text, "FILE", "write a torch.profiler trace of two steps to FILE (.json.gz)"
    )
    snapshot: str | None = _option(
        None, read.text, "FILE", "write the CUDA allocator's history of one step to FILE (.pickle)"
    )

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _refuse_processes(self, "a profile looks at the steps of one process")


def flag_of(item: dataclasses.Field[Any]) -> str:
    """Return the option's spelling in a magic: `--max-batch` for the field `max_batch`."""
    return item.metadata["flag"] or "--" + item.name.replace("_", "-")


def _refuse_unbuilt(config: TrainConfig) -> None:
    asked = {"--compile": config.compile, "--cache": config.cache != "off"}
    for flag in (flag for flag, given in asked.items() if given):
        raise ConfigError(f"{flag} is not built yet; no run was started; leave it out")


def _refuse_processes(config: TrainConfig, why: str) -> None:
    if config.processes != 1:
        raise ConfigError(
            f"--processes {config.processes} is for %%hybrid_train, and {why}; wanted 1; leave "
            "it out"
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
    if config.resume and config.checkpoint is None:
        raise ConfigError(
            "--resume is given without --checkpoint DIR; wanted the folder to go on from; name it"
        )
    batch, most = config.batch, config.max_batch
    if isinstance(batch, int) and most is not None and batch > most:
        raise ConfigError(
            f"--batch {batch} is above --max-batch {most}; wanted at most that; leave one out"
        )
