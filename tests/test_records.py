import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_magic import records
from hybrid_magic.records import (
    BatchChangeRecord,
    NoteRecord,
    StartRecord,
    StepRecord,
    TelemetryRecord,
    TrialRecord,
    TrialStartRecord,
    ValidationRecord,
)

KINDS = [
    *(StartRecord, StepRecord, BatchChangeRecord, ValidationRecord, NoteRecord),
    *(TelemetryRecord, TrialStartRecord, TrialRecord),
]
FINITE = st.floats(allow_nan=False)
NUMBERS = st.dictionaries(st.text(), FINITE, max_size=3)
OF_TYPE = {
    "str": st.text(),
    "int": st.integers(0, 2**53),
    "bool": st.booleans(),
    "float": FINITE,
    "None": st.none(),
    "dict[str, float]": NUMBERS,
}


def record(kind):
    """Return a strategy of records, each field drawn from what its annotation allows."""
    fields = {
        item.name: st.one_of([OF_TYPE[part] for part in str(item.type).split(" | ")])
        for item in dataclasses.fields(kind)
    }
    return st.builds(kind, **fields)


@given(st.one_of([record(kind) for kind in KINDS]))
def test_a_record_comes_back_from_its_line_of_json(one):
    assert records.from_json(json.loads(json.dumps(records.as_json(one)))) == one


@given(record(StepRecord))
def test_a_step_that_lost_its_way_comes_back_too(step):
    lost = dataclasses.replace(step, loss=float("nan"), grad_norm=float("inf"))
    back = records.from_json(json.loads(json.dumps(records.as_json(lost))))
    assert isinstance(back, StepRecord)
    assert back.loss != back.loss
    assert back.grad_norm == float("inf")


def test_every_kind_of_record_has_its_own_name():
    names = [records.as_json(one)["kind"] for one in (NoteRecord("x"), ValidationRecord(1, {}))]
    assert names == ["note", "validation"]
    assert set(records._KINDS.values()) == set(KINDS)


def test_a_kind_of_a_later_version_is_passed_over():
    assert records.from_json({"kind": "retry", "step": 1}) is None
    assert records.from_json({"step": 1}) is None


def test_a_field_of_a_later_version_is_passed_over():
    line = {**records.as_json(NoteRecord("said")), "colour": "green"}
    assert records.from_json(line) == NoteRecord("said")


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_cannot_be_changed(kind):
    fields = dataclasses.fields(kind)
    one = kind(**{item.name: None for item in fields})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, fields[0].name, 1)
    assert not hasattr(one, "__dict__")


def test_the_fields_of_the_contract_are_there():
    step = [
        "step",
        "samples_seen",
        "loss",
        "grad_norm",
        "lr",
        "global_batch_size",
        "microbatch_size",
        "accumulation_steps",
        "skipped",
        "retries",
        "data_s",
        "forward_s",
        "backward_s",
        "optimizer_s",
        "step_s",
        "allocated_peak_bytes",
        "reserved_peak_bytes",
        "noise_scale",
    ]
    assert [item.name for item in dataclasses.fields(StepRecord)][: len(step)] == step
    change = ["step", "before", "after", "what", "reason"]
    assert [item.name for item in dataclasses.fields(BatchChangeRecord)] == change
