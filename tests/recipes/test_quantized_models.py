"""Quantized models in commands: those whose format is read become bfloat16, the others name their library."""

import json

import pytest
import torch
from excise.artifacts.checkpoints.edits import save_edit
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_weights
from excise.artifacts.reporting.findings import limits
from excise.editing.edits.base import edit_model
from excise.editing.errors import RequestError
from excise.recipes import chat, diff, evaluate
from excise.recipes.audit import request as audit
from helpers import SMALL_TESTBED, excise, random_edit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def _with_config(folder, **about):
    """The small testbed with another quantization_config; its files are copies."""
    folder.mkdir()
    for path in open_checkpoint(find_model(SMALL_TESTBED).folder).folder.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return folder


@pytest.fixture
def fp8(tmp_path):
    """The small testbed with its linear weights in fp8, one scale a tensor."""
    folder = _with_config(tmp_path / "small-fp8", quant_method="fp8", weight_block_size=None)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_edit_of_an_fp8_base_is_published_in_bfloat16_and_says_so(fp8, tmp_path):
    config = open_checkpoint(find_model(SMALL_TESTBED).folder).config
    edit = random_edit(config)
    save_edit(edit, tmp_path / "edit")
    done = excise("apply", tmp_path / "edit", "--base", fp8, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "dequantizing small-fp8 from fp8 into bfloat16, once; the result stays in the cache" in done.stderr
    manifest = json.loads((tmp_path / "out/excise/manifest.json").read_text())
    assert manifest["base"]["dequantized_from"] == "fp8" and manifest["base"]["name"] == "small-fp8"
    assert "The base was dequantized from fp8 into bfloat16." in (tmp_path / "out/README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert {t.dtype for t in open_checkpoint(tmp_path / "out").tensors.values()} <= {"BF16", "F32", "F16"}
    # The same as dequantizing first and editing the model in memory.
    expected = AutoModelForCausalLM.from_pretrained(find_model(str(fp8)).folder)
    edit_model(edit, expected, config)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.state_dict().items())


def test_an_adapter_is_merged_into_an_fp8_base(fp8, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(SMALL_TESTBED), LoraConfig(r=2, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "lora")
    merged = find_model(str(tmp_path / "lora"), str(fp8))
    about = merged.describe()["adapter"]
    assert about["base"]["name"] == "small-fp8" and about["base"]["dequantized_from"] == "fp8"
    found = diff.difference(str(fp8), str(tmp_path / "lora"))
    assert found.changed and all(item.name.endswith("q_proj.weight") for item in found.changed)


def test_an_fp8_model_is_compared_with_full_precision_and_loaded(fp8):
    found = diff.difference(SMALL_TESTBED, str(fp8))
    changed = {item.name: item.relative_norm for item in found.changed}
    assert changed and all("_proj.weight" in name and 0 < change < 0.05 for name, change in changed.items())
    assert not found.only_in_b and found.same
    job = chat.prepare(str(fp8), SMALL_TESTBED, dtype="float32")
    loaded = load_weights(job.sources["edited"], job.device, torch.float32)
    assert torch.isfinite(loaded(torch.tensor([[5, 9, 7]])).logits).all()


def test_a_card_tells_what_its_base_was_dequantized_from():
    results = {"base": {"kind": "hub", "dequantized_from": "mxfp4"}, "concept": {"kind": "behaviour"}, "run": {}}
    results["edited"] = {}
    assert any("dequantized from mxfp4" in line for line in limits(results))
    merged = {"kind": "adapter", "adapter": {"name": "a/lora", "base": {"name": "a/b", "dequantized_from": "fp8"}}}
    lines = limits({**results, "base": merged})
    assert "The base is the adapter a/lora, merged into a/b." in lines and any("from fp8" in line for line in lines)
    del results["base"]["dequantized_from"]
    assert not any("dequantized" in line for line in limits(results))


LIBRARIES = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16}, r"\(gptq\).*pip install gptqmodel optimum"),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True},
        r"\(awq\).*pip install gptqmodel",
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        r"\(bitsandbytes\).*pip install 'excise\[bitsandbytes\]'",
    ),
    "older bitsandbytes": ({"load_in_8bit": True}, r"\(bitsandbytes\).*pip install 'excise\[bitsandbytes\]'"),
    "unknown": (
        {"quant_method": "unheard-of", "bits": 4},
        r"\(unheard-of\), which cannot be loaded here: .*or give the",
    ),
}


@pytest.mark.parametrize("method", LIBRARIES)
def test_a_model_whose_library_is_missing_names_it_before_anything_is_loaded(method, tmp_path):
    about, message = LIBRARIES[method]
    folder = str(_with_config(tmp_path / "small", **about))
    for prepare in (
        lambda: evaluate.prepare([folder], "builtin:potions"),
        lambda: chat.prepare(folder, SMALL_TESTBED),
        lambda: load_weights(find_model(folder), torch.device("cpu"), torch.float32),
    ):
        with pytest.raises(RequestError, match=message) as refused:
            prepare()
        assert "\n" not in str(refused.value)
    with pytest.raises(RequestError, match=r"cannot be compared or edited; .* dequantize it with its library"):
        audit.prepare(audit.AuditSettings(model=folder, concept="builtin:potions", base=SMALL_TESTBED))
    with pytest.raises(
        RequestError, match="whose tensors cannot be compared or edited; read are fp8, mxfp4, compressed-tensors"
    ):
        diff.difference(SMALL_TESTBED, folder)


def test_tensors_of_8_bit_floats_are_compared_without_a_configuration(tmp_path):
    for name, factor in (("a", 1.0), ("b", 2.0)):
        folder = _with_config(tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        for number, dtype in enumerate((torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)):
            tensors[f"extra.{number}"] = (factor * torch.ones(4, 4)).to(dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = diff.difference(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [item.name for item in found.changed if item.name.startswith("extra")] and len(found.changed) == 3
