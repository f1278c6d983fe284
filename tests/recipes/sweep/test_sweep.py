"""A sweep's grid, what is checked before any run, and its means."""

import json
import math

import pytest
from excise.editing.errors import RequestError
from excise.recipes.jobs.job import Job, Outcome
from excise.recipes.sweep.recipe import Sweep, SweepSettings, describe, prepare
from excise.recipes.sweep.request import combinations_of
from excise.recipes.sweep.table import lines_of, mean_of, text
from helpers import SMALL_TESTBED, excise, run_on_knowledge

T_975 = {1: 12.7062, 2: 4.3027, 4: 2.7764}
"""From a printed table of Student's t."""
GRID = {"questions": 20, "strength": [0.5, 1.0], "layers": [[1, 2], [3]]}


def _settings(**more):
    return SweepSettings(recipe="orthogonalize", model=SMALL_TESTBED, concept="builtin:potions", **more)


def test_lists_are_a_grid_and_a_list_in_a_list_is_a_value():
    made = combinations_of({"a": [1, 2], "b": "x", "c": [[1, 2], [3]]})
    assert [one.values for one in made] == [{"a": a, "b": "x", "c": c} for a in (1, 2) for c in ([1, 2], [3])]
    assert [one.name for one in made] == ["a=1,c=1-2", "a=1,c=3", "a=2,c=1-2", "a=2,c=3"]
    assert [one.name for one in combinations_of({})] == [""]


def test_names_that_would_be_alike_are_numbered_and_hold_no_folder():
    names = [one.name for one in combinations_of({"model": ["a/b", "a-b", "../../etc", "x" * 300, "x" * 301]})]
    assert len(set(names)) == 5 and not any("/" in name or len(name) > 130 for name in names)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"set": {"kl_prompt": [1, 2]}}, r"set: kl_prompt=1: unknown key 'kl_prompt' \(did you mean 'kl_prompts'\?\)"),
        ({"set": {"questions": [20, -1]}}, "questions: got -1"),
        ({"set": {"seed": [1, 2]}}, "seed is not set by a sweep; give seeds"),
        ({"set": {"questions": []}}, "questions holds no value"),
        ({"set": {"questions": [3, 3]}}, "questions holds a value twice"),
        ({"seeds": [1, 1]}, "seeds: 1 stands twice"),
        ({"jobs": "local"}, "give the number of processes at once"),
        ({"concept": "builtin:potion"}, "did you mean 'potions'"),
    ],
)
def test_mistakes_are_told_before_any_run(more, message, tmp_path):
    with pytest.raises(RequestError, match=message):
        prepare(SweepSettings(**{"recipe": "orthogonalize", "model": SMALL_TESTBED, "out": tmp_path / "x", **more}))
    assert not (tmp_path / "x").exists()


def test_a_recipe_that_is_missing_or_unknown_and_a_folder_in_use_are_one_line(tmp_path):
    for recipe, message in (("", "recipe: missing; write recipe: NAME"), ("elmm", r"did you mean 'elm'\?")):
        with pytest.raises(RequestError, match=message):
            prepare(SweepSettings(recipe=recipe))
    (tmp_path / "other").write_text("mine")
    with pytest.raises(RequestError, match="exists already and is no sweep"):
        prepare(_settings(out=tmp_path))


def test_a_dry_run_lists_every_run_and_makes_nothing(tmp_path):
    job = prepare(_settings(set={"kl_prompts": [2, 3], "questions": 20}, seeds=[0, 7], out=tmp_path / "s"))
    plan = describe(job)
    assert [run["name"] for run in plan["runs"]] == [f"kl_prompts={k},seed={s}" for s in (0, 7) for k in (2, 3)]
    words = " ".join(plan["runs"][3]["command"])
    assert words.endswith("--concept builtin:potions --seed 7 --set kl_prompts=3 --set questions=20")
    (tmp_path / "s.yaml").write_text("recipe: orthogonalize\nset:\n  kl_prompts: [2, 3]\n")
    done = excise("sweep", tmp_path / "s.yaml", "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["combinations"] == 2, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


@pytest.mark.parametrize("values", [[0.2, 0.3, 0.4], [1.0, 0.5], [0.1, 0.1, 0.7, 0.3, 0.9]])
def test_means_have_students_interval(values):
    n = len(values)
    mean = sum(values) / n
    half = T_975[n - 1] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    found = mean_of(values)
    assert found.value == pytest.approx(mean) and found.ci95 == pytest.approx((mean - half, mean + half), abs=1e-4)
    assert mean_of([0.5]).ci95 is None and str(mean_of([0.5])) == "0.500"


def test_a_failed_run_is_counted_and_its_combination_is_a_mean_of_the_others(tmp_path):
    job = prepare(_settings(set={"kl_prompts": [2, 3]}, seeds=[0, 1], out=tmp_path / "s"))
    results = run_on_knowledge(tmp_path / "s" / "kl_prompts=2,seed=0")
    log = tmp_path / "log"
    good = Job("kl_prompts=2,seed=0", ("run",), tmp_path / "s" / "kl_prompts=2,seed=0")
    ends = [Outcome(good, "finished", "", log, 1, 2.0)]
    for name in ("kl_prompts=3,seed=0", "kl_prompts=2,seed=1", "kl_prompts=3,seed=1"):
        ends.append(Outcome(Job(name, ("run",), tmp_path / name), "failed", "the disk is full", log, 1, 2.0))
    sweep = Sweep(job, ends, *lines_of(job, ends))
    (first, second) = sweep.as_json()["combinations"]
    assert first["finished"] == [0] and first["failed"] == {"1": "the disk is full"} and second["finished"] == []
    measured = {(m["name"], m["split"], m["subject"]): m["value"] for m in results["measurements"]}
    assert first["values"]["forget V"]["mean"] == measured["multiple_choice", "forget_V", "edited"]
    assert first["values"]["KL, retain"]["values"] == [measured["kl_from_base", "retain", "edited"]]
    assert sweep.base["forget V"] == measured["multiple_choice", "forget_V", "base"] and second["values"] == {}
    table, narrow = text(sweep.lines, sweep.base, None), text(sweep.lines, sweep.base, 80)
    assert "1, 1 failed" in table and "0, 2 failed" in table and "reply perplexity" in table
    assert max(map(len, narrow.splitlines())) <= 80 and "more figures are in results.json" in narrow
    assert all(name in narrow for name in ("forget V", "neighbour", "retain", "KL, neutral"))
    assert len(sweep.failed) == 3
