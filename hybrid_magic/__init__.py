"""hybrid_magic: train the model in your notebook as a hybrid of mixed precision, gradient
accumulation and adaptive batch scaling.

    %load_ext hybrid_magic

    %%hybrid_train --epochs 3 --val test_loader
    x, y = batch
    loss = F.cross_entropy(model(x), y)

Importing this package loads neither torch nor IPython; what needs them is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigError, HybridMagicError

if TYPE_CHECKING:
    from .ablation import Ablation, load_ablation
    from .engine.ablate import ablate
    from .engine.profile import profile
    from .engine.train import train
    from .notebook.planned import explain
    from .profiles import Profile, load_profile
    from .records import TrialRecord
    from .run import Run, load_run

__version__ = "0.1.0"
__all__ = [
    "Ablation",
    "ConfigError",
    "HybridMagicError",
    "Profile",
    "Run",
    "TrialRecord",
    "ablate",
    "explain",
    "last_ablation",
    "last_profile",
    "last_run",
    "load_ablation",
    "load_profile",
    "load_run",
    "profile",
    "train",
]

last_run: Run | None
last_ablation: Ablation | None
last_profile: Profile | None


def load_ipython_extension(shell: Any) -> None:
    """Register the magics; called by `%load_ext hybrid_magic`."""
    from .notebook.magics import register

    register(shell)


def __getattr__(name: str) -> Any:
    if name == "train":
        from .launch.train import train

        return train
    if name == "ablate":
        from .engine.ablate import ablate

        return ablate
    if name == "profile":
        from .engine.profile import profile

        return profile
    if name == "explain":
        from .notebook.planned import explain

        return explain
    if name in ("Run", "last_run", "load_run"):
        from . import run

        return getattr(run, name)
    if name in ("Ablation", "last_ablation", "load_ablation"):
        from . import ablation

        return getattr(ablation, name)
    if name in ("Profile", "last_profile", "load_profile"):
        from . import profiles

        return getattr(profiles, name)
    if name == "TrialRecord":
        from .records import TrialRecord

        return TrialRecord
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
