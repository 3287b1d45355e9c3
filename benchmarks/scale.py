"""What would it take on 1 to 1,024 devices, and where does a larger batch stop paying?

    OMP_NUM_THREADS=1 python -m benchmarks.scale [--measure] [--work NAME] [--between LINK] ...

A calculation (`scale_model`) from published or given facts (`scale_ranks`); no cluster was touched.
`--measure` checks its small end: up to three local gloo processes, predicted and measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from hybrid_magic.engine.setup import GROWTH
from hybrid_magic.policy.facts import Settings
from hybrid_magic.report import palette

from . import measure, scale_model, scale_ranks
from .scale_model import DEVICES, Asked, Cluster, Link, Work
from .scale_ranks import BETWEEN, LINKS, NOTES, OVERHEAD_S, SMALL_END, WORKS

HERE = pathlib.Path(__file__).parent
Row = dict[str, Any]

BATCH, STEP = "{batch:,} (x{lr_factor:.2f})", "{ms:.0f}, {goodput:,.0f}, {comm:.0f} %"
COLUMNS = {  # title: way, what is shown
    "fixed: ms, goodput, comm.": ("fixed batch", STEP),
    "policy: batch (LR)": ("policy", BATCH),
    "policy: ms, goodput, comm.": ("policy", STEP),
    "of the best": ("policy", "{best:.0f} %"),
    "goodput alone: batch (LR)": ("goodput alone", BATCH),
    "goodput alone: efficiency, goodput": ("goodput alone", "{efficiency:.2f}, {goodput:,.0f}"),
    "weak: samples/s, efficiency": ("weak scaling", "{samples_per_second:,.0f}, {efficiency:.2f}"),
}
PAYING = """## Where it stops paying

The policy *pays* while every doubling of the devices gives at least {pays} times the
goodput, that is half of what it could; its *ceiling* is where noise scale or 16 x base stop it.
"""


def asked_of(work: Work, bucket: int | None) -> Asked:
    """Return what the package asks of its policy unless told otherwise."""
    usual = Settings(base=work.base, max_batch=GROWTH * work.base)
    return Asked(usual.efficiency, usual.max_batch, bucket)


def rows(work: Work, cluster: Cluster, bucket: int | None) -> Iterator[Row]:
    """Yield the steps of every way on every number of devices."""
    asked = asked_of(work, bucket)
    for devices in DEVICES:
        found = scale_model.ways(work, cluster, devices, asked)
        top = scale_model.best(work, cluster, devices, asked)
        for way, one in found.items():
            if one is not None:
                line = {"work": work.name, "overlap": bucket is not None, "way": way}
                line |= scale_model.row(work, one)
                share = scale_model.goodput(work, one) / scale_model.goodput(work, top or one)
                yield line | ({"of_best": share} if way == "policy" else {})


def verdicts(work: Work, clusters: Sequence[Cluster], bucket: int | None) -> Iterator[Row]:
    """Yield where the policy stops paying, by link, without overlap, and by noise scale."""
    cases = [(work, *pair) for pair in itertools.product(clusters, dict.fromkeys((bucket, None)))]
    cases += [(replace(work, noise=n * work.noise), clusters[0], bucket) for n in (0.1, 10)]
    for one, cluster, how in cases:
        links = f"{cluster.inside.name}, {cluster.between.name}"
        line = {"work": work.name, "links": links, "overlap": how is not None, "noise": one.noise}
        yield line | scale_model.verdict(one, cluster, asked_of(one, how))


def sentence(line: Row) -> str:
    """Return a verdict in words."""
    pays, ceiling, half = line["pays_to"], line["ceiling_at"], line["half_at"]
    rests = "nowhere" if ceiling is None else f"from {_devices(ceiling)} on"
    over = "nowhere" if half is None else f"from {_devices(half)} on"
    held = line["held_by_accumulation"]
    needed = f"it holds the base batch on up to {_devices(held)}, and " if held else ""
    return (
        f"{line['work']}, {line['links']}, noise scale {line['noise']:,.0f}: the policy pays up to "
        f"{_devices(pays['policy'])} (a fixed batch to {pays['fixed batch']:,}, goodput alone to "
        f"{pays['goodput alone']:,}). It rests at its ceiling of {line['ceiling']:,.0f} samples "
        f"{rests}; communication is over half of its step {over}. Accumulation: {needed}beyond "
        f"full micro-batches it gains {_accumulation(line)}."
    )


def _devices(n: int) -> str:
    return f"{n:,} device{'s' if n > 1 else ''}"


def _accumulation(line: Row) -> str:
    helps = line["accumulation"]
    if not helps:
        return "under 3 % everywhere"
    most = max(helps, key=lambda n: helps[n][1])
    return f"{100 * helps[most][1]:.0f} % with {helps[most][0]} steps on {_devices(most)}"


def _verdict_cells(line: Row) -> Row:
    at = {"ceiling at": line["ceiling_at"], "comm. over half at": line["half_at"]}
    return {
        "work": line["work"],
        "links": line["links"] + ("" if line["overlap"] else ", no overlap"),
        "noise": f"{line['noise']:,.0f}",
        **{name: "-" if n is None else f"{n:,}" for name, n in at.items()},
        **{f"{way} pays to": f"{n:,}" for way, n in line["pays_to"].items()},
        "accumulation gains at most": _accumulation(line),
    }


def _shown(lines: list[Row], work: str) -> list[Row]:
    """Return one work's rows as a table: a line for a number of devices."""
    of = {(one["devices"], one["way"]): one for one in lines if one["work"] == work}
    return [
        {"devices": f"{n:,}"}
        | {title: _cell(of.get((n, way)), form) for title, (way, form) in COLUMNS.items()}
        for n in DEVICES
    ]


def _cell(line: Row | None, form: str) -> str:
    if line is None:
        return "-"
    shares = {"comm": 100 * line["exposed_ratio"], "best": 100 * line.get("of_best", 1)}
    return form.format(ms=1000 * line["step_s"], **shares, **line)


def reduces(work: Work, cluster: Cluster) -> list[Row]:
    """Return the seconds of one all-reduce of all gradients by algorithm between machines."""
    of = {f"{name}, ms": replace(cluster, algorithm=name) for name in scale_model.ALGORITHMS}
    taken = lambda one, n: 1000 * scale_model.all_reduce(one, n, work.gradient_bytes)
    cells = lambda n: {name: f"{taken(one, n):.1f}" for name, one in of.items()}
    return [{"work": work.name, "devices": f"{n:,}"} | cells(n) for n in (8, 64, 1024)]


def figure(lines: list[Row]) -> Figure:
    """Return goodput and the share of communication over devices, a column for each work."""
    works = list(dict.fromkeys(line["work"] for line in lines))
    looks = {
        "fixed batch": (palette.FAINT, "s"), "policy": (palette.BLUE, "o"),
        "goodput alone": (palette.ORANGE, "D"), "weak scaling": (palette.GREEN, "^"),
    }  # fmt: skip
    with mpl.rc_context(palette.STYLE):
        sheet = Figure(figsize=(4.2 * len(works), 6.4), dpi=110, layout="constrained")
        axes = sheet.subplots(2, len(works), sharex=True, sharey="row", squeeze=False)
        for (top, bottom), work in zip(axes.T, works, strict=True):
            own = [line for line in lines if line["work"] == work]
            first = next(line["goodput"] for line in own if line["way"] == "fixed batch")
            for way, (colour, mark) in looks.items():
                found = [line for line in own if line["way"] == way]
                x = [line["devices"] for line in found]
                style = {"color": colour, "marker": mark, "ms": 5, "label": way}
                top.plot(x, [line["goodput"] / first for line in found], **style)
                bottom.plot(x, [100 * line["exposed_ratio"] for line in found], **style)
            top.plot(DEVICES, DEVICES, color=palette.INK, lw=1, ls=(0, (4, 3)), label="linear")
            top.set(title=work, xscale="log", yscale="log")
            top.set_xscale("log", base=2)
            bottom.axhline(50, color=palette.INK, lw=1, ls=(0, (4, 3)))
            bottom.set(xlabel="devices", xticks=DEVICES[::2], xticklabels=DEVICES[::2])
        axes[0][0].set_ylabel("goodput, of one device")
        axes[1][0].set(ylabel="communication, % of a step", ylim=(0, 100))
        sheet.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        sheet.draw_without_rendering()
    return sheet


def page(found: Row) -> str:
    """Return the results as Markdown."""
    two = lambda value: f"{value:.2f}" if isinstance(value, float) else value
    beside = [{name: two(x) for name, x in line.items()} for line in found["published"]]
    works = dict.fromkeys(line["work"] for line in found["rows"])
    first = {line["work"]: line for line in reversed(found["verdicts"])}
    parts = ["# Scale on paper\n", measure.header(found["environment"])]
    parts += [found["assumptions"]["notes"]]
    if found["small_end"]:
        told = SMALL_END.format(n=found["small_end"][0]["measured, ms"].n)
        parts += [told, measure.table(found["small_end"])]
    parts += ["## Throughput over one device's, published and calculated\n"]
    parts += [measure.table(beside), _reached(found["published"])]
    for work in works:
        parts += [f"## {work}: {first[work]['links']}\n"]
        parts += [measure.table(_shown(found["rows"], work))]
    picture = "![Goodput and share of communication by number of devices](scale.png)\n"
    parts += [picture, PAYING.format(pays=scale_model.PAYS)]
    parts += ["\n".join(f"- {sentence(first[work])}" for work in works) + "\n"]
    parts += [measure.table([_verdict_cells(line) for line in found["verdicts"]])]
    parts += ["## One all-reduce of all gradients\n", measure.table(found["reduces"])]
    return "\n".join(parts)


def _reached(lines: list[Row]) -> str:
    of = lambda name: [100 * line["published"] / line[name] for line in lines]
    shares = {name: of(name) for name in ("calculated", "no overlap")}
    told = (f"{min(x):.0f} to {max(x):.0f} % of *{name}*" for name, x in shares.items())
    return f"Published is {' and '.join(told)}: the rest is what was left out or assumed.\n"


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="three local processes")
    parser.add_argument("--work", action="append", choices=WORKS, help="default: all")
    parser.add_argument("--between", action="append", help="links between machines")
    parser.add_argument("--inside", help="link inside a machine (default: the card's)")
    parser.add_argument("--link", action="append", type=_link, default=[], help="NAME=S,BYTES/S")
    parser.add_argument("--per-machine", type=_count, default=8)
    parser.add_argument("--bucket", type=int, default=scale_model.BUCKET, help="0: no overlap")
    parser.add_argument("--points", type=_points, help="SIZE:SECONDS,... of every work")
    counts = dict.fromkeys(("micro", "base", "gradient-bytes"), _count)
    for name, kind in {**counts, "optimizer-s": float, "noise": float}.items():
        parser.add_argument(f"--{name}", type=kind, help="of every work")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "scale.json")
    asked = parser.parse_args(given)
    asked.links = LINKS | {link.name: link for link in asked.link}
    for name in [*(asked.between or ()), *([asked.inside] if asked.inside else ())]:
        if name not in asked.links:
            parser.error(f"no link {name!r}; take one of {', '.join(asked.links)}, or give --link")
    return asked


def _link(text: str) -> Link:
    name, latency, rate = re.split("[=,]", text)
    return Link(name, float(latency), float(rate))


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count; give 1 or more")
    return int(text)


def _points(text: str) -> tuple[tuple[int, float], ...]:
    pairs = (part.split(":") for part in text.split(","))
    return tuple((int(size), float(seconds)) for size, seconds in pairs)


def calculated(asked: argparse.Namespace, small: tuple[Work, Link] | None) -> Row:
    """Return every number of the page but those measured."""
    between = [asked.links[name] for name in asked.between or BETWEEN]
    names = ("points", "micro", "base", "gradient_bytes", "optimizer_s", "noise")
    told = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    works = [
        (replace(WORKS[name][0], **told), asked.links[asked.inside or WORKS[name][1]])
        for name in asked.work or WORKS
    ]
    works += [small] if small else []
    bucket = asked.bucket or None
    found: Row = {"rows": [], "verdicts": [], "reduces": []}
    for work, inside in works:
        pairs = [*((inside, link) for link in between), (LINKS["PCIe 3 x16"], between[0])]
        clusters = [Cluster(*pair, per_machine=asked.per_machine) for pair in pairs]
        found["rows"] += rows(work, clusters[0], bucket)
        found["verdicts"] += verdicts(work, clusters, bucket)
        found["reduces"] += reduces(work, clusters[0])
    speeds = "; ".join(
        f"{x.name} {x.bytes_per_s / 1e9:.3g} GB/s, {1e6 * x.latency_s:.3g} us"
        for x in dict.fromkeys([*(inside for _, inside in works), *between])
    )
    notes = NOTES.format(
        per_machine=asked.per_machine, bucket=asked.bucket / 2**20, links=speeds,
        overhead_ms=1000 * OVERHEAD_S, efficiency=asked_of(works[0][0], bucket).efficiency,
    )  # fmt: skip
    return found | {"assumptions": {"notes": notes, "works": [asdict(work) for work, _ in works]}}


def main(given: Sequence[str] | None = None) -> None:
    asked = arguments_of(given)
    words = list(sys.argv[1:] if given is None else given)
    if "--json" in words:
        del words[(at := words.index("--json")) : at + 2]
    command = shlex.join(["python", "-m", "benchmarks.scale", *words])
    plan = scale_ranks.Plan()
    facts, small, lines, raw = measure.environment(command, str(plan.seed)), None, [], None
    if asked.measure:
        raw = scale_ranks.measured(plan)
        link, lines = scale_ranks.compared(raw, plan, facts["cores"])
        small = (scale_ranks.here(raw, plan), link)
    found = {"environment": facts, "small_end": lines, "measured": raw}
    found |= calculated(asked, small) | {"published": scale_ranks.published(asked.bucket or None)}
    text, kept = page(found), json.dumps(found, indent=1, default=measure.plain)
    asked.json.write_text(kept + "\n", encoding="utf-8")
    asked.json.with_suffix(".md").write_text(text, encoding="utf-8")
    figure(found["rows"]).savefig(asked.json.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
