"""What the variants of an ablation train with."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid_magic.config import AblateConfig, TrainConfig
from hybrid_magic.errors import ConfigError
from hybrid_magic.policy.variants import variant_of

WHOLE = {"accum": 1, "micro": "auto"}
FP32 = {"precision": "fp32"}
FIXED = {"batch": "fixed"}


@pytest.mark.parametrize(
    ("name", "options", "tf32", "recovers"),
    [
        ("fp32", FP32 | FIXED | WHOLE, False, False),
        ("tf32", FP32 | FIXED | WHOLE, True, False),
        ("mp", FIXED | WHOLE, None, False),
        ("ga", FP32 | FIXED | {"accum": 4}, False, True),
        ("mp+ga", FIXED | {"accum": 4}, None, True),
        ("abs", FP32 | {"batch": "adaptive"} | WHOLE, False, True),
        ("mp+abs", {"batch": "adaptive"} | WHOLE, None, True),
        ("mp+ga+abs", {"batch": "adaptive"}, None, True),
        ("tf32+ga", FP32 | FIXED | {"accum": 4}, True, True),
        ("hybrid", {}, None, True),
    ],
)
def test_a_name_is_the_options_it_trains_with(
    name: str, options: dict[str, Any], tf32: bool | None, recovers: bool
) -> None:
    found = variant_of(name, AblateConfig(variants=(name,)))
    assert (found.options, found.tf32, found.recovers) == (options, tf32, recovers)
    assert found.hybrid == (name in ("hybrid", "mp+ga+abs"))
    TrainConfig.from_options(found.options)


def test_what_the_person_pins_is_kept() -> None:
    config = AblateConfig(batch=64, accum=2, precision="bf16", variants=("mp+ga", "mp", "hybrid"))
    assert variant_of("mp+ga", config).options == {}
    assert variant_of("mp", config).options == WHOLE
    assert variant_of("hybrid", config).options == {}
    cut = AblateConfig(micro=8)
    assert variant_of("ga", cut).options == FP32 | FIXED


@pytest.mark.parametrize(
    ("given", "seeds"),
    [("3", (0, 1, 2)), (3, (0, 1, 2)), ("4,7", (4, 7)), ([9], (9,)), (range(2), (0, 1))],
)
def test_seeds_are_a_number_or_a_list(given: Any, seeds: tuple[int, ...]) -> None:
    assert AblateConfig(seeds=given).seeds == seeds
    assert AblateConfig(seed=5).seeds == (5,)


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": "0"}, {"seeds": "1,1"}, {"seeds": "x"}, {"seeds": []}, {"variants": ""},
        {"variants": "fp32,fp32"}, {"variants": "mp+mp"}, {"variants": "hybrid+ga"},
        {"variants": "tf32+fp32"}, {"seeds": True},
    ],
)  # fmt: skip
def test_what_names_no_variant_or_no_seed_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AblateConfig(**options)
