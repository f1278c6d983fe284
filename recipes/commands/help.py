"""Help pages: commands in panels, and flags and settings described by the settings' own docstrings."""

import inspect
import textwrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

from .. import RECIPES
from .settings_source import Setting, read_settings

PANELS = ("Edit", "Measure", "Look", "Publish", "Testbed")
COMMAND_SETTINGS = {
    "audit": ("excise.recipes.audit.recipe", "AuditSettings"),
    "eval": ("excise.recipes.evaluate", "EvaluateSettings"),
    "search": ("excise.recipes.common.measured_run", "MeasuredSettings"),
    "sweep": ("excise.recipes.sweep.request", "SweepSettings"),
    "run": ("excise.recipes.common.measured_run", "MeasuredSettings"),
}
"""Where the settings of commands are defined; those of ``run RECIPE`` are the recipe's."""


def settings_of(name: str) -> list[Setting]:
    """The settings of a recipe or command, read without importing them."""
    recipe = RECIPES.get(name)
    return read_settings(recipe.module, recipe.settings) if recipe else read_settings(*COMMAND_SETTINGS[name])


class PanelGroup(TyperGroup):
    """Lists its commands by panel; a bare ``excise`` prints its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            args = ["--help"]
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        for panel in PANELS:
            rows = [(name, c.get_short_help_str(90)) for name, c in commands if c and _panel(c) == panel]
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_epilog(self.epilog, formatter)


class SettingsCommand(TyperCommand):
    """A command whose flags fill in settings: a flag's help is its setting's docstring, and the other settings
    follow."""

    def get_params(self, ctx: Any) -> list[Any]:
        about = {setting.name: setting.about for setting in settings_of(self.name or "")}
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "help", "") is None and param.name in about:
                setattr(param, "help", about[param.name])  # noqa: B010  a base class without the attribute is declared
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # `--help` ends the parsing, so the recipe is looked for before it.
        words = [word for word in args if word in RECIPES] if self.name in ("run", "search") else [self.name or ""]
        ctx.meta["excise.settings"] = words[0] if words else None
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if name := ctx.meta.get("excise.settings"):
            flags = {param.name for param in self.get_params(ctx)}
            rest = [setting for setting in settings_of(name) if setting.name not in flags]
            if rest:
                places = "lines of the file" if name == "sweep" else "--set KEY=VALUE, or lines of --config"
                with formatter.section(f"Settings of {name} ({places})"):
                    formatter.write_dl([(f"{s.name} = {s.default}" if s.default else s.name, s.about) for s in rest])
        _write_epilog(self.epilog, formatter)


def _panel(command: Any) -> str:
    panel = getattr(command, "rich_help_panel", None)
    return panel if panel in PANELS else PANELS[0]


def _write_epilog(epilog: str | None, formatter: Any) -> None:
    """Each line of an epilog as it stands, so that commands can be copied."""
    if not epilog:
        return
    formatter.write_paragraph()
    for line in inspect.cleandoc(epilog).splitlines():
        whole = line.startswith(("Example", "  "))
        formatter.write((line if whole else textwrap.fill(line, max(formatter.width, 20))) + "\n")
