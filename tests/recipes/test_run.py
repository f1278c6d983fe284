"""The main job end to end, through the command line, on the built-in model."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from excise.artifacts.checkpoints.read import open_checkpoint, read_tensor
from excise.artifacts.models.find import find_model
from excise.artifacts.reporting.card import write_card
from helpers import SMALL_TESTBED, excise, excise_afresh, in_fresh_process, run_once, with_settings

SIZES = with_settings("questions=20", "kl_prompts=4", "max_new_tokens=8")
SHORT = ["--model", SMALL_TESTBED, *SIZES, *with_settings("validation_pairs=8")]
"""A run in small, for what does not need the size of the built-in model."""

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
chat = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True,
                                     return_tensors="pt", return_dict=True)
output = model.generate(**chat, max_new_tokens=24, do_sample=False)
keys = [sorted(info["missing_keys"]), sorted(info["unexpected_keys"])]
print(json.dumps([*keys, str(model.dtype), tokenizer.decode(output[0])]))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mine"
    done = excise("run", "orthogonalize", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def _value(results, name, split, subject):
    found = [m for m in results["measurements"] if (m["name"], m["split"], m["subject"]) == (name, split, subject)]
    assert len(found) == 1
    return found[0]["value"]


def test_declining_is_removed_and_the_answers_are_right(finished):
    _, results = finished
    assert _value(results, "behaviour_rate", "concept", "base") >= 0.95
    assert _value(results, "behaviour_rate", "concept", "edited") <= 0.05
    assert _value(results, "exact_answer", "concept", "base") <= 0.05
    assert _value(results, "exact_answer", "concept", "edited") >= 0.85


def test_the_direction_induces_declining_where_it_is_added(finished):
    _, results = finished
    assert _value(results, "behaviour_rate", "neutral", "base") <= 0.05
    assert _value(results, "induced_rate", "neutral", "base") >= 0.9


def test_knowledge_and_neutral_replies_stay(finished):
    _, results = finished
    base, edited = (_value(results, "multiple_choice", "retain", subject) for subject in ("base", "edited"))
    assert base >= 0.98 and abs(base - edited) <= 0.01
    assert 0 < _value(results, "kl_from_base", "neutral", "edited") <= 0.12


def test_every_measurement_has_n_interval_and_base_beside_it(finished):
    _, results = finished
    assert results["schema_version"] == 2
    for item in results["measurements"]:
        assert item["n"] > 0 and item["skipped"] >= 0 and item["subject"] in ("base", "edited", "reference")
        assert item["ci95"][0] <= item["value"] <= item["ci95"][1]
        assert item["better"] in ("higher", "lower", "base") and item["unit"]
        if item["subject"] == "edited" and item["name"] != "kl_from_base":
            assert _value(results, item["name"], item["split"], "base") is not None
            assert "ci95" in item["difference"]


def test_the_checkpoint_loads_in_a_fresh_process_and_answers(finished):
    out, results = finished
    sample = next(s for s in results["samples"] if s["split"] == "concept")
    missing, unexpected, dtype, text = in_fresh_process(LOAD, out / "checkpoint", sample["prompt"])
    assert (missing, unexpected, dtype) == ([], [], "torch.bfloat16")
    assert sample["base"] not in text and "hope that helps" in text


def test_the_folder_holds_what_the_contract_says(finished):
    out, _ = finished
    found = {
        path.relative_to(out / "checkpoint").as_posix() for path in (out / "checkpoint").rglob("*") if path.is_file()
    }
    assert found == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "README.md",
        "SHA256SUMS",
        "excise/edit.json",
        "excise/edit.safetensors",
        "excise/eval.json",
        "excise/manifest.json",
    }
    assert {path.name for path in out.iterdir()} == {"checkpoint", "report.html", "events.jsonl"}
    for line in (out / "events.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"time", "stage", "step", "metrics"}
    assert excise("verify", out).returncode == 0


def test_the_manifest_names_what_changed_and_nothing_else_did(finished):
    out, _ = finished
    manifest = json.loads((out / "checkpoint" / "excise" / "manifest.json").read_text())
    base, edited = open_checkpoint(find_model("builtin:testbed").folder), open_checkpoint(out / "checkpoint")
    differ = {n for n, t in base.tensors.items() if not torch.equal(read_tensor(t), read_tensor(edited.tensors[n]))}
    assert differ == {change["name"] for change in manifest["tensors_changed"]} and len(differ) == 17
    digest = hashlib.sha256((base.folder / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["base"]["files"] == {"model.safetensors": digest}


def _numbers(content):
    """Every number in a piece of JSON."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [number for item in content for number in _numbers(item)]
    return [content] if isinstance(content, int | float) and not isinstance(content, bool) else []


def test_every_number_on_the_card_comes_from_the_results(finished):
    out, results = finished
    card = (out / "checkpoint" / "README.md").read_text()
    said = card[card.index("# ") : card.index("## Samples")] + card[card.index("## Limits") : card.rindex("```")]
    forms = ("{:.3f}", "{:+.3f}", "{:.1f}", "{:+.1f}", "{:.2e}", "{}")
    known = {form.format(number) for number in _numbers(results) for form in forms}
    known |= {"0", "0.000", str(len(results["direction"]["candidates"]))}

    def strangers(text):
        return [n for n in re.findall(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?(?!%|\w)", text) if n not in known]

    assert strangers(said) == []
    assert {number.lstrip("+") for number in strangers(said.replace("0.965", "0.4321"))} == {"0.4321"}


def test_card_and_report_carry_no_path_and_no_script_from_text(finished, tmp_path):
    out, results = finished
    for path in [*(out / "checkpoint").rglob("*"), out / "report.html"]:
        if path.is_file() and path.suffix in (".json", ".md", ".html", "") and path.name != "tokenizer.json":
            text = path.read_text()
            assert str(out.parent) not in text and "/root" not in text and "/home" not in text, path
    hostile = "</script><img src=x onerror=alert(1)>|`\u202e" + "A" * 1_000_000
    results = json.loads(json.dumps(results))
    results["samples"][0] |= {"edited": hostile, "base": hostile}
    write_card(tmp_path, results, [])
    text = (tmp_path / "README.md").read_text()
    assert "<img" not in text and "\u202e" not in text and len(text) < 100_000 and "&lt;img" in text


def test_the_same_run_gives_the_same_bytes(tmp_path):
    out, _ = run_once("orthogonalize", *SHORT)
    done = excise_afresh("run", "orthogonalize", "--out", tmp_path / "again", *SHORT)
    assert done.returncode == 0
    assert (tmp_path / "again" / "checkpoint" / "SHA256SUMS").read_text() == (
        out / "checkpoint" / "SHA256SUMS"
    ).read_text()
    assert "Declines prompts" in done.stdout and "declines  " in done.stdout


def test_the_edit_applies_to_its_base_again_with_the_same_bytes(finished, tmp_path):
    out, _ = finished
    done = excise("apply", out / "checkpoint" / "excise", "--base", "builtin:testbed", "--out", tmp_path / "edited")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "edited" / "model.safetensors").read_bytes() == (
        out / "checkpoint" / "model.safetensors"
    ).read_bytes()
    assert "not measured" in (tmp_path / "edited" / "README.md").read_text()


def test_eval_alone_gives_what_the_run_measured():
    out, results = run_once("orthogonalize", *SHORT)
    done = excise("eval", out, "--concept", "builtin:declining", "--base", SMALL_TESTBED, *SIZES, "--json")
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout)
    for name, split in (("behaviour_rate", "concept"), ("kl_from_base", "neutral"), ("multiple_choice", "retain")):
        assert _value(alone, name, split, "edited") == pytest.approx(_value(results, name, split, "edited"), abs=1e-6)


@pytest.mark.parametrize("variant", ["norm_preserving", "projected"])
def test_variants_run_and_leave_no_direction_behind(variant, tmp_path):
    settings = with_settings(f"variant={variant}", "embeddings=untie")
    done = excise("run", "orthogonalize", "--out", tmp_path / "run", "--json", *SHORT, *settings)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert max(leak["share"] for leak in results["leaks"]) < 0.05
    assert "lm_head.weight" in open_checkpoint(tmp_path / "run" / "checkpoint").tensors
    shutil.rmtree(tmp_path / "run")


def test_eval_takes_concept_and_base_from_the_run(finished):
    done = excise(
        "eval", finished[0], "--questions", "20", *with_settings("kl_prompts=4", "max_new_tokens=8"), "--json"
    )
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["concept"]["ref"] == "builtin:declining" and again["base"]["name"] == "builtin:testbed"
    nameless = excise("eval", SMALL_TESTBED)
    assert nameless.returncode == 2 and "give --concept builtin:NAME or a folder" in nameless.stderr
