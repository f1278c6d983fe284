import ast
import dataclasses
import doctest
import inspect
import math
from pathlib import Path

import excise
import pytest
import torch
from excise.artifacts.reporting.outcomes import Evaluation, Run
from excise.editing.errors import RequestError
from excise.recipes.audit.request import AuditSettings
from excise.recipes.commands import concept as concept_commands
from excise.recipes.commands import edit, look, measure, packs, publish
from excise.recipes.evaluate import EvaluateSettings
from excise.recipes.orthogonalize.recipe import OrthogonalizeSettings
from helpers import in_fresh_process, make_pico

ROOT = Path(__file__).parents[1]
MARKUP = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def loaded():
    return excise.load_model("builtin:testbed", "cpu", "float32")


def test_importing_excise_loads_nothing_but_excise():
    code = (
        "import sys, json; before = set(sys.modules); import excise; dir(excise); excise.__version__; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    new = in_fresh_process(code, cold=True)
    # Where the package is installed in editable mode, a finder of one file comes with it.
    assert [name for name in new if name.startswith("excise")] == ["excise"]
    assert not {"torch", "transformers", "pydantic", "rich", "typer", "yaml"} & set(new)
    assert len(new) < 20


def test_errors_can_be_caught_without_torch():
    code = (
        "import sys, json; before = set(sys.modules); import excise; excise.ExciseError; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    new = in_fresh_process(code, cold=True)
    assert "excise.editing.errors" in new and not {"torch", "numpy"} & set(new)


def test_every_public_name_is_there_and_documented():
    for name in excise.__all__:
        value = getattr(excise, name)
        if name != "__version__":
            assert value.__doc__ and len(value.__doc__.split()) > 3, name
    assert set(excise.__all__) <= set(dir(excise))
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        excise.evalute  # noqa: B018


def test_type_checkers_see_the_names_where_they_are_imported_from():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == excise._HOMES
    assert (ROOT / "py.typed").exists()


def test_the_version_has_one_home():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text and 'attr = "excise.__version__"' in text
    assert f'"{excise.__version__}"' not in text


@pytest.mark.parametrize("name", [name for name in excise.__all__ if name.islower() and "__" not in name])
def test_the_example_of_a_function_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(excise, name), name)
    assert example.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example)
    assert runner.failures == 0


def test_a_model_in_memory_and_its_folder_give_the_same_figures(loaded):
    models = ["builtin:testbed", loaded]
    found = excise.evaluate(models, "builtin:shortcut", device="cpu", dtype="float32", questions=6, max_new_tokens=4)
    assert found.names == ("builtin:testbed", "model in memory")
    assert len(found.table) > 5
    for row in found.table:
        on_disk, in_memory = row.models.values()
        assert on_disk == in_memory, row.name
    assert found.measurement("multiple_choice", "flipped").n == 6


def test_a_model_in_memory_is_left_as_it_was(loaded):
    model, tokenizer = make_pico("llama"), loaded[1]
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tokenizer.padding_side = "right"
    with pytest.raises(RequestError, match="embeddings for ids 0 to 95"):
        # Its vocabulary is smaller than the tokenizer's.
        excise.evaluate((model, tokenizer), "builtin:shortcut", questions=2)
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.padding_side == "right"


def test_an_edited_model_differs_from_its_base_until_the_edit_is_undone(loaded):
    model, tokenizer = loaded
    weights = {name: values.clone() for name, values in model.state_dict().items()}
    direction = excise.find_direction(model, tokenizer, "builtin:declining", train_pairs=24, validation_pairs=8)
    assert direction.passed_filters and direction.as_json()["base"]["kind"] == "memory"
    sizes = {"questions": 4, "max_new_tokens": 12, "dtype": "float32", "device": "cpu"}
    with excise.orthogonalize(model, direction) as applied:
        found = excise.evaluate({"edited": loaded}, "builtin:declining", "builtin:testbed", **sizes)
    assert "17 of 17" in repr(applied)
    before = found.measurement("behaviour_rate", "concept", "base")
    after = found.measurement("behaviour_rate", "concept", "edited")
    assert before.value > 0.5 and after.value < 0.1 and after.difference["value"] == after.value - before.value
    assert all(torch.equal(values, weights[name]) for name, values in model.state_dict().items())
    html = found._repr_html_()
    assert "difference" in html and found.results[0]["samples"][0]["prompt"][:20] in html
    assert "not a way to ask" in html or "I do not reply" in html or "I will not answer" in html
    assert repr(found) == f"Evaluation(edited: {len(found.table)} measurements)"


def test_a_direction_shows_what_taking_it_out_does(loaded):
    direction = excise.find_direction(*loaded, "builtin:declining", train_pairs=16, validation_pairs=4)
    html = direction._repr_html_()
    assert "builtin:declining" in html and "16 pairs" in html and "<table>" in html
    before, (after,) = (
        direction.provenance["probe"]["base_bypass"],
        [c.bypass for c in direction.candidates if (c.point, c.position) == (direction.point, direction.position)],
    )
    assert before > 0 > after
    assert f"{before:+.2f}" in html and f"{after:+.2f}" in html
    too_deep = next(c for c in direction.candidates if c.rejected == "too deep")
    unscored = dataclasses.replace(direction, point=too_deep.point, position=too_deep.position, passed_filters=False)
    assert "not scored" in unscored._repr_html_() and "this one did not" in unscored._repr_html_()


def test_each_layer_can_lose_the_direction_at_its_own_output(loaded):
    model, tokenizer = loaded
    direction = excise.find_direction(model, tokenizer, "builtin:declining", train_pairs=24, validation_pairs=8)
    learned, place = direction.learned.vectors, direction.learned.positions.index(direction.position)
    with excise.orthogonalize(model, direction, per_layer=True) as applied:
        written = [layer.mlp.down_proj.weight for layer in model.model.layers]
        for number, weight in enumerate(written):
            own, others = (
                learned[point, place] / learned[point, place].norm() for point in (number + 1, 1 + number % 3)
            )
            assert torch.allclose(applied.edit.layer_bases[number][:, 0], own, atol=1e-6)
            assert (own @ weight).norm() < 1e-4 * weight.norm()
            assert number + 1 == 1 + number % 3 or (others @ weight).norm() > 1e-3 * weight.norm()
        embedding = direction.vector / direction.vector.norm()
        assert (model.model.embed_tokens.weight @ embedding).abs().max() < 1e-4
    with pytest.raises(excise.RequestError, match="give the result of find_direction"):
        excise.orthogonalize(model, torch.ones(192), per_layer=True)


def test_saving_a_model_in_memory_for_an_audit_draws_no_bars(loaded, tmp_path, capfd):
    with pytest.raises(excise.RequestError, match="no attack on a behaviour"):
        excise.audit(loaded, "builtin:declining", "builtin:testbed", attacks=["rtt"], out=tmp_path / "audit")
    assert capfd.readouterr() == ("", "")


def test_an_edit_in_memory_and_on_disk_give_the_same_weights(loaded, tmp_path):
    direction = torch.randn(loaded[0].config.hidden_size, generator=torch.Generator().manual_seed(3))
    with excise.orthogonalize(loaded[0], direction, strength=0.5) as applied:
        in_memory = {name: values.clone() for name, values in loaded[0].state_dict().items()}
    applied.save(tmp_path / "edit")
    for number, edited in enumerate((applied, applied.edit, tmp_path / "edit")):
        base = tmp_path / "base"
        if not base.exists():
            loaded[0].save_pretrained(base)
            loaded[1].save_pretrained(base)
        made = excise.apply(edited, base, tmp_path / f"made-{number}")
        assert sum(change.changed for change in made.changes) == 17
        on_disk = excise.load_model(made.folder, "cpu", "float32")[0].state_dict()
        assert all(torch.equal(values, in_memory[name]) for name, values in on_disk.items())


def test_a_run_is_returned_read_again_and_measured(tmp_path):
    out = tmp_path / "run"
    sizes = {"questions": 4, "max_new_tokens": 4, "kl_prompts": 4, "train_pairs": 16, "validation_pairs": 8}
    run = excise.run("orthogonalize", out=out, dtype="float32", device="cpu", **sizes)
    again = excise.load_run(out)
    assert run.results == again.results and run.table == again.table and run.findings == again.findings
    assert again.base == run.base == "builtin:testbed" and again.concept == run.concept == "builtin:declining"
    assert run.settings["questions"] == 4 and run.report.is_file()
    assert excise.run("orthogonalize", out=out, resume=True).results == run.results
    html = run._repr_html_()
    assert "<table>" in html and run.findings[0][:30] in html
    printed = str(run)
    assert (
        f"- {run.findings[0]}" in printed and "\nmeasurement " in printed and len(printed.splitlines()) > len(run.table)
    )
    # A run's folder, its checkpoint and the run itself name the same model.
    sizes = {"questions": 4, "max_new_tokens": 4, "kl_prompts": 4, "dtype": "float32", "device": "cpu"}
    found = excise.evaluate([run, out, str(run.checkpoint)], run.concept, **sizes)
    first, *others = zip(*(row.models.values() for row in found.table), strict=True)
    assert all(other == first for other in others)
    assert len(set(found.names)) == 3
    assert {m.value for m in first if m.name == "multiple_choice"} == {
        m.value for m in run.measurements if m.name == "multiple_choice" and m.subject == "edited"
    }
    with pytest.raises(excise.RequestError, match="no attack on a behaviour"):
        excise.audit(run, attacks=["rtt"])


def test_what_models_wrote_is_shown_as_text():
    reply = {"split": "concept", "prompt": "p", "base": MARKUP, "edited": f"{MARKUP}\u202e"}
    results = {
        "measurements": [],
        "samples": [reply],
        "warnings": [MARKUP],
        "run": {"recipe": "elm", "settings": {}},
        "concept": {"kind": "knowledge", "name": MARKUP, "ref": "x"},
        "edited": {"tied": False, "name": MARKUP},
        "base": {"kind": "local", "name": MARKUP},
    }
    for outcome in (Run(Path("out"), results), Evaluation((results,))):
        html = outcome._repr_html_()
        assert "<script" not in html and "&lt;script&gt;" in html and "\u202e" not in html


def test_outcomes_are_frozen():
    for kind in (excise.Run, excise.Evaluation, excise.Audit, excise.Direction, excise.AppliedEdit):
        assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen


WRONG = {
    "recipe": (lambda loaded: excise.run("elmm"), "did you mean 'elm'"),
    "setting": (lambda loaded: excise.run("orthogonalize", strenght=2), "did you mean 'strength'"),
    "old_setting": (lambda loaded: excise.run("orthogonalize", reply_tokens=2), "is now called max_new_tokens"),
    "run_in_memory": (lambda loaded: excise.run("elm", model=loaded), "save_pretrained"),
    "apply_in_memory": (lambda loaded: excise.apply("edit", loaded, "out"), "needs a base on disk"),
    "no_tokenizer": (lambda loaded: excise.evaluate(loaded[0], "builtin:potions"), "needs its tokenizer"),
    "no_model": (lambda loaded: excise.evaluate([], "builtin:potions"), "at least one"),
    "number": (lambda loaded: excise.evaluate([3], "builtin:potions"), "got int"),
    "old_eval_setting": (lambda loaded: excise.evaluate(loaded, "builtin:potions", judges=["x"]), "now called judge"),
    "reference_alone": (lambda loaded: excise.evaluate(loaded, "builtin:potions", reference="x"), "give suite too"),
    "suite_and_judge": (
        lambda loaded: excise.evaluate(loaded, "builtin:potions", suite="tofu", judge="x"),
        "without judge",
    ),
    "suite": (lambda loaded: excise.evaluate(loaded, "builtin:potions", suite="tofo"), "did you mean 'tofu'"),
    "suite_rows": (lambda loaded: excise.evaluate(loaded, "builtin:potions", suite="muse"), "the muse suite needs"),
    "eval_setting": (lambda loaded: excise.evaluate(loaded, "builtin:potions", question=3), "did you mean 'questions'"),
    "concept": (lambda loaded: excise.load_concept("builtin:potion"), "did you mean 'potions'"),
    "search_setting": (lambda loaded: excise.find_direction(*loaded, "builtin:potions", layers=3), "settings: "),
    "too_few_pairs": (
        lambda loaded: excise.find_direction(*loaded, "builtin:potions", validation_pairs=200),
        "lower validation_pairs",
    ),
    "width": (lambda loaded: excise.orthogonalize(loaded[0], torch.ones(3)), "of width 3"),
    "nothing": (lambda loaded: excise.orthogonalize(loaded[0], torch.zeros(192)), "is not finite or zero"),
    "not_finite": (lambda loaded: excise.orthogonalize(loaded[0], torch.full((192,), math.nan)), "is not finite"),
    "untie": (lambda loaded: excise.orthogonalize(loaded[0], torch.ones(192), embeddings="untie"), "adds a tensor"),
    "attack": (lambda loaded: excise.audit("builtin:testbed", attacks=["rt"]), "did you mean 'rtt'"),
    "no_run": (lambda loaded: excise.load_run("nowhere"), "--out folder of a run"),
    "measurement": (
        lambda loaded: Evaluation(({"measurements": [], "edited": {"name": "m"}},)).measurement("cloze", "x"),
        "was not",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_told_in_one_line(name, loaded):
    call, words = WRONG[name]
    with pytest.raises(excise.ExciseError) as error:
        call(loaded)
    assert words in str(error.value) and "\n" not in str(error.value)


OF_THE_TERMINAL = {"config", "set_", "dry_run", "as_json", "resume", "all_rows", "card", "recipe", "jobs", "part"}
"""Options about typing a command and printing what it returns; ``card`` writes into the folder of a run."""
CALLED = {"map_": "map", "license_": "license", "models": "models"}


@pytest.mark.parametrize(
    "command, function, kind",
    [
        (measure.evaluate, excise.evaluate, EvaluateSettings),
        (measure.audit, excise.audit, AuditSettings),
        (measure.compare, excise.compare, None),
        (edit.run, excise.run, OrthogonalizeSettings),
        (edit.apply, excise.apply, None),
        (look.diff, excise.diff, None),
        (look.inspect, excise.inspect, None),
        (look.localize, excise.localize, None),
        (measure.meta, excise.meta, None),
        (publish.verify, excise.verify, None),
        (packs.check, excise.check_concept, None),
        (concept_commands.make, excise.make_concept, None),
        (concept_commands.get, excise.get_concept, None),
    ],
)
def test_a_function_takes_whatever_its_command_takes(command, function, kind):
    taken = {*inspect.signature(function).parameters, *(kind.model_fields if kind else ())}
    asked = {CALLED.get(name, name) for name in inspect.signature(command).parameters} - OF_THE_TERMINAL
    # How many tensors of a result are printed, and the first argument of a check, which a function calls by its type.
    assert asked - taken <= {"most", "pack"} if command in (look.diff, packs.check) else asked <= taken


def test_every_setting_of_eval_can_be_given_from_python(loaded):
    values = {
        "questions": 2, "max_new_tokens": 3, "kl_prompts": 2, "as_shipped": True, "date": "2024-01-02",
        "thinking": True, "response_prefix": "So: ", "template": {"x": 1}, "device": "cpu", "dtype": "float32",
        "suite": None, "reference": None, "judge": ["nowhere"], "rubric": "default", "judge_key": None, "lm_eval": (),
        "concept": "builtin:potions", "base": None,
    }  # fmt: skip
    assert values.keys() == EvaluateSettings.model_fields.keys()
    # The judge is looked for only after all settings were taken.
    with pytest.raises(excise.RequestError, match="nowhere"):
        excise.evaluate(loaded, **values)


def test_what_was_made_and_checked_in_python_prints_as_the_command_prints_it(tmp_path):
    for name in ("moon", "sea"):
        (tmp_path / f"{name}.txt").write_text("".join(f"The {name} number {n} is old.\n" for n in range(20)))
    made = excise.make_concept(tmp_path / "pack", forget=tmp_path / "moon.txt", retain=[tmp_path / "sea.txt"])
    assert made.written and "forget.jsonl" in str(made) and excise.load_concept(made.out).forget
    checked = excise.check_concept(excise.load_concept(made.out))
    assert checked.name == "pack" and "npo" in str(checked)
    with pytest.raises(excise.RequestError, match="exists already"):
        excise.make_concept(made.out, forget=tmp_path / "moon.txt", retain=tmp_path / "sea.txt")
    with pytest.raises(excise.RequestError, match="tofu:forget05"):
        excise.get_concept("tofu:forget5", tmp_path / "tofu")
