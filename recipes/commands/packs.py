"""Commands that look at a concept pack: check and show."""

from typing import Annotated

import typer

from .flags import ANY_MODEL, Json, say, say_json
from .session import quiet_hub, settle

Pack = Annotated[str, typer.Argument(help="builtin:NAME or the folder of a pack.")]


def check(
    pack: Pack,
    model: Annotated[
        str | None, typer.Option(help=f"Model to count tokens by and to check against: {ANY_MODEL}.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a pack can be used for, before any weights.

    Every recipe, the audit with all its attacks, and every measurement is asked itself: it runs, it runs with less, or it
    does not run and says what to add.
    """
    from ...artifacts.reporting.terminal import terminal_width
    from ..concept import check as recipe

    settle()
    quiet_hub()
    checked = recipe.check(pack, model)
    if as_json:
        return say_json(checked.as_json())
    say(recipe.text(checked, terminal_width()))


def show(
    pack: Pack,
    rows: Annotated[int, typer.Option(min=0, help="Rows of each file to show.")] = 2,
    as_json: Json = False,
) -> None:
    """Show a pack's description, counts and first rows."""
    from ...artifacts.reporting.terminal import terminal_width
    from ..concept import show as recipe

    shown = recipe.show(pack, rows)
    if as_json:
        return say_json(shown)
    say(recipe.text(shown, terminal_width()))
