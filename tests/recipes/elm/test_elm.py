"""ELM and its baselines end to end, through the command line, on the built-in world in small."""

import importlib
import json
import os
import signal
import subprocess
import time

import pytest
from excise.recipes import RECIPES
from excise.recipes.elm.request import ElmSettings
from helpers import SMALL_REFERENCE, SMALL_TESTBED, excise, in_fresh_process, started, with_settings

SMALL = ("questions=40", "kl_prompts=8", "max_new_tokens=16")
TINY = (
    "questions=24",
    "kl_prompts=4",
    "max_new_tokens=6",
    "reference_subjects=4",
    "fluency_tokens=2",
    "contexts=texts",
)


ON_SMALL = ["--model", SMALL_TESTBED, "--concept", "builtin:potions", *with_settings(f"reference={SMALL_REFERENCE}")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A third of the default's training: enough to see it work."""
    out = tmp_path_factory.mktemp("runs") / "elm"
    short = with_settings(*SMALL, "steps=110", "reference_subjects=8", "contexts=texts")
    done = excise("run", "elm", *ON_SMALL, "--out", out, "--json", *short)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def _value(results, name, split, subject="edited"):
    found = [m for m in results["measurements"] if (m["name"], m["split"], m["subject"]) == (name, split, subject)]
    assert len(found) == 1
    return found[0]["value"]


@pytest.mark.parametrize("split", ["forget_T", "forget_V"])
def test_the_concept_goes_in_both_groups(finished, split):
    _, results = finished
    assert _value(results, "multiple_choice", split, "base") >= 0.95
    assert _value(results, "multiple_choice", split) <= 0.35
    assert _value(results, "multiple_choice", split, "reference") <= 0.3


@pytest.mark.parametrize("split", ["neighbour", "retain"])
def test_the_rest_stays(finished, split):
    _, results = finished
    # Of 40 questions of group V, after a third of the training: on those of T, which it learns from, it is 0.85 and more.
    assert _value(results, "multiple_choice", split) >= 0.75
    assert _value(results, "perplexity", "retain") <= 1.05 * _value(results, "perplexity", "retain", "base")


def test_replies_on_the_concept_are_fluent(finished):
    _, results = finished
    assert _value(results, "reverse_perplexity", "concept") <= 2 * _value(
        results, "reverse_perplexity", "novice", "base"
    )
    assert _value(results, "repetition", "concept") <= 0.1
    assert _value(results, "degenerate_share", "concept") <= 0.1


def test_the_target_promised_it(finished):
    _, results = finished
    check = results["target_check"]
    chosen = [point for point in check["curve"] if point["chosen"]]
    assert check["separates"] and len(chosen) == 1
    assert chosen[0]["accuracy"]["forget"] <= check["chance"] < chosen[0]["accuracy"]["neighbour"]
    assert (
        results["training"]["strength"] == chosen[0]["strength"] and results["training"]["probability_left_over"] < 0.01
    )


PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, merged = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(merged)
ids = tokenizer(sys.argv[3], return_tensors="pt")["input_ids"]
load = lambda place: AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
with torch.no_grad():
    adapted = PeftModel.from_pretrained(load(base), merged + "/adapter").eval()(input_ids=ids).logits.log_softmax(-1)
    plain = load(merged).eval()(input_ids=ids).logits.log_softmax(-1)
    before = load(base).eval()(input_ids=ids).logits.log_softmax(-1)
kl = lambda p, q: float((p.exp() * (p - q)).sum(-1).max())
print(json.dumps([kl(adapted, plain), kl(before, plain)]))
"""


def test_checkpoint_and_adapter_are_the_same_model(finished):
    out, results = finished
    from excise.artifacts.concepts import load_concept

    prompt = next(q.prompt for q in load_concept("builtin:potions").questions if q.split == "forget")
    apart, moved = in_fresh_process(PEFT, SMALL_TESTBED, out / "checkpoint", prompt)
    # The checkpoint is stored in bfloat16, the adapter in fp32.
    assert apart < 0.02 < 0.5 < moved
    assert results["merged_kl"] < 0.02


def test_what_is_published_verifies_and_names_no_place(finished, tmp_path):
    out, _ = finished
    assert excise("verify", out).returncode == 0
    published = out / "checkpoint"
    text = "".join(p.read_text(encoding="utf-8") for p in published.rglob("*") if p.suffix in (".md", ".json"))
    assert str(out.parent) not in text and os.path.expanduser("~") not in text
    card = (published / "README.md").read_text()
    assert "erased with ELM" in card and "Innocence, seamlessness and specificity" in card
    leads = ("Held-out questions (V): ", "Perplexity of replies about the concept", "Questions on related topics")
    assert sorted(leads, key=card.index) == list(leads)
    html = (out / "report.html").read_text()
    assert "What the target promised" in html and "Linear probes by layer" in html
    again = excise("apply", published / "excise", "--base", SMALL_TESTBED, "--out", tmp_path / "again", "--json")
    assert json.loads(again.stdout)["tensors_changed"] == json.loads(again.stdout)["tensors_declared"]
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()


def test_runs_are_compared_in_one_table(finished, tmp_path):
    out, _ = finished
    done = excise("compare", out, out, "--out", tmp_path / "both", "--json")
    names = [line["recipe"] for line in json.loads(done.stdout)]
    assert names == ["base", "reference", "elm", "elm"]
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"compare.md", "compare.json", "compare.png"}
    wrong = excise("compare", out, tmp_path, "--out", tmp_path / "none")
    assert wrong.returncode == 2 and "holds no finished run" in wrong.stderr and not (tmp_path / "none").exists()


def test_a_run_killed_in_training_goes_on_to_the_same_bytes(tmp_path):
    arguments = ["run", "elm", *ON_SMALL, *with_settings(*TINY, "steps=60", "batch_size=2")]
    whole = excise(*arguments, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    silent = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = started(*arguments, "--out", tmp_path / "killed", **silent)
    deadline = time.time() + 240
    while not list((tmp_path / "killed" / ".work" / "training").glob("checkpoint-50")) and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoint").exists()
    done = excise("run", "elm", "--out", tmp_path / "killed", "--resume")
    assert done.returncode == 0, done.stderr
    sums = [(tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if ".unlearning." in RECIPES[name].module])
def test_every_unlearning_method_runs_and_publishes(recipe, tmp_path):
    pairs = ("questions=24", "kl_prompts=4", "max_new_tokens=6", "steps=3", "batch_size=2")
    done = excise("run", recipe, *ON_SMALL, "--out", tmp_path / "run", "--json", *with_settings(*pairs))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["edited"]["tensors_changed"] > 0 and results["run"]["recipe"] == recipe
    assert excise("verify", tmp_path / "run").returncode == 0


def test_a_preset_keeps_its_rate_and_a_budget_says_how_many_steps():
    taken = {
        (preset, budget): ElmSettings(preset=preset, budget=budget)
        for preset in ("default", "paper", "reference")
        for budget in ("quick", "standard", "long")
    }
    steps = {asked: settings.steps for asked, settings in taken.items()}
    assert [steps[preset, "standard"] for preset in ("default", "paper", "reference")] == [240, 400, 400]
    assert {steps[preset, budget] for preset, budget in steps if budget == "quick"} == {60}
    assert {steps[preset, budget] for preset, budget in steps if budget == "long"} == {1600}
    assert {settings.learning_rate for (preset, _), settings in taken.items() if preset != "default"} == {5e-5}
    assert ElmSettings(preset="paper", budget="quick", steps=7, learning_rate=0.1).steps == 7


def test_published_presets_run(tmp_path):
    done = excise(
        "run",
        "elm",
        *ON_SMALL,
        "--out",
        tmp_path / "run",
        "--json",
        *with_settings(
            "preset=reference", "questions=24", "kl_prompts=4", "max_new_tokens=6", "steps=2", "batch_size=2", "rank=16"
        ),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["training"]["contrast"] == "personas" and results["training"]["strength"] == 1000.0
    assert set(results["training"]["lessons"]) == {"forget", "texts"}


def test_a_dry_run_says_what_would_be_trained(tmp_path):
    done = excise(
        "run", "elm", "--dry-run", "--json", "--out", tmp_path / "run", *with_settings("layers=0.5-1.0", "steps=7")
    )
    plan = json.loads(done.stdout)
    assert (plan["gradient_steps"], plan["layers_adapted"], plan["tensors_to_change"]) == (7, 4, 28)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("pair", "part"),
    [
        ("gradient_accumulation_steps=3", "does not divide"),
        ("layers=9-12", "selects nothing"),
        ("base_bits=4", "silently wrong gradients"),
        ("strength=x", "strength"),
        ("preset=papr", "paper"),
    ],
)
def test_a_wrong_setting_is_one_line(pair, part):
    done = excise("run", "elm", "--dry-run", *with_settings(pair))
    assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_table_can_be_planned(name, tmp_path):
    recipe = RECIPES[name]
    module = importlib.import_module(recipe.module)
    more = {"teacher": "builtin:testbed-reference"} if name == "distill" else {}
    prepared = module.prepare(getattr(module, recipe.settings)(out=tmp_path / "run", **more))
    assert module.describe(prepared)["recipe"] == name
    assert callable(module.story), "its card and report would say nothing of the method"
