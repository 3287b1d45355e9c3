"""The benchmark of watching runs, on blocks of a moment, and writes every field."""

from __future__ import annotations

import json

import pytest

from benchmarks import overhead
from hybrid_magic.engine import watch
from hybrid_magic.telemetry.sampling import Telemetry


@pytest.mark.thorough
def test_the_benchmark_of_watching_writes_every_field_and_puts_back_what_it_times(tmp_path, capsys):
    saved, found = tmp_path / "overhead.json", Telemetry._watch
    overhead.main(["--seconds", "0.1", "--rounds", "1", "--json", str(saved)])
    written = json.loads(saved.read_text())
    rows = {row["measure"]: row for row in written["rows"]}
    assert rows["the same weights, bit by bit"]["met"] is True
    thread = rows["telemetry: its thread's own CPU time, share of a run"]
    assert thread["found"]["value"] > 0
    assert "stage timing: time, ratio" in rows
    assert [one["how"] for one in written["turns"]] == list(overhead.ORDER)
    readings = [one["readings"] > 0 for one in written["turns"]]
    assert readings == [how == "telemetry" for how in overhead.ORDER]
    assert saved.with_suffix(".md").read_text().strip() == capsys.readouterr().out.strip()
    assert Telemetry._watch is found
    assert watch.watching is True
