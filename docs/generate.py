"""Write the generated parts of the pages: settings, attacks, tables, commands, the Python API and the examples.

A generated part stands between two comments: one that starts with "generated:" and names the part, and one that says
"/generated". Everything else on a page is written by hand.

    python docs/generate.py            rewrites the parts in place
    python docs/generate.py --check    fails and names the pages whose parts are not what the code says today
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import excise

DOCS = Path(__file__).parent
PART = re.compile(r"(<!-- generated: ([a-z_]+) ?(\S*) -->\n).*?(<!-- /generated -->)", re.DOTALL)
SECTIONS = ("Args", "Returns", "Raises", "Yields", "Source", "Example", "Examples", "Attributes")


def _cell(text: object) -> str:
    """One cell of a table: one line, with its bars escaped."""
    return " ".join(str(text).split()).replace("|", r"\|")


def _table(header: tuple[str, ...], rows: Iterator[tuple[object, ...]] | list[tuple[object, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def settings(recipe: str) -> str:
    """Settings of a recipe that its siblings do not have first, then those that all recipes share."""
    from excise.recipes import RECIPES
    from excise.recipes.common.measured_run import MeasuredSettings

    kind = getattr(importlib.import_module(RECIPES[recipe].module), RECIPES[recipe].settings)
    shared = set(MeasuredSettings.model_fields) - {"concept"}
    rows = _setting_rows(kind)
    header = ("setting", "default", "what it does")
    first = _table(header, [row for row in rows if str(row[0]).strip("`") not in shared])
    rest = _table(header, [row for row in rows if str(row[0]).strip("`") in shared])
    return f"{first}\n\n{_budgets(kind)}\n\nEvery recipe also has these settings:\n\n{rest}"


def _budgets(kind: Any) -> str:
    """What each budget of a recipe sets."""
    sentences = []
    for name in ("quick", "long"):
        values = ", ".join(f"`{key}={value}`" for key, value in kind.set_by(name).items())
        sentences.append(f"`--budget {name}` sets {values}.")
    return " ".join([*sentences, "Settings that you give explicitly win."])


def audit_settings(_: str) -> str:
    from excise.recipes.audit.request import AuditSettings

    return _table(("setting", "default", "what it does"), _setting_rows(AuditSettings))


def _setting_rows(kind: Any) -> list[tuple[object, ...]]:
    from excise.recipes.common.settings import settings_help

    # A bare < would start a tag.
    return [
        (f"`{name}`", f"`{default}`" if default else "none", about.replace("<", "&lt;"))
        for name, default, about in settings_help(kind)
    ]


def recipes(_: str) -> str:
    from excise.recipes import RECIPES

    rows = [(f"[`{name}`]({name}.md)", f"{row.about[0].upper()}{row.about[1:]}") for name, row in RECIPES.items()]
    return _table(("recipe", "what it does"), rows)


def attacks(_: str) -> str:
    return _attacks_on("knowledge", "sees V or base")


def behaviour_attacks(_: str) -> str:
    return _attacks_on("behaviour", "has the base")


def _attacks_on(kind: Any, given: str) -> str:
    from excise.recipes.audit.attacks.table import ATTACKS, BUDGETS

    rows = []
    for name, attack in ATTACKS.items():
        if kind not in attack.kinds:
            continue
        smallest = next((budget for budget, row in BUDGETS.items() if name in row.attacks_on(kind)), "by name only")
        rows.append((attack.tier, f"`{name}`", attack.about, "yes" if attack.known else "no", smallest))
    rows.sort(key=lambda row: row[0])
    return _table(("tier", "attack", "what it does", given, "from budget"), iter(rows))


def budgets(_: str) -> str:
    from excise.recipes.audit.attacks.table import BUDGETS

    rows = [
        (f"`{name}`", len(row.attacks), row.steps, row.seeds, len(row.behaviour), row.prompts, row.other_prompts)
        for name, row in BUDGETS.items()
    ]
    headers = ("attacks", "steps of each training attack", "seeds of each", "attacks on a behaviour")
    return _table(("budget", *headers, "its held-out prompts", "its other prompts"), iter(rows))


def measurements(_: str) -> str:
    from excise.eval.measurements import MEASUREMENTS

    return _table(("measurement", "what it is"), [(f"`{name}`", kind.about) for name, kind in MEASUREMENTS.items()])


def architectures(_: str) -> str:
    from excise.editing.architectures import ARCHITECTURES

    return ", ".join(f"`{name}`" for name in sorted(ARCHITECTURES)) + "."


def formats(_: str) -> str:
    from excise.artifacts.checkpoints.sae import FORMATS

    rows = [
        (f"`{name}`", f"`{form.weights}`", f"`{form.about}`" if form.about else "none")
        for name, form in FORMATS.items()
    ]
    return _table(("format", "file of weights", "file of settings"), iter(rows))


def example(file: str) -> str:
    """A whole example file, which a test runs."""
    return f"```python\n{(DOCS / 'examples' / file).read_text(encoding='utf-8').rstrip()}\n```"


def commands(_: str) -> str:
    """Every command of the command line, from the same texts that --help shows."""
    import typer.main
    from excise.cli import app

    root: Any = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in _walk("excise", root) if not command.hidden)


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
        return
    for key, inner in command.commands.items():
        yield from _walk(f"{name} {key}", inner)


def _command(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join([name, *(piece for piece in command.collect_usage_pieces(context))])
    parts = [f"## {name}", inspect.cleandoc(command.help or ""), f"```\n{usage}\n```"]
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        record = parameter.get_help_record(context)
        if record and "--help" not in record[0]:
            rows.append((f"`{record[0]}`", record[1].replace("<", "&lt;")))
    if rows:
        parts.append(_table(("argument or option", "what it does"), iter(rows)))
    if command.epilog:
        parts.append(inspect.cleandoc(command.epilog))
    return "\n\n".join(part for part in parts if part)


def api(_: str) -> str:
    """Everything that ``import excise`` offers, from its docstrings."""
    return "\n\n".join(_documented(name, getattr(excise, name)) for name in getattr(excise, "__all__", ()))


def _documented(name: str, thing: Any) -> str:
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return f"## `{name}`\n\n`{name} = {thing!r}`" if isinstance(thing, str | int | float) else f"## {name}"
    kind = "class " if inspect.isclass(thing) else ""
    parts = [f"## {name}", f"```python\n{kind}{name}{_signature(thing)}\n```", _docstring(inspect.getdoc(thing) or "")]
    if inspect.isclass(thing):
        for inner, member in vars(thing).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if inner.startswith("_") or not (inspect.isfunction(function) or isinstance(function, property)):
                continue
            shown = f"{inner}{_signature(function)}" if inspect.isfunction(function) else inner
            about = _docstring(inspect.getdoc(member) or "")
            parts.append(f"### {name}.{inner}\n\n```python\n{shown}\n```\n\n{about}".rstrip())
    return "\n\n".join(part for part in parts if part)


def _signature(thing: Any) -> str:
    try:
        full = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    # What begins with an underscore is excise's own to pass.
    signature = str(full.replace(parameters=[p for name, p in full.parameters.items() if not name.startswith("_")]))
    if signature == "(*args: 'Any', **kwargs: 'Any') -> 'Any'":
        return ""
    shown = re.sub(r"<factory>|<excise\.\S+ object at 0x[0-9a-f]+>", "...", signature.replace("'", ""))
    shown = re.sub(r"\b(?:[a-z]\w*\.)+([A-Z]\w*)", r"\1", shown)
    if len(shown) < 100:
        return shown
    # One parameter a line; a comma inside brackets does not part two of them.
    inside, _, returned = shown.removeprefix("(").rpartition(")")
    pieces = re.split(r", (?![^\[(]*[\])])", inside)
    return "(\n    " + ",\n    ".join(pieces) + ",\n)" + returned


def _docstring(text: str) -> str:
    """Google style to Markdown: a section's name in bold, its entries as a list, examples as code."""
    lines: list[str] = []
    section, code = "", False
    for line in text.splitlines():
        bare = line.strip()
        head = bare.removesuffix(":")
        starts_section = bare.endswith(":") and head in SECTIONS and not line.startswith(" ")
        if code and (starts_section or not bare):
            lines, code = [*lines, "```"], False
        if starts_section:
            section = head
            lines += [f"**{section}**", ""]
        elif section in ("Example", "Examples") and bare and not code:
            lines, code = [*lines, "```python", line.removeprefix("    ")], True
        elif code:
            lines.append(line.removeprefix("    "))
        elif section in ("Args", "Raises", "Attributes") and re.match(r"    \S", line):
            lines.append(re.sub(r"^(\*{0,2}\w+):", r"- `\1`:", bare))
        else:
            lines.append(bare if section else line)
    text = "\n".join([*lines, "```"] if code else lines)
    # Docstrings mark code by two backticks, Markdown by one; three open a block.
    return re.sub(r"(?<!`)``(?!`)", "`", text)


PARTS: dict[str, Callable[[str], str]] = {
    "api": api,
    "architectures": architectures,
    "attacks": attacks,
    "behaviour_attacks": behaviour_attacks,
    "audit_settings": audit_settings,
    "budgets": budgets,
    "commands": commands,
    "example": example,
    "formats": formats,
    "measurements": measurements,
    "recipes": recipes,
    "settings": settings,
}


def fresh(page: str) -> str:
    """A page with its generated parts written anew."""

    def part(match: re.Match[str]) -> str:
        body = PARTS[match[2]](match[3])
        return f"{match[1]}\n{body}\n\n{match[4]}"

    return PART.sub(part, page)


def main(check: bool) -> None:
    stale = []
    for path in sorted(DOCS.rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = fresh(before)
        if after != before:
            stale.append(str(path.relative_to(DOCS.parent)))
            if not check:
                path.write_text(after, encoding="utf-8")
    if check and stale:
        raise SystemExit(f"out of date: {', '.join(stale)}; run python docs/generate.py and commit the result")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
