"""Ablation: the same training done several ways, compared. Plain data, readable without torch.

A trial is one run of one variant with one seed; a row is a variant over its seeds, compared pair by
pair with the first variant. How it looks is the `report` room's business, imported when asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import HybridMagicError
from .policy.comparison import Estimate, estimate
from .records import TrialRecord
from .writing import written_whole

last_ablation: Ablation | None = None  # the newest one of this process, also one ended early
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One variant over its seeds; what is not known is None.

    `outcome` is "finished", "oom" where a seed ran out of memory, or "none": no run of it was
    done. The numbers are means over the seeds, each with `spread`, `low`, `high` and `n`; speedup,
    reductions and `accuracy_delta` are means of the pairs with the first variant's run of the same
    seed. Seconds and bytes; `accuracy` as the step gives it, a share as a rule.
    """

    name: str
    outcome: str
    precision: str | None
    steps: Estimate | None
    seconds: Estimate | None
    peak_allocated_bytes: Estimate | None
    accuracy: Estimate | None
    speedup: Estimate | None
    time_reduction_ratio: Estimate | None
    memory_reduction_ratio: Estimate | None
    accuracy_delta: Estimate | None


@dataclass
class Ablation:
    """What an ablation found. `trials` are in the order in which they ran; `names` the variants in
    the order asked for, the first of which the others are compared with.

    `outcome` is "finished", "stopped", "interrupted" or "failed"; what was done by then counts.
    """

    trials: list[TrialRecord] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    outcome: str = "finished"
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = tuple(self.names) or tuple(dict.fromkeys(t.variant for t in self.trials))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(trial.seed for trial in self.trials))

    @property
    def variants(self) -> list[Row]:
        """The rows of the table, one a variant."""
        return [self._row(name) for name in self.names]

    def _row(self, name: str) -> Row:
        own = {trial.seed: trial for trial in self.trials if trial.variant == name}
        done = {seed: trial for seed, trial in own.items() if trial.outcome == "finished"}
        base = {
            trial.seed: trial
            for trial in self.trials
            if trial.variant == self.names[0] and trial.outcome == "finished"
        }
        pairs = [(done[seed], base[seed]) for seed in done if seed in base]
        precisions = dict.fromkeys(t.precision for t in done.values() if t.precision)
        return Row(
            name=name,
            outcome=_outcome(own.values()),
            precision=", ".join(precisions) or None,
            steps=estimate([float(trial.steps) for trial in done.values()]),
            seconds=_mean(done.values(), "seconds"),
            peak_allocated_bytes=_mean(done.values(), "peak_allocated_bytes"),
            accuracy=_mean(done.values(), "accuracy"),
            speedup=_paired(pairs, "seconds", lambda own, base: base / own),
            time_reduction_ratio=_paired(pairs, "seconds", _reduction),
            memory_reduction_ratio=_paired(pairs, "peak_allocated_bytes", _reduction),
            accuracy_delta=_paired(pairs, "accuracy", lambda own, base: own - base),
        )

    def __add__(self, other: Ablation) -> Ablation:
        """Return both ablations' trials as one: the same variants with other seeds, or others with
        the same seeds. The first one's config and environment stay."""
        if not isinstance(other, Ablation):
            return NotImplemented
        known = {(trial.variant, trial.seed) for trial in self.trials}
        twice = [t for t in other.trials if (t.variant, t.seed) in known]
        if twice:
            raise HybridMagicError(
                f"both ablations hold {twice[0].variant} with seed {twice[0].seed}; wanted each "
                "once; use other seeds"
            )
        return Ablation(
            trials=[*self.trials, *other.trials],
            config=self.config,
            environment=self.environment,
            names=tuple(dict.fromkeys((*self.names, *other.names))),
            outcome=self.outcome if other.outcome == "finished" else other.outcome,
            notes=list(dict.fromkeys([*self.notes, *other.notes])),
        )

    @property
    def verdicts(self) -> list[str]:
        """What may be said of each variant against the first, a sentence each."""
        from .report import verdicts

        return verdicts.sentences(self)

    def table(self) -> str:
        """Return the paper's columns as text, with what may be said below."""
        from .report import comparisons

        return comparisons.text(self)

    def html(self) -> str:
        from .report import comparisons

        return comparisons.html(self)

    def latex(self) -> str:
        """Return the table for a paper: a tabular with booktabs' rules."""
        from .report import comparisons

        return comparisons.latex(self)

    def csv(self) -> str:
        """Return a line a trial, in plain numbers."""
        from .report import comparisons

        return comparisons.csv(self)

    def figure(self) -> Any:
        """Return time, memory and accuracy of the variants as a matplotlib Figure."""
        from .report import bars

        return bars.figure(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        from .report import comparisons

        return comparisons.mimebundle(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ablation in the form that the path's suffix says: .json (everything, with the
        environment; `hm.load_ablation` reads it), .csv, .tex, .html or .txt.

        Raises:
            HybridMagicError: another suffix.
        """
        forms: dict[str, Callable[[], str]] = {
            ".json": lambda: json.dumps(self.as_json(), indent=1) + "\n",
            ".csv": self.csv,
            ".tex": self.latex,
            ".html": self.html,
            ".txt": lambda: self.table() + "\n",
        }
        suffix = pathlib.Path(path).suffix.lower()
        if suffix not in forms:
            raise HybridMagicError(
                f"{path} ends in {suffix or 'nothing'}; wanted one of {', '.join(forms)}; rename it"
            )
        text = forms[suffix]()
        with written_whole(path) as file:
            file.write(text)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values, the rows with their spreads included."""
        return {
            "kind": "ablation",
            "format": FORMAT,
            "outcome": self.outcome,
            "names": list(self.names),
            "config": self.config,
            "environment": self.environment,
            "notes": self.notes,
            "verdicts": self.verdicts,
            "variants": [_row_as_json(row) for row in self.variants],
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
        }


def load_ablation(path: str | os.PathLike[str]) -> Ablation:
    """Return the Ablation that `Ablation.save` wrote to a .json; needs no torch.

    Raises:
        HybridMagicError: the file is not a saved ablation, or is damaged.
    """
    try:
        held = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if (held["kind"], held["format"]) != ("ablation", FORMAT):
            raise ValueError("another file")
        names = {item.name for item in dataclasses.fields(TrialRecord)}
        return Ablation(
            trials=[
                TrialRecord(**{name: value for name, value in trial.items() if name in names})
                for trial in held["trials"]
            ],
            **{name: held[name] for name in ("config", "environment", "names", "outcome", "notes")},
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise HybridMagicError(
            f"{path} is damaged, or not an ablation that this version saved; wanted a whole .json "
            "file written by ablation.save(); check its path, or save it again"
        ) from None


def _outcome(trials: Any) -> str:
    outcomes = {trial.outcome for trial in trials}
    return "oom" if "oom" in outcomes else "finished" if outcomes else "none"


def _mean(trials: Any, name: str) -> Estimate | None:
    return estimate([found for trial in trials if (found := getattr(trial, name)) is not None])


def _paired(
    pairs: Sequence[tuple[TrialRecord, TrialRecord]],
    name: str,
    compared: Callable[[float, float], float],
) -> Estimate | None:
    values = [(getattr(own, name), getattr(base, name)) for own, base in pairs]
    known = ((own, base) for own, base in values if own is not None and base is not None)
    return estimate([compared(own, base) for own, base in known])


def _reduction(own: float, base: float) -> float:
    return 1 - own / base


def _row_as_json(row: Row) -> dict[str, Any]:
    values = {item.name: getattr(row, item.name) for item in dataclasses.fields(row)}
    return {
        name: dict(mean=float(value), **vars(value)) if isinstance(value, Estimate) else value
        for name, value in values.items()
    }
