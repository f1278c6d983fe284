"""A KL budget end to end: on disk, in a fresh process, against a naive oracle."""

import json

import pytest
import torch
from excise.artifacts.checkpoints.edits import load_edit
from excise.artifacts.checkpoints.originals import originals_of
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.edits.strength import scaled
from excise.editing.errors import EditError
from excise.recipes.common.kl_budget import Budget, budget_texts, fit
from helpers import SMALL_TESTBED, excise, in_fresh_process, run_once, with_settings

BUDGET = 0.004
SMALL = ["--model", SMALL_TESTBED, "--concept", "builtin:potions", "--dtype", "float32"]
SIZES = with_settings(
    "questions=10", "kl_prompts=8", "max_new_tokens=2", "steps=12", "batch_size=2", "learning_rate=0.01"
)

ORACLE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
base, edited = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval() for name in sys.argv[1:3])
total, count = 0.0, 0
with torch.no_grad():
    for ids in json.loads(sys.argv[3]):
        for end in range(1, len(ids)):
            # One token at a time, from the whole text before it: nothing is batched, padded or cached.
            row = torch.tensor([ids[:end]])
            p, q = (model(input_ids=row).logits[0, -1].log_softmax(-1) for model in (base, edited))
            total, count = total + float((p.exp() * (p - q)).sum()), count + 1
print(json.dumps(total / count))
"""


@pytest.fixture(scope="module")
def base():
    source = find_model(SMALL_TESTBED, to_edit=True)
    return load_model(source, torch.device("cpu"), torch.float32), open_checkpoint(source.folder)


@pytest.fixture(scope="module")
def finished():
    return run_once("grad_diff", *SMALL, "--kl-budget", BUDGET, *SIZES)


def test_the_checkpoint_on_disk_keeps_the_budget_by_a_naive_oracle_in_a_fresh_process(finished, base):
    out, results = finished
    record = results["kl_budget"]
    texts = budget_texts(base[0], load_concept("builtin:potions"), 8)
    rows = [[*text.prompt_ids, *text.ids] for text in texts.texts]
    naive = in_fresh_process(ORACLE, base[1].folder, out / "checkpoint", json.dumps(rows))
    assert record["outcome"] == "within" and 0.95 * BUDGET <= record["kl"] <= BUDGET
    assert naive == pytest.approx(record["kl"], rel=1e-3)
    assert len(record["tries"]) <= 6 and record["tries"][0]["divergence"] > BUDGET


def test_the_strength_is_not_chosen_on_the_texts_that_are_reported(base):
    concept = load_concept("builtin:potions")
    few, all_of_them = budget_texts(base[0], concept, 8), budget_texts(base[0], concept, 1000)
    assert not few.reported and len(few.texts) == 8
    assert all_of_them.reported and len(all_of_them.texts) == 320


def test_manifest_card_results_and_edit_say_how_it_was_chosen(finished):
    out, results = finished
    manifest = json.loads((out / "checkpoint/excise/manifest.json").read_text())
    card = (out / "checkpoint/README.md").read_text()
    record = results["kl_budget"]
    assert manifest["run"]["kl_budget"] == record == load_edit(out).provenance["kl_budget"]
    assert manifest["run"]["settings"]["kl_budget"] == BUDGET
    assert "## How the strength was chosen" in card and f"{record['strength']:.4g} times" in card
    assert f"--set kl_budget={BUDGET}" in results["run"]["command"]


def test_the_adapter_beside_the_checkpoint_has_the_same_strength(finished, base, tmp_path):
    from peft import PeftModel

    out, _ = finished
    loaded = load_model(find_model(str(out)), torch.device("cpu"), torch.float32)
    again = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
    adapted = PeftModel.from_pretrained(again.model, out / "checkpoint" / "adapter")
    ids = torch.tensor([[5, 9, 17, 40]])
    with torch.no_grad():
        one, other, plain = (model(input_ids=ids).logits for model in (loaded.model, adapted, base[0].model))
    # The checkpoint is stored in bfloat16.
    assert (one - other).abs().max() < 0.2 * (one - plain).abs().max()


def test_fitting_leaves_the_base_as_it_was_bit_for_bit(finished, base):
    loaded, checkpoint = base
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    edit = scaled(load_edit(finished[0]), 2.0)
    seen = []
    fit(edit, Budget(0.001, texts=8), loaded, checkpoint, load_concept("builtin:potions"), Events(), seen.append)
    assert len(seen) == 1 and 0 < seen[0] < 1
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_original_weights_are_read_from_the_checkpoint_and_not_held(base):
    loaded, checkpoint = base
    originals = originals_of(checkpoint, loaded.model)
    name = "model.layers.0.mlp.down_proj.weight"
    assert originals(name).dtype == torch.bfloat16 != loaded.model.dtype
    assert originals(name) is not originals(name)


def test_a_budget_below_what_rounding_makes_is_an_error_that_says_so(finished, base):
    loaded, checkpoint = base
    edit = load_edit(finished[0])
    # One weight alone: it takes its next value in bfloat16, or stays.
    name = next(iter(edit.factors))
    one = edit.factors[name]
    left, right = torch.zeros(one.height, 1), torch.zeros(1, one.width)
    left[0, 0] = right[0, 0] = 1.0
    single = type(edit)({name: type(one)(left, right)}, edit.model_type, edit.width, edit.layers)
    with pytest.raises(EditError, match=r"kl_budget=1e-15 is below what rounding .* raise kl_budget"):
        fit(single, Budget(1e-15, texts=8), loaded, checkpoint, load_concept("builtin:potions"), Events())


def test_apply_takes_a_budget_and_refuses_what_has_no_strength(finished, tmp_path):
    out, _ = finished
    half = excise(
        "apply", out, "--base", SMALL_TESTBED, "--kl-budget", BUDGET / 2, "--out", tmp_path / "half", "--json"
    )
    assert half.returncode == 0, half.stderr
    record = json.loads(half.stdout)["kl_budget"]
    assert 0.95 * BUDGET / 2 <= record["kl"] <= BUDGET / 2 and record["before"]["budget"] == BUDGET
    wrong = excise("apply", out, "--base", SMALL_TESTBED, "--kl-budget", 0, "--out", tmp_path / "no")
    assert wrong.returncode == 2 and "allowed: a budget above 0" in wrong.stderr
    pruned = excise("run", "prune", *SMALL, "--kl-budget", "0.1", "--out", tmp_path / "pruned")
    assert pruned.returncode == 2 and "lower share" in pruned.stderr and not (tmp_path / "pruned").exists()


def test_orthogonalization_keeps_a_budget_too(tmp_path):
    small = with_settings("questions=10", "kl_prompts=4", "max_new_tokens=4", "validation_pairs=4", "dtype=float32")
    _, results = run_once("orthogonalize", "--model", SMALL_TESTBED, "--kl-budget", "0.0002", *small)
    record = results["kl_budget"]
    assert record["outcome"] == "within" and record["strength"] < 1
    assert set(results["edited"]["layer_strengths"]) == {record["strength"]}
