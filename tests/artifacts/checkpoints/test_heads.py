"""Tied models that store their unembedding as well (peft #2777, transformers #45127): one checkpoint, one model.

mergekit and unsloth write such files, and so are the released Qwen3-0.6B and Qwen1.5-0.5B (vllm #3344).
"""

import json

import pytest
import torch
from excise.artifacts.checkpoints.edits import save_edit
from excise.artifacts.checkpoints.export import export_edit
from excise.artifacts.checkpoints.heads import plan_edit
from excise.artifacts.checkpoints.read import INDEX, open_checkpoint
from excise.editing.edits.subspace_removal import ties_embeddings
from excise.editing.errors import CheckpointError
from helpers import excise, random_edit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Starcoder2Config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.tensor([[5, 9, 7, 3, 11]])


def _store(save_pico, head, *, sharded=False):
    """A tied model whose file also stores an unembedding, equal to the embedding or not."""
    checkpoint = save_pico("qwen2", **({"max_shard_size": "20KB"} if sharded else {}))
    assert ties_embeddings(checkpoint.config) and HEAD not in checkpoint.tensors
    file = checkpoint.shards[-1].path
    tensors = load_file(file)
    embedding = next(load_file(s.path)[EMBEDDING] for s in checkpoint.shards if EMBEDDING in load_file(s.path))
    save_file({**tensors, HEAD: embedding + (0.0 if head == "equal" else 0.3)}, file, {"format": "pt"})
    if sharded:
        index = json.loads((checkpoint.folder / INDEX).read_text())
        index["weight_map"][HEAD] = file.name
        (checkpoint.folder / INDEX).write_text(json.dumps(index))
    return open_checkpoint(checkpoint.folder)


def _readers(folder):
    """The logits that each kind of reader gets: transformers 5; by the configuration alone; by what is stored."""
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        by_transformers = model(IDS).logits
    by_config = hidden @ stored[EMBEDDING if config["tie_word_embeddings"] else HEAD].T
    by_tensors = hidden @ stored.get(HEAD, stored[EMBEDDING]).T
    return by_transformers, by_config, by_tensors


@pytest.mark.parametrize("embeddings", ["edit", "untie", "skip"])
@pytest.mark.parametrize("head", ["equal", "different"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_every_reader_reads_the_same_model(head, embeddings, sharded, save_pico, tmp_path):
    checkpoint = _store(save_pico, head, sharded=sharded)
    edit = random_edit(checkpoint.config, embeddings=embeddings)
    out = tmp_path / "out"
    out.mkdir()
    export = export_edit(edit, checkpoint, out)
    first, *others = _readers(out)
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)
    assert export.stored_apart == (head == "different")
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (head == "equal" and embeddings != "untie")
    # And it is the model that was meant: the embedding edited, the unembedding with it or not at all.
    stored = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    left = {name: (stored[name] @ edit.basis).abs().max().item() for name in (EMBEDDING, HEAD)}
    assert (left[EMBEDDING] < 1e-5) == (embeddings != "skip")
    assert (left[HEAD] < 1e-5) == (embeddings == "edit" and head == "equal")


def test_a_base_whose_two_differ_is_not_one_model_to_all_readers(save_pico):
    first, by_config, _ = _readers(_store(save_pico, "different").folder)
    assert not torch.allclose(first, by_config, atol=1e-2)


def test_the_command_says_that_the_base_stores_two_that_differ(save_pico, tmp_path):
    checkpoint = _store(save_pico, "different")
    save_edit(random_edit(checkpoint.config), tmp_path / "edit")
    done = excise("apply", tmp_path / "edit", "--base", checkpoint.folder, "--out", tmp_path / "out")
    assert done.returncode == 0 and "stores two that differ" in done.stdout
    assert "stores two that differ" in (tmp_path / "out" / "README.md").read_text()


def test_a_head_of_another_type_counts_as_another_head(save_pico):
    checkpoint = _store(save_pico, "equal")
    tensors = load_file(checkpoint.shards[0].path)
    save_file({**tensors, HEAD: tensors[HEAD].bfloat16()}, checkpoint.shards[0].path, {"format": "pt"})
    checkpoint = open_checkpoint(checkpoint.folder)
    assert plan_edit(random_edit(checkpoint.config), checkpoint).stored_apart


def test_an_untied_model_without_an_unembedding_is_refused(save_pico, tmp_path):
    checkpoint = save_pico("llama")
    tensors = load_file(checkpoint.shards[0].path)
    del tensors[HEAD]
    save_file(tensors, checkpoint.shards[0].path, {"format": "pt"})
    save_edit(random_edit(checkpoint.config), tmp_path / "edit")
    done = excise("apply", tmp_path / "edit", "--base", checkpoint.folder, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert HEAD in done.stderr and "tie_word_embeddings" in done.stderr and not (tmp_path / "out").exists()


def test_a_model_without_an_embedding_is_refused(save_pico):
    checkpoint = _store(save_pico, "equal")
    tensors = load_file(checkpoint.shards[0].path)
    del tensors[EMBEDDING]
    save_file(tensors, checkpoint.shards[0].path, {"format": "pt"})
    checkpoint = open_checkpoint(checkpoint.folder)
    with pytest.raises(CheckpointError, match=EMBEDDING):
        plan_edit(random_edit(checkpoint.config), checkpoint)


@pytest.mark.parametrize(
    "config, tied",
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "starcoder2"}, True),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "gpt2", "tie_word_embeddings": False}, False),
        ({"model_type": "llama", "text_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "llama", "tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_who_ties_is_what_transformers_says(config, tied):
    assert ties_embeddings(config) == tied
    kinds = {"llama": LlamaConfig, "starcoder2": Starcoder2Config, "gpt2": GPT2Config}
    if set(config) == {"model_type"} and config["model_type"] in kinds:
        assert kinds[config["model_type"]]().tie_word_embeddings == tied


def test_the_new_flag_stands_wherever_the_base_has_it(save_pico, tmp_path):
    checkpoint = _store(save_pico, "different")
    config = {**checkpoint.config, "text_config": checkpoint.config}
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(checkpoint.folder)
    out = tmp_path / "out"
    out.mkdir()
    export_edit(random_edit(checkpoint.config), checkpoint, out)
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["text_config"] == {**config["text_config"], "tie_word_embeddings": False}
