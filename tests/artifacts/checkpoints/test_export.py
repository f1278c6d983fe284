import json
import shutil

import pytest
import torch
from excise.artifacts.checkpoints.export import export_edit
from excise.artifacts.checkpoints.read import open_checkpoint, read_tensor
from excise.editing.architectures import architecture_of, layer_count
from excise.editing.edits.base import edit_model
from excise.editing.edits.changes import Change
from excise.editing.errors import EditError, RequestError
from excise.editing.hooks.leaks import check_leaks, compare_writes, measure_writes
from excise.editing.hooks.residual_stream import residual_stream
from helpers import POST_NORM, in_fresh_process, make_pico, random_edit
from safetensors.torch import load_file, save_file

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True, attn_implementation="eager")
logits = model(torch.arange(3, 12)[None]).logits[0, -1, :8].tolist()
print(json.dumps([sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), logits]))
"""


def _export(checkpoint, edit, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    return out, export_edit(edit, checkpoint, out)


def test_export_removes_the_direction_and_touches_nothing_else(architecture, save_pico, tmp_path):
    checkpoint = save_pico(architecture)
    edit = random_edit(checkpoint.config, rank=2)
    out, export = _export(checkpoint, edit, tmp_path)
    declared = set(edit.plan(checkpoint.config, list(checkpoint.tensors)).declared)
    exported = open_checkpoint(out)
    changed = set()
    for name, tensor in checkpoint.tensors.items():
        if not torch.equal(read_tensor(tensor), read_tensor(exported.tensors[name])):
            changed.add(name)
    assert changed == declared == {change.name for change in export.changes}
    assert max(change.residual for change in export.changes) < 1e-5
    assert min(change.written for change in export.changes) > 1e-3  # every declared tensor had something to lose


def test_export_loads_in_a_fresh_process_and_equals_the_edit_in_memory(architecture, save_pico, tmp_path):
    checkpoint = save_pico(architecture)
    edit = random_edit(checkpoint.config)
    out, _ = _export(checkpoint, edit, tmp_path)
    missing, unexpected, logits = in_fresh_process(LOAD, out)
    assert (missing, unexpected) == ([], [])
    model = make_pico(architecture)
    before = model(torch.arange(3, 12)[None]).logits[0, -1, :8]
    edit_model(edit, model, model.config.to_dict())
    expected = model(torch.arange(3, 12)[None]).logits[0, -1, :8]
    assert (before - expected).abs().max() > 1e-3
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-5)


def test_no_sublayer_writes_the_direction_any_more(architecture, save_pico, tmp_path):
    """On activations, behind the norms: holds for post-norm rows too, where it is the only true check."""
    checkpoint = save_pico(architecture)
    edit = random_edit(checkpoint.config)
    row, model = architecture_of(checkpoint.config), make_pico(architecture)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = measure_writes(model, row, edit.basis_at, [inputs])
    edit_model(edit, model, model.config.to_dict())
    leaks = compare_writes(before, measure_writes(model, row, edit.basis_at, [inputs]), row, edit.strength_at)
    check_leaks(leaks, 1e-3)
    assert min(write.along for write in before) > 1e-3
    assert max(leak.share for leak in leaks) < 1e-5
    assert len(leaks) == 1 + 2 * len(edit.layer_strengths)
    stream = residual_stream(model, row, inputs, (0, 1, len(edit.layer_strengths)), 9)
    assert (stream.float() @ edit.basis).abs().max() < 1e-4


def test_what_an_mlp_still_writes_by_design_is_no_leak(architecture, save_pico):
    """Attention loses all of the direction and MLPs nothing; without a word on MLPs the same weights would leak."""
    model, row = make_pico(architecture), architecture_of(save_pico(architecture).config)
    config = model.config.to_dict()
    edit = random_edit(config, mlp_strengths=(0.0,) * layer_count(config))
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = measure_writes(model, row, edit.basis_at, [inputs])
    edit_model(edit, model, config)
    after = measure_writes(model, row, edit.basis_at, [inputs])
    leaks = compare_writes(before, after, row, edit.strength_at)
    check_leaks(leaks, 0.05)
    assert [leak.expected for leak in leaks if leak.layer == 0] == [0.0, 1.0]
    with pytest.raises(EditError, match="still writes"):
        check_leaks(compare_writes(before, after, row, lambda *_: 1.0), 0.05)


@pytest.mark.parametrize("name", POST_NORM)
def test_an_edit_that_ignores_the_gain_leaks_and_the_check_names_the_writer(name, save_pico):
    model = make_pico(name)
    config = model.config.to_dict()
    edit, row = random_edit(config), architecture_of(config)
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = measure_writes(model, row, edit.basis_at, [inputs])
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight -= edit.basis @ (edit.basis.T @ weight)
    leaks = compare_writes(
        before, measure_writes(model, row, edit.basis_at, [inputs]), row, lambda layer, _: float(layer is not None)
    )
    with pytest.raises(EditError, match=r"layernorm of layer \d still writes"):
        check_leaks(leaks, 0.05)


def test_bfloat16_leaves_less_than_a_hundredth_in_every_tensor(architecture, save_pico, tmp_path):
    checkpoint = save_pico(architecture, torch.bfloat16)
    _, export = _export(checkpoint, random_edit(checkpoint.config), tmp_path)
    matrices = [change for change in export.changes if not change.name.endswith("bias")]
    assert 0 < max(change.residual for change in matrices) < 1e-2


def test_shards_keep_their_layout_and_every_untouched_byte(save_pico, tmp_path):
    checkpoint = save_pico("qwen3", max_shard_size="20KB")
    assert len(checkpoint.shards) > 2
    out, _ = _export(checkpoint, random_edit(checkpoint.config), tmp_path)
    exported = open_checkpoint(out)
    assert [shard.path.name for shard in exported.shards] == [shard.path.name for shard in checkpoint.shards]
    assert [shard.header for shard in exported.shards] == [shard.header for shard in checkpoint.shards]
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (checkpoint.folder / index).read_bytes()


def test_untying_keeps_the_old_unembedding(save_pico, tmp_path):
    checkpoint = save_pico("qwen2")
    assert "lm_head.weight" not in checkpoint.tensors
    out, export = _export(checkpoint, random_edit(checkpoint.config, embeddings="untie"), tmp_path)
    exported = open_checkpoint(out)
    assert export.untied == "lm_head.weight"
    old, new = (read_tensor(c.tensors["model.embed_tokens.weight"]) for c in (checkpoint, exported))
    assert torch.equal(read_tensor(exported.tensors["lm_head.weight"]), old)
    assert not torch.equal(new, old)
    missing, unexpected, _ = in_fresh_process(LOAD, out)
    assert (missing, unexpected) == ([], [])


def test_skipping_embeddings_leaves_them(save_pico, tmp_path):
    checkpoint = save_pico("llama")
    out, _ = _export(checkpoint, random_edit(checkpoint.config, embeddings="skip"), tmp_path)
    name = "model.embed_tokens.weight"
    assert torch.equal(read_tensor(open_checkpoint(out).tensors[name]), read_tensor(checkpoint.tensors[name]))


def test_only_chosen_layers_change(save_pico, tmp_path):
    checkpoint = save_pico("llama")
    edit = random_edit(checkpoint.config, embeddings="skip")
    edit = type(edit)(edit.basis, edit.model_type, (0.0, 1.0), "skip")
    _, export = _export(checkpoint, edit, tmp_path)
    assert export.changes and all(".layers.1." in change.name for change in export.changes)


def test_an_edit_that_changes_nothing_is_an_error(save_pico, tmp_path):
    checkpoint = save_pico("llama")
    edit = random_edit(checkpoint.config)
    first, _ = _export(checkpoint, edit, tmp_path)
    # What has no component left has nothing to lose, up to rounding; make it exact.
    tensors = load_file(first / "model.safetensors")
    for name in edit.plan(checkpoint.config, list(tensors)).declared:
        tensors[name].zero_()
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(EditError, match="changed none of its"):
        export_edit(edit, open_checkpoint(first), again)


def test_a_nan_anywhere_stops_the_export(save_pico, tmp_path):
    checkpoint = save_pico("llama", torch.bfloat16)
    path = checkpoint.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(EditError, match=r"gate_proj\.weight holds NaN"):
        _export(open_checkpoint(checkpoint.folder), random_edit(checkpoint.config), tmp_path)


def test_an_edit_whose_strengths_are_all_zero_is_refused(save_pico):
    checkpoint = save_pico("llama")
    edit = random_edit(checkpoint.config, embeddings="skip")
    with pytest.raises(RequestError, match="touches no tensor"):
        type(edit)(edit.basis, "llama", (0.0, 0.0), "skip").plan(checkpoint.config, list(checkpoint.tensors))


def test_configs_do_not_carry_the_path_they_came_from(save_pico, tmp_path):
    checkpoint = save_pico("llama")
    path = checkpoint.folder / "config.json"
    path.write_text(json.dumps({**checkpoint.config, "_name_or_path": "/home/someone/model"}))
    (checkpoint.folder / "pytorch_model.bin").write_bytes(b"pickle")
    (checkpoint.folder / "modeling_custom.py").write_text("print('code')")
    out, _ = _export(open_checkpoint(checkpoint.folder), random_edit(checkpoint.config), tmp_path)
    assert "someone" not in (out / "config.json").read_text()
    assert {path.name for path in out.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_change_is_recorded_for_each_fused_expert_tensor(save_pico, tmp_path):
    checkpoint = save_pico("gpt_oss")
    _, export = _export(checkpoint, random_edit(checkpoint.config), tmp_path)
    experts: list[Change] = [change for change in export.changes if "experts" in change.name]
    assert {change.name.rsplit(".", 1)[-1] for change in experts} == {"down_proj", "down_proj_bias"}
    shutil.rmtree(tmp_path / "out")
