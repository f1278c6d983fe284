"""Every recipe on packs of every shape: it runs, or one line says what to add before a weight is read."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_tokenizer
from excise.editing.errors import ExciseError
from excise.recipes import RECIPES
from excise.recipes.common.settings import load_settings
from excise.recipes.common.tokens import encode
from excise.recipes.data.facts import find_facts
from excise.recipes.data.unlearning_sets import forget_examples
from helpers import SMALL_TESTBED, excise, with_settings

BUILTIN = Path(__file__).parents[2] / "artifacts" / "builtin" / "concepts"
PERSONAS = "personas: {expert: ['By an expert on {description}.', By a master.], novice: By a novice.}\n"
TRAINED = ("elm", "npo", "rmu", "simnpo", "grad_diff")
NEEDS_TEXTS = "needs forget.jsonl.*add forget.jsonl with texts on the concept, or forget questions of group T"
NEEDS_RETAIN = "needs retain.jsonl.*add retain.jsonl with texts on other things, or retain or neighbour questions"
REFUSED = {
    **{(recipe, "v_only"): NEEDS_TEXTS for recipe in (*TRAINED, "prune", "repselect")},
    **{(recipe, "no_retain"): NEEDS_RETAIN for recipe in (*TRAINED, "prune", "repselect")},
    **{(recipe, "lists"): "needs forget.jsonl, retain.jsonl" for recipe in (*TRAINED, "prune", "repselect")},
    **{(recipe, shape): "needs contrast.jsonl.*add contrast.jsonl with pairs"
       for recipe in ("orthogonalize", "lorra") for shape in ("v_only", "no_retain")},
    ("orthogonalize", "two_texts"): "no forget questions of group T to choose a direction by; add some",
}  # fmt: skip
"""What each refusal says; every other pair of a recipe and a shape runs."""


def _rows(name, file):
    return [json.loads(line) for line in (BUILTIN / name / f"{file}.jsonl").read_text().splitlines()]


def _pack(folder, kind="knowledge", more="", **files):
    folder.mkdir()
    about = f"name: {folder.name}\nkind: {kind}\ndescription: potions\nkeywords: [potion]\nlicense: x\nsource: x\n"
    (folder / "concept.yaml").write_text(about + more)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """A folder with a pack of each shape, by what its files hold."""
    place = tmp_path_factory.mktemp("packs")
    forget, retain, questions = (_rows("potions", name) for name in ("forget", "retain", "questions"))
    texts = {"forget": forget[:120] + forget[-120:], "retain": retain[:120]}
    of_v = [{**q, "group": "V"} for q in questions if q["split"] == "forget"][:40]
    others = [q for q in questions if q["split"] != "forget"][:80]
    about = [q for q in questions if q["split"] == "forget"]
    few = [q for q in about if q["group"] == "T"][:40] + [q for q in about if q["group"] == "V"][:40] + others
    bare = [
        {
            **{key: q[key] for key in ("id", "split", "group", "subject", "topic")},
            "prompt": q["prompt"].removeprefix("Question: ").removesuffix(" Answer:"),
            "answer": q["choices"][q["answer"]],
        }
        for q in few
    ]
    alike = [{**q, "choices": [f"the {choice}" for choice in q["choices"]]} for q in few]
    _pack(place / "texts", **texts)
    _pack(place / "templates", more=PERSONAS, **texts)
    _pack(place / "wmdp", **texts, questions=of_v + others)
    _pack(place / "open", open_questions=bare)
    _pack(place / "questions", questions=few)
    _pack(place / "alike", **texts, questions=alike)
    _pack(place / "v_only", questions=of_v, retain=retain[:120])
    _pack(place / "no_retain", forget=texts["forget"])
    _pack(place / "two_facts", forget=forget[:2], retain=retain[:60], questions=few[:2])
    _pack(place / "two_texts", forget=forget[:2], retain=retain[:60])
    _pack(place / "lists", kind="behaviour", contrast=_rows("declining", "contrast"))
    return place


SHAPES = (
    "texts",
    "templates",
    "wmdp",
    "open",
    "questions",
    "alike",
    "v_only",
    "no_retain",
    "two_facts",
    "two_texts",
    "lists",
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", [*TRAINED, "prune", "repselect", "orthogonalize", "lorra"])
def test_a_recipe_runs_on_a_shape_or_says_what_to_add(packs, tmp_path, recipe, shape):
    module = importlib.import_module(RECIPES[recipe].module)
    flags = {"model": SMALL_TESTBED, "concept": str(packs / shape), "out": tmp_path / "out"}
    sizes = ["validation_pairs=1"] if recipe == "orthogonalize" else []
    settings = load_settings(getattr(module, RECIPES[recipe].settings), None, sizes, flags)
    if refusal := REFUSED.get((recipe, shape)):
        with pytest.raises(ExciseError, match=refusal) as caught:
            module.prepare(settings)
        assert "\n" not in str(caught.value)
        return
    plan = module.describe(module.prepare(settings))
    assert plan["made"] == list(dict.fromkeys(plan["made"]))
    assert all(sentence in plan["made"] for sentence in load_concept(packs / shape).made)


def _run(packs, out, recipe, shape, *settings):
    words = ["--model", SMALL_TESTBED, "--concept", packs / shape, "--out", out, "--json"]
    small = with_settings("questions=8", "max_new_tokens=4", "kl_prompts=4", *settings)
    done = excise("run", recipe, *words, *small)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, (out / "checkpoint" / "README.md").read_text()


@pytest.mark.parametrize(("shape", "unchecked"), [("templates", False), ("two_facts", False), ("two_texts", True)])
def test_elm_runs_where_a_pack_holds_little_and_says_what_was_made(packs, tmp_path, shape, unchecked):
    small = ("steps=2", "batch_size=2", "max_contexts=12", "chat_facts=2", "fluency_tokens=2")
    results, progress, card = _run(packs, tmp_path / "out", "elm", shape, *small)
    check = results["target_check"]
    assert results["concept"]["made"] and not results["training"]["contexts_without_contrast"]
    for sentence in results["concept"]["made"]:
        assert f"made of the pack: {sentence}" in progress and f"- {sentence}" in card
        assert sentence.partition(",")[0] in (tmp_path / "out" / "report.html").read_text()
    assert "## What this pack did not hold, and how it was made" in card
    assert bool(check["unchecked"]) == unchecked and bool(check["curve"]) != unchecked
    no_prompts = any("no prompts on the concept" in line for line in results["warnings"])
    assert no_prompts == (shape != "two_facts"), "the questions of a pack are prompts, passages of its texts are not"
    if unchecked:
        assert check["unchecked"] in progress and check["unchecked"] in card
        assert check["unchecked"] in results["warnings"]
    assert ("personas in general words" in card) == (shape != "templates")


@pytest.mark.parametrize("recipe", ["orthogonalize", "lorra"])
def test_two_lists_of_prompts_are_all_that_a_behaviour_needs(packs, tmp_path, recipe):
    small = ("validation_pairs=8",) if recipe == "orthogonalize" else ("steps=2", "batch_size=2")
    results, _, card = _run(packs, tmp_path / "out", recipe, "lists", *small)
    rates = {m["split"]: m["n"] for m in results["measurements"] if m["name"] == "behaviour_rate"}
    assert rates["concept"] == rates["neutral"] == 64
    assert "the last 64 contrast pairs" in card and "0 retain texts" not in card
    assert any("no questions, so what the model knows was not measured" in line for line in results["warnings"])


def test_texts_that_state_no_asked_fact_are_read_too(packs):
    """A pack with facts and with texts that no question of group T asks about: both are trained on."""
    concept = load_concept("builtin:potions")
    stated = find_facts(concept)
    assert stated.facts and not stated.other_texts
    apart = concept.forget[0].model_copy(update={"id": "apart", "text": "Brewers wear thick gloves and sing at work."})
    mixed = replace(concept, forget=(*concept.forget, apart))
    facts = find_facts(mixed)
    assert facts.other_texts == (apart,) and facts.facts == stated.facts

    tokenizer = load_tokenizer(find_model(SMALL_TESTBED))
    whole = encode(tokenizer, apart.text, True)
    rows = {example.ids for example in forget_examples(mixed, facts, tokenizer, 0, 64)}
    assert rows - {whole} == {example.ids for example in forget_examples(concept, stated, tokenizer, 0, 64)} != rows
