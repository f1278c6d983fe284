"""Flags that several commands share, and how they print.

Flags without a help text fill in a setting, whose docstring is shown in its place.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ANY_MODEL = "builtin:NAME, a Hub id[@revision], the folder of a model, a run or a PEFT adapter, or a .gguf file"

Text = Annotated[str | None, typer.Option()]
Whole = Annotated[int | None, typer.Option()]
Number = Annotated[float | None, typer.Option()]
Out = Annotated[Path | None, typer.Option()]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings, one KEY: VALUE a line.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
]
Device = Annotated[str, typer.Option(help="Device to compute on: auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="Type to compute in: auto, float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the unfinished work in --out.")]
Jobs = Annotated[
    str | None,
    typer.Option(
        metavar="ENGINE",
        help="Work beside each other: local:N for N processes on this machine, or slurm[:key=value,...] for a cluster,"
        " such as slurm:partition=gpu,time=2:00:00,gpus=1.",
    ),
]
Folder = Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint that excise wrote.")]


def say(text: str) -> None:
    """Print a result on stdout."""
    sys.stdout.write(text + "\n")
    # Into a pipe, the address of a page that goes on running would else stand in a buffer until it ends.
    sys.stdout.flush()


def say_json(content: Any) -> None:
    """Print a result as one line of JSON on stdout."""
    say(json.dumps(content))


def say_plan(content: dict[str, Any], as_json: bool) -> None:
    """Print what a dry run would touch."""
    from ...artifacts.reporting.terminal import plan, terminal_width

    if as_json:
        return say_json(content)
    memory = content.pop("memory", None)
    say(plan(content, terminal_width()))
    if memory:
        from ..common.memory_plan import in_words

        say("\n" + in_words(memory, terminal_width()))
