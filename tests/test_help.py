"""Every help text says what its thing does, in few words, and fits the terminal."""

import importlib
import re

import pytest
from excise.artifacts.reporting.terminal import aligned, bullets, listed
from excise.cli import app
from excise.recipes import RECIPES
from excise.recipes.commands.help import COMMAND_SETTINGS, settings_of
from excise.recipes.common.settings import settings_help
from typer.main import get_command

LONGEST = 200
"""Characters of a help text."""
FEWEST = 3
"""Words of a help text: fewer name a thing and do not say what it does."""
GROUP = get_command(app)


def _commands(group=GROUP, path="excise"):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


COMMANDS = dict(_commands())


def _context(command):
    return command.make_context("x", [], resilient_parsing=True)


def _wrong(text):
    """What is wrong with a help text, or nothing."""
    plain = re.sub(r"\\([^)]*\\)", "", text).split(" One of ")[0]
    if not text:
        return "it is empty"
    if len(text) > LONGEST:
        return f"it has {len(text)} characters"
    if len(re.findall(r"[A-Za-z]{2,}", plain)) < FEWEST:
        return "it does not say what the setting does"
    return None


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_and_flag_has_a_help_text(path):
    command = COMMANDS[path]
    first = (command.help or "").split("\n\n")[0]
    assert not _wrong(first) and len(first) <= 66, first
    wrong = {param.name: _wrong(param.help or "") for param in command.get_params(_context(command))}
    assert not {name: problem for name, problem in wrong.items() if problem and name != "help"}


@pytest.mark.parametrize("path", COMMANDS)
def test_every_help_page_fits_80_columns_but_for_the_example(path):
    context = _context(COMMANDS[path])
    context.terminal_width = 80
    page = COMMANDS[path].get_help(context)
    assert [line for line in page.splitlines() if len(line) > 80 and not line.startswith("Example")] == []


@pytest.mark.parametrize("name", [*RECIPES, "audit", "eval", "sweep"])
def test_every_setting_says_what_it_does(name):
    wrong = {setting.name: _wrong(setting.about.split(" One of ")[0]) for setting in settings_of(name)}
    assert {setting: problem for setting, problem in wrong.items() if problem} == {}


@pytest.mark.parametrize("name", [*RECIPES, "audit", "eval", "sweep"])
def test_settings_read_from_source_are_those_of_the_class(name):
    module, kind = (RECIPES[name].module, RECIPES[name].settings) if name in RECIPES else COMMAND_SETTINGS[name]
    read = [(setting.name, setting.default, setting.about) for setting in settings_of(name)]
    assert read == settings_help(getattr(importlib.import_module(module), kind))


def test_the_help_of_a_recipe_shows_its_settings_and_that_of_run_none():
    command = COMMANDS["excise run"]
    pages = {}
    for words in (["elm", "--help"], ["--help"]):
        context = command.context_class(command, info_name="run")
        context.meta["excise.settings"] = next((word for word in words if word in RECIPES), None)
        pages[len(words)] = command.get_help(context)
    assert "Settings of elm" in pages[2] and "retain_weight = " in pages[2]
    assert "Settings of" not in pages[1]


ROWS = [
    ["right answers", "0.100 [0.000, 0.200]", "0.900 [0.800, 1.000]"],
    ["margin of the true choice", "1.0 [0.9, 1.1]", "2.0 [1.9, 2.1]"],
]


def test_a_narrow_table_gives_up_intervals_from_the_left_before_it_folds_words():
    header = ["measurement", "base", "edited"]
    whole = aligned(header, ROWS, None)
    assert all(line == line.rstrip() for line in whole.splitlines()) and "[0.000, 0.200]" in whole
    some = aligned(header, ROWS, 60)
    assert "[0.000, 0.200]" not in some and "[0.800, 1.000]" in some and len(some.splitlines()) == 3
    narrow = aligned(header, ROWS, 34)
    assert max(map(len, narrow.splitlines())) <= 34 and "[" not in narrow and "margin of the" in narrow


@pytest.mark.parametrize("width", [40, 80, 120])
def test_nothing_is_wider_than_the_terminal(width):
    about = "what a thing does, in rather more words than fit into one line of a narrow terminal"
    for text in (listed(("name", "about"), [("a_name", about)], width), bullets([about], width)):
        assert max(map(len, text.splitlines())) <= width
    assert listed(("name", "about"), [("a_name", about)], None) == f"a_name\t{about}"
