"""A run's story is data: it comes back from JSON as it was, and card and report show all of it."""

import json
import re

import numpy as np
import pytest
from excise.artifacts.reporting.card import write_card
from excise.artifacts.reporting.findings import declining, findings, limits
from excise.artifacts.reporting.pages import inline
from excise.artifacts.reporting.report import _tone, write_report
from excise.artifacts.reporting.results import measurements_as_json, summarize_all, table
from excise.artifacts.reporting.sections import Control, Section, Story, Table, bars, heat_map, lines, read_story
from excise.eval.statistics import Measurement, Scores


def _measured(name, split, subject, value, *, difference=None, better="lower"):
    moved = None if difference is None else {"value": sum(difference) / 2, "ci95": difference}
    return Measurement(name, split, subject, value, "share", better, 40, 0, (value - 0.01, value + 0.01), moved)


CONTROL = Control("without ablation", (_measured("multiple_choice", "forget_V", "edited", 0.777),), in_findings=True)
STORY = Story(
    "**What was edited.** Something in `base`, against *hostile <b>text</b>*.",
    findings=("Something else was seen.",),
    warnings=("Do not trust this.",),
    limits=("It cannot fly.",),
    sections=(
        Section(
            "A section of a new method", ("It did `this`.",), (Table(("a", "b"), (("1|2", "<i>3</i>"),), chosen=0),)
        ),
        Section(
            "Only on the page",
            figures=(
                bars("Bars", "", [1, 2, 3], "layer", "count"),
                lines("Lines", "about lines", {"forget": [(0, 0.1), (10, 0.2)]}, "strength", "accuracy", marker=10),
                heat_map(
                    "Grid",
                    "about the grid",
                    ["layer", "0", "1"],
                    ["-1"],
                    [[0.25], [None]],
                    [["fine"], ["too deep"]],
                    (0, 0),
                    higher_is_better=True,
                ),
            ),
            where=("report",),
        ),
    ),
    controls=(CONTROL,),
    tags=("unlearning",),
)


def _results(*, story=STORY, declines=(-0.01, 0.01)):
    measurements = [
        _measured("multiple_choice", "forget_V", "base", 0.95),
        _measured("multiple_choice", "forget_V", "edited", 0.105, difference=[-0.9, -0.8]),
        _measured("behaviour_rate", "neutral", "base", 0.025),
        _measured("behaviour_rate", "neutral", "edited", 0.525, difference=list(declines), better="base"),
    ]
    results = {
        "schema_version": 2,
        "measurements": measurements_as_json(measurements),
        "base": {"name": "base", "kind": "local", "revision": None, "license": None},
        "edited": {"how": "edited in a new way", "tensors_changed": 1, "tensors_declared": 2, "tied": False},
        "concept": {
            "ref": "builtin:potions",
            "name": "potions",
            "kind": "knowledge",
            "description": "potions",
            "decline_phrases": ["no"],
        },
        "samples": [{"split": "concept", "prompt": "p", "base": "b", "edited": "e"}],
        "run": {
            "recipe": "new",
            "seed": 0,
            "device": "cpu",
            "dtype": "float32",
            "command": "excise run new",
            "settings": {"max_new_tokens": 7},
        },
    }
    # Through JSON, as a published checkpoint has it.
    return json.loads(json.dumps(results if story is None else {**results, "story": story.as_json()}))


def test_a_story_comes_back_from_json_as_it_was():
    assert read_story(_results()) == STORY
    assert read_story(_results(story=None)) == Story()


def test_findings_lead_with_held_out_questions_and_name_the_control_beside_them():
    found = findings(_results())
    assert found[0] == (
        "Held-out questions (V): 0.950 → 0.105 [0.095, 0.115], n = 40; without ablation 0.777 [0.767, 0.787]."
    )
    assert found[1:] == ["Something else was seen.", "Do not trust this."]
    assert all(len(line) <= 120 for line in found)


@pytest.mark.parametrize(("declines", "says"), [((0.4, 0.6), True), ((-0.01, 0.01), False)])
def test_a_changed_rate_of_declining_is_said_plainly_and_an_unchanged_one_too(declines, says):
    results = _results(declines=declines)
    assert ("**The edit changed how often the model declines**" in declining(results)) == says
    assert ("No change in how often the model declines is shown" in declining(results)) != says
    assert ("the 95% intervals of the difference allow one of 0.010." in declining(results)) != says
    assert any("changed how often the model declines" in line for line in findings(results)) == says
    assert "0.025 → 0.525 [0.515, 0.535], n = 40" in declining(results)


def test_limits_say_what_was_not_tested_until_it_was():
    assert limits(_results())[0] == "It cannot fly." and "not tested" in limits(_results())[1]
    assert not any("not tested" in line for line in limits(_results(), audited=True))


def test_card_and_report_show_all_that_a_method_they_have_never_heard_of_says(tmp_path):
    write_card(tmp_path, _results(), [])
    write_report(tmp_path / "report.html", _results(), [])
    card, page = ((tmp_path / name).read_text() for name in ("README.md", "report.html"))
    for text in ("A section of a new method", "Do not trust this.", "It cannot fly.", "without ablation", "0.777"):
        assert text in card and text in page, text
    assert "- unlearning\n" in card and "| 1\\|2 | &lt;i>3&lt;/i> |" in card
    # Only a page has drawings, and what else is for a page alone.
    assert "Only on the page" not in card and "Only on the page" in page
    assert page.count("<svg role=") == 2 and "about the grid" in page and 'title="too deep"' in page and "0.25" in page
    assert "<em>hostile &lt;b&gt;text&lt;/b&gt;</em>" in page and "<i>3" not in page
    # Groups T and V are explained where they appear.
    assert "held out" in card and "held out" in page


def test_files_without_a_story_still_give_a_card_and_a_report(tmp_path):
    write_card(tmp_path, _results(story=None), [])
    write_report(tmp_path / "report.html", _results(story=None), [])
    card, page = ((tmp_path / name).read_text() for name in ("README.md", "report.html"))
    assert (
        "`base` was edited in a new way" in card and "0.105 [0.095, 0.115]" in card and "0.105 [0.095, 0.115]" in page
    )
    assert "A section of a new method" not in card + page


def test_the_card_loads_the_model_in_one_line_and_asks_it_as_it_was_trained_to_be_asked(tmp_path):
    write_card(tmp_path, _results(), [])
    plain = _code((tmp_path / "README.md").read_text())
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    write_card(tmp_path, _results(), [])
    chat = _code((tmp_path / "README.md").read_text())
    assert "apply_chat_template" in chat and "apply_chat_template" not in plain
    for code in (plain, chat):
        compile(code, "card", "exec")
        assert 'model = AutoModelForCausalLM.from_pretrained(".")\n' in code
        # A page of the Hub cuts what is longer.
        assert max(map(len, code.splitlines())) <= 80
        assert "max_new_tokens=7" in code


def test_marks_become_html_and_nothing_else_does():
    assert inline("**a** and `b*c*` <script>") == "<strong>a</strong> and <code>b*c*</code> &lt;script&gt;"
    assert inline("3 * 4 * 5") == "3 * 4 * 5"


def _code(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


def _rows(differences, p=None):
    """A table of measurements with these differences: value and half-width."""
    measurements = []
    for number, (value, half) in enumerate(differences):
        moved = {"value": value, "ci95": [value - half, value + half]} | ({} if p is None else {"p": p[number]})
        name = f"task_{number:02}"
        measurements.append(Measurement(name, "acc", "edited", 0.5, "accuracy", "lower", 40, 0, (0.4, 0.6), moved))
    return table(measurements)


def test_of_many_differences_only_those_that_stand_when_all_are_tested_together_count():
    """By themselves each of 20 intervals leaves out 0, at p = 0.04; the last one lies far from it."""
    barely, clear = (0.1, 0.0954), (0.1, 0.04)
    assert [row.moved for row in _rows([barely])] == [True]
    assert [row.moved for row in _rows([barely] * 19 + [clear])] == [False] * 19 + [True]
    assert [_tone(row) for row in _rows([barely] * 2 + [clear])] == ["", "", "worse"]
    # Where the file has p, it decides; an interval that holds 0 refuses nothing.
    assert [row.moved for row in _rows([clear, clear, (0.1, 0.2)], p=[1e-4, 0.03, 1e-4])] == [True, False, False]


def test_without_any_effect_one_report_in_twenty_at_most_colours_anything():
    rng, coloured, alone = np.random.default_rng(0), 0, 0
    for _ in range(200):
        scores = {"base": [], "edited": []}
        for number in range(17):
            for subject in scores:
                totals = tuple((rng.random(40) < 0.5).astype(float))
                one = Scores(
                    f"task_{number}", "acc", "accuracy", "lower", tuple(map(str, range(40))), totals, (1.0,) * 40
                )
                scores[subject].append(one)
        rows = table(summarize_all(scores))
        coloured += any(map(_tone, rows))
        alone += any(low > 0 or high < 0 for low, high in (row.edited.difference["ci95"] for row in rows))
    assert coloured <= 0.08 * 200 and alone > 0.4 * 200
