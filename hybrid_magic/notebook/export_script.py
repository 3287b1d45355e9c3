"""The text of an exported script: its parts, in the order in which a reader meets them.

Knows the statements and the step, and nothing of where they came from.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..adopt.arranging import Arranged
from ..adopt.names import bound
from ..adopt.pieces import DEFINITIONS, Piece, indented
from ..config import TrainConfig
from .export_step import Step

import ast  # isort: skip

_APART = {"val", "optimizer", "loss", "scheduler", "log", "o", "plain", "checkpoint", "resume",
          "processes"}  # fmt: skip
_OURS = ("step", "main", "read_arguments", "OPTIONS", "arguments", "first", "argparse", "os", "hm")
_MODULES = {"argparse": "argparse", "os": "os", "hm": "hybrid_magic", "torch": "torch"}

_DOCSTRING = '''r"""Train what {source} trained. Written by %hybrid_export.

    python {file}
    torchrun --standalone --nproc-per-node 2 {file}

On several machines the same line on each; HOST is one of them:

    torchrun --nnodes 2 --nproc-per-node gpu --rdzv-id 1 --rdzv-backend c10d \\
        --rdzv-endpoint HOST:29500 {file}

Under Slurm, the batch file for sbatch:

    #!/bin/bash
    #SBATCH --nodes=2
    #SBATCH --ntasks-per-node=1
    #SBATCH --gpus-per-node=4
    #SBATCH --cpus-per-task=16
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun torchrun --nnodes $SLURM_NNODES --nproc-per-node gpu --max-restarts 3 \\
        --rdzv-id $SLURM_JOB_ID --rdzv-backend c10d --rdzv-endpoint $head:29500 \\
        {file} --checkpoint checkpoints --resume
{said}"""'''

_DEVICE = """if __name__ == "__main__" and torch.cuda.is_available():
    # "cuda" is the GPU of this process: torchrun starts one for each
    torch.cuda.set_device(int({os}.environ.get("LOCAL_RANK", 0)))"""

_ARGUMENTS = """def {read_arguments}():
    parser = {argparse}.ArgumentParser(description="Train what a notebook trained.")
    parser.add_argument(
        "--checkpoint", metavar="DIR", default={checkpoint}, help="write checkpoints to DIR"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in DIR"
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        default={os}.path.splitext({os}.path.abspath(__file__))[0] + ".jsonl",
        help="write what the run did to FILE",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="write the trained weights, a state_dict, to FILE"
    )
    return parser.parse_args()"""

_TRAINING = """{first} = {os}.environ.get("RANK", "0") == "0"  # of torchrun's processes
try:
    {hm}.train(
{given}
    )
finally:
    if {first} and {hm}.last_run is not None:
        {hm}.last_run.save({arguments}.record)
        print({hm}.last_run.table())
if {first} and {arguments}.weights:
    torch.save({model}.state_dict(), {arguments}.weights)"""


@dataclass
class Script:
    """What a script is made of. `source` says where it is from, `said` more of its docstring."""

    file: str
    source: str
    said: list[str]
    arranged: Arranged
    step: Step
    config: TrainConfig

    def text(self) -> str:
        """Return the whole text."""
        parts = self.arranged
        own = self._names([*parts.module, *parts.main])
        nested = bool(self.step.text) and self._reads_of_main()
        said = "".join(f"\n{textwrap.fill(line, 99)}\n" for line in self.said)
        blocks = [_DOCSTRING.format(source=self.source, file=self.file, said=_quoted(said))]
        blocks.append(self._imports(own))
        top = _joined(parts.module, top=True)
        if "cuda" in top + _joined(parts.main, top=False):
            blocks.append(_DEVICE.format(**own))
        blocks += [top] if top else []
        gap = "\n" * bool(parts.module and isinstance(parts.module[-1].node, DEFINITIONS))
        blocks.append(f"{gap}{own['OPTIONS']} = {{{self._options()}}}")
        step = self.step.text.replace("def step(", f"def {own['step']}(", 1)
        body = [f"{own['arguments']} = {own['read_arguments']}()"]
        body += [_joined(parts.main, top=False)] if parts.main else []
        if self.step.interval is not None:
            name = self.step.names["scheduler"]
            body.append(f'{name}.interval = "{self.step.interval}"  # as the loop stepped it')
        body += [step] if nested else []
        body.append(self._training(own))
        text = "\n\n".join(blocks)
        definitions = [] if nested or not step else [step]
        definitions.append(_ARGUMENTS.format(checkpoint=_value(self.config.checkpoint), **own))
        definitions.append(f"def {own['main']}():\n" + indented("\n\n".join(body)))
        definitions.append(f'if __name__ == "__main__":\n    {own["main"]}()')
        return "\n\n\n".join([text, *definitions]) + "\n"

    def _names(self, pieces: Sequence[Piece]) -> dict[str, str]:
        """Return what our own names are called where the person's are not."""
        taken = set(self.step.names.values()).union(*(piece.binds for piece in pieces))
        for text in self.arranged.imports:
            alone = {_import_of(name) for name in _MODULES}
            taken |= set() if text in alone else bound(ast.parse(text))
        return {name: name + "_" * (name in taken) for name in _OURS}

    def _reads_of_main(self) -> bool:
        """Return whether the step reads what main() makes."""
        made = set().union(*(piece.binds for piece in self.arranged.main))
        return bool(self.step.needs() & made - {self.step.names["model"]})

    def _imports(self, own: dict[str, str]) -> str:
        theirs = self.arranged.imports
        ours = {name: _import_of(name, own.get(name, name)) for name in _MODULES}
        future = [text for text in theirs if text.startswith("from __future__")]
        first = [ours[name] for name in ("argparse", "os") if ours[name] not in theirs]
        last = [ours[name] for name in ("torch", "hm") if ours[name] not in theirs]
        if "torch" in set().union(*(bound(ast.parse(text)) for text in theirs)):
            last = last[-1:] if ours["hm"] in last else []
        groups = [future, first, [text for text in theirs if text not in future], last]
        return "\n\n".join("\n".join(group) for group in groups if group)

    def _options(self) -> str:
        given = {
            item.name: _value(getattr(self.config, item.name))
            for item in dataclasses.fields(TrainConfig)
            if item.name not in _APART and getattr(self.config, item.name) != item.default
        }
        if "device" in given:
            given["device"] = re.sub(r"cuda:\d+", "cuda", given["device"])
        given |= {name: text for name, text in self.step.options.items() if text.isdigit()}
        rows = "".join(f'    "{name}": {text},\n' for name, text in given.items())
        return rows and f"\n{rows}"

    def _training(self, own: dict[str, str]) -> str:
        step, names = self.step, self.step.names
        given = [names["model"], names["loader"]] + [own["step"]] * bool(step.text)
        roles = ("optimizer", "val", "loss", "scheduler")
        given += [f"{role}={names[role]}" for role in roles if role in names]
        given += [f"{k}={text}" for k, text in step.options.items() if not text.isdigit()]
        arguments = own["arguments"]
        given += [f"checkpoint={arguments}.checkpoint", f"resume={arguments}.resume"]
        given.append(f"**{own['OPTIONS']}")
        rows = "\n".join(f"        {each}," for each in given)
        return _TRAINING.format(given=rows, model=names["model"], **own)


def _quoted(text: str) -> str:
    return text.replace('"""', "'''")


def _import_of(name: str, called: str | None = None) -> str:
    module = _MODULES[name]
    return f"import {module}" + (f" as {called}" if (called or name) != module else "")


def _value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _joined(pieces: Iterable[Piece], *, top: bool) -> str:
    """Return statements below each other, as far apart as they were; definitions of a module two
    lines apart."""
    found = ""
    before: Piece | None = None
    for piece in pieces:
        if before is not None:
            defined = isinstance(piece.node, DEFINITIONS) or isinstance(before.node, DEFINITIONS)
            apart = piece.apart or piece.cell != before.cell
            found += "\n" * (3 if defined and top else 2 if defined or apart else 1)
        found += piece.text
        before = piece
    return found
