"""`excise concept check` asks every recipe, measurement, audit and benchmark itself, so what it says is what they do."""

import json

import pytest
from excise.artifacts import concepts
from excise.artifacts.concepts import BUILTIN
from excise.artifacts.files import opened
from excise.artifacts.models.find import find_model
from excise.recipes import RECIPES
from excise.recipes.concept.check import FILES, check, text
from excise.recipes.concept.cost import estimated, in_words
from excise.recipes.concept.show import show
from helpers import SMALL_TESTBED, excise
from small_gguf import write_gguf

TRAINED = ("elm", "rmu", "npo", "simnpo", "grad_diff")


def _pack(folder, kind="knowledge", **files):
    folder.mkdir()
    about = f"name: own\ndescription: potions\nkeywords: [potion]\nlicense: CC0-1.0\nsource: ours\nkind: {kind}\n"
    (folder / "concept.yaml").write_text(about)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _rows(name, concept="potions"):
    return [json.loads(line) for line in (BUILTIN / concept / f"{name}.jsonl").read_text().splitlines()]


def _answers(folder):
    return {use.name: use for use in check(str(folder)).uses}


def test_the_built_in_packs_run_where_they_are_made_for():
    potions, declining, shortcut = (_answers(f"builtin:{name}") for name in ("potions", "declining", "shortcut"))
    assert all(potions[name].answer == "runs" for name in (*TRAINED, "prune", "repselect", "orthogonalize", "audit"))
    assert potions["caft"].answer == "does not run" and "kind task" in potions["caft"].why
    assert declining["orthogonalize"].answer == "runs" and declining["audit"].answer == "runs"
    assert shortcut["caft"].answer == "runs"
    # Every recipe answers, also one that cannot do without a further model.
    assert RECIPES.keys() <= potions.keys() and potions["distill"].answer == "runs"


def test_questions_of_group_v_alone_train_nothing_and_it_says_what_to_add(tmp_path):
    questions = [row | {"group": "V"} for row in _rows("questions") if row["split"] == "forget"]
    answers = _answers(_pack(tmp_path / "own", questions=questions, retain=_rows("retain")))
    for name in TRAINED:
        assert answers[name].answer == "does not run" and "forget.jsonl" in answers[name].why
    assert answers["multiple_choice"].answer == "runs"
    # With texts to train on, they run.
    texts = _pack(tmp_path / "texts", questions=questions, retain=_rows("retain"), forget=_rows("forget"))
    assert all(_answers(texts)[name].answer != "does not run" for name in TRAINED)


def test_two_lists_are_enough_for_a_direction(tmp_path):
    answers = _answers(_pack(tmp_path / "lists", "behaviour", contrast=_rows("contrast", "declining")))
    assert answers["orthogonalize"].answer != "does not run"
    assert "open_questions.jsonl" in answers["answer_probability"].why
    assert answers["tofu"].answer == "does not run" and "needs" in answers["tofu"].why


def test_what_it_says_of_a_recipe_is_what_the_recipe_says(tmp_path):
    folder = _pack(tmp_path / "own", forget=_rows("forget"))
    answers = _answers(folder)
    assert set(RECIPES) <= set(answers)
    for name in ("npo", "orthogonalize", "prune"):
        run = excise("run", name, "--concept", folder, "--model", "builtin:testbed", "--dry-run", cwd=tmp_path)
        assert (run.returncode == 0) == (answers[name].answer != "does not run"), name
        assert not run.returncode or answers[name].why in run.stderr


def test_a_terminal_and_json_tell_the_same(tmp_path):
    folder = _pack(tmp_path / "own", forget=_rows("forget"), retain=_rows("retain"))
    checked = check(str(folder), SMALL_TESTBED)
    said = text(checked, 80)
    assert max(map(len, said.splitlines())) <= 80 and "tokens, median" in said
    assert all(made in " ".join(said.split()) for made in checked.made)
    printed = json.loads(excise("concept", "check", folder, "--model", SMALL_TESTBED, "--json").stdout)
    # Costs are by the speed of the moment.
    assert printed.pop("costs")
    expected = json.loads(json.dumps(checked.as_json()))
    assert printed == {key: value for key, value in expected.items() if key != "costs"}


def test_tokens_are_the_models_and_long_texts_are_counted(tmp_path):
    long = [{"id": "long", "text": "word " * 5000, "group": "T"}, {"id": "short", "text": "word", "group": "T"}]
    folder = _pack(tmp_path / "own", forget=long, retain=_rows("retain"))
    by_words, by_tokens = check(str(folder)), check(str(folder), SMALL_TESTBED)
    assert by_words.files[0].longest == 5000 and by_words.longer == 0
    assert by_tokens.files[0].longest > 5000 and by_tokens.longer == 1


@pytest.mark.parametrize("rows", [0, 3])
def test_show_counts_every_file_and_shows_its_first_rows(rows):
    shown = show("builtin:potions", rows)
    assert set(shown["files"]) <= set(FILES) and shown["files"]["questions"]["rows"] == 800
    assert [len(file["first"]) for file in shown["files"].values()] == [rows] * len(shown["files"])
    told = excise("concept", "show", "builtin:potions", "--rows", rows).stdout
    assert "questions: 800 rows" in told


def test_a_cost_is_that_of_the_products_of_what_is_measured_and_trained():
    plan = {"items_measured": 100, "gradient_steps": 10, "memory_bytes": 2_000_000}
    cost = estimated("npo", plan, 2, 8, {"questions": 10.0, "prompts": 20.0, "forget": 30.0, "retain": 50.0}, 1e9)
    measured, trained = 100 * 15, 10 * 8 * 80
    assert (cost.measured_tokens, cost.trained_tokens, cost.parameters) == (measured, trained, 1_000_000)
    assert cost.seconds == pytest.approx((2 * 2e6 * measured + 6e6 * trained) / 1e9)
    assert in_words([cost])[0].startswith("npo: 100 items a model (1,500 tokens), 10 steps (6,400 tokens); at least")
    assert not check("builtin:potions").costs
    assert {cost.recipe for cost in check("builtin:potions", SMALL_TESTBED).costs} >= {"elm", "npo", "prune"}


def test_a_pack_is_read_once_however_many_are_asked(tmp_path, monkeypatch):
    folder = _pack(tmp_path / "own", forget=_rows("forget"), retain=_rows("retain"))
    read, original = [], concepts.windowed
    monkeypatch.setattr(concepts, "windowed", lambda rows, *rest: read.append(rest[0]) or original(rows, *rest))
    check(str(folder))
    assert sorted(read) == ["forget", "retain"]
    # Elsewhere a pack is read anew, because its files may have changed.
    for _ in range(2):
        concepts.load_concept(folder)
    assert sorted(read) == ["forget"] * 3 + ["retain"] * 3


def test_a_model_file_is_summed_once_for_all_recipes(tmp_path, monkeypatch):
    path, summed = tmp_path / "model.bin", []
    path.write_bytes(b"weights")
    whole = opened._summed

    def counted(file):
        summed.append(file.name)
        return whole(file)

    monkeypatch.setattr(opened, "_summed", counted)
    assert opened.sha256_of(path) == opened.sha256_of(path) and summed == ["model.bin"] * 2
    with opened.summed_once():
        first = opened.sha256_of(path)
        assert opened.sha256_of(path) == first and len(summed) == 3
        # A file that was changed is another file.
        path.write_bytes(b"other weights")
        assert opened.sha256_of(path) != first and len(summed) == 4


def test_checking_a_pack_against_a_gguf_file_reads_it_through_once(tmp_path, monkeypatch):
    path, summed = write_gguf(tmp_path / "small.gguf"), []
    find_model(str(path))
    whole = opened._summed
    monkeypatch.setattr(opened, "_summed", lambda file: (summed.append(file.name), whole(file))[1])
    check("builtin:potions", str(path))
    assert summed.count(path.name) == 1
