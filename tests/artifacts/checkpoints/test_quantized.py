"""Quantized checkpoints become bfloat16 ones: each format against its definition, and against the library that has it."""

import json

import pytest
import torch
from excise.artifacts.checkpoints.quantized import read_quantized
from excise.artifacts.checkpoints.read import check_finite, open_checkpoint
from excise.artifacts.models.find import find_model
from excise.editing.errors import CheckpointError
from excise.editing.numerics.stored_formats import E2M1, block_size, powers_of_two, unpack_e2m1, unpack_floats
from helpers import make_pico
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

TOKENS = {"input_ids": torch.tensor([[5, 9, 7, 3, 11]])}
LARGEST = 448
"""The largest number of float8_e4m3fn."""


def _save(folder, model, changed, about):
    """A checkpoint in three shards, with every other changed tensor's scale in another shard than its values."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name not in changed}
    for name, parts in changed.items():
        tensors.pop(name, None)
        tensors |= parts
    shards = [{}, {}, {}]
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        shards[number % 3][name] = tensor.contiguous()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": about, "dtype": "bfloat16"}
    path.write_text(json.dumps(config))
    return folder


def _linear(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "_proj.weight" in name}


def _tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def _check(folder, expected, model):
    """The dequantized checkpoint holds what is expected, everything else bit for bit, and transformers opens it."""
    source = find_model(str(folder))
    made, stored = _tensors(source.folder), _tensors(folder)
    for name, weight in expected.items():
        assert made[name].dtype == torch.bfloat16 and torch.equal(made[name], weight), name
    for name in made.keys() - expected.keys():
        assert torch.equal(made[name], stored[name]), name
    assert made.keys() == model.state_dict().keys() - (
        {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    )
    config = json.loads((source.folder / "config.json").read_text())
    assert "quantization_config" not in config
    check_finite(open_checkpoint(source.folder))
    opened, info = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.isfinite(opened(**TOKENS).logits).all()
    return source


def _fp8_by_blocks(weight, size):
    """Values and scales as the definition has them: each block divided by its largest value over 448."""
    rows, columns = weight.shape
    scales = torch.zeros(-(-rows // size), -(-columns // size))
    values = torch.zeros_like(weight)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            place = (slice(r * size, (r + 1) * size), slice(c * size, (c + 1) * size))
            scales[r, c] = weight[place].abs().max() / LARGEST
            values[place] = weight[place] / scales[r, c]
    return values.to(torch.float8_e4m3fn), scales


def _naive(values, scales, size):
    """Element by element."""
    found = torch.empty(values.shape)
    plain = values.float()
    for r in range(values.shape[0]):
        for c in range(values.shape[1]):
            found[r, c] = plain[r, c] * scales[r // size, c // size]
    return found.bfloat16()


@pytest.mark.parametrize("size", [16, 20])
def test_fp8_by_blocks_is_dequantized_as_defined(size, tmp_path):
    model = make_pico("qwen3")
    changed, expected = {}, {}
    for name, weight in _linear(model).items():
        values, scales = _fp8_by_blocks(weight, size)
        changed[name] = {name: values, f"{name}_scale_inv": scales}
        expected[name] = _naive(values, scales, size)
        if not weight.shape[0] % size and not weight.shape[1] % size:
            theirs = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
            assert torch.equal(theirs, expected[name])
        assert (expected[name].float() - weight).abs().max() < 0.1 * weight.abs().max()
    about = {"quant_method": "fp8", "weight_block_size": [size, size], "activation_scheme": "dynamic"}
    folder = _save(tmp_path / "fp8", model, changed, about)
    source = _check(folder, expected, model)
    assert source.describe()["dequantized_from"] == "fp8" and source.name == "fp8"
    assert find_model(str(folder)).folder == source.folder


def test_fp8_with_one_scale_for_each_tensor_and_scales_of_activations(tmp_path):
    model = make_pico("llama")
    changed, expected = {}, {}
    for name, weight in _linear(model).items():
        scale = weight.abs().max() / LARGEST
        values = (weight / scale).to(torch.float8_e4m3fn)
        activation = f"{name.removesuffix('.weight')}.activation_scale"
        changed[name] = {name: values, f"{name}_scale_inv": scale.bfloat16(), activation: torch.ones(())}
        expected[name] = (values.float() * float(scale.bfloat16())).bfloat16()
    about = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    _check(_save(tmp_path / "fp8", model, changed, about), expected, model)


def _mxfp4(weight):
    """Blocks and scales of experts [E, in, out], 32 inputs a scale; values are rounded to the nearest of the 16."""
    experts, inputs, outputs = weight.shape
    groups = weight.mT.reshape(experts, outputs, inputs // 32, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(-1))).int() - 2
    table = torch.tensor(E2M1)
    codes = (groups[..., None] / 2.0 ** exponents[..., None, None] - table).abs().argmin(-1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return blocks, (exponents + 127).to(torch.uint8)


def test_mxfp4_experts_are_dequantized_as_defined(tmp_path):
    model = make_pico("gpt_oss")
    changed, expected = {}, {}
    for name, weight in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = _mxfp4(weight)
            changed[name] = {f"{name}_blocks": blocks, f"{name}_scales": scales}
            naive = torch.zeros(weight.shape)
            for expert, output, group, byte in torch.cartesian_prod(*map(torch.arange, blocks.shape)).tolist():
                pair, scale = (
                    int(blocks[expert, output, group, byte]),
                    2.0 ** (int(scales[expert, output, group]) - 127),
                )
                place = group * 32 + 2 * byte
                naive[expert, place, output] = E2M1[pair % 16] * scale
                naive[expert, place + 1, output] = E2M1[pair // 16] * scale
            expected[name] = naive.bfloat16()
            assert torch.equal(expected[name], convert_moe_packed_tensors(blocks, scales))
            assert (naive - weight).norm() < 0.2 * weight.norm()
    folder = _save(tmp_path / "mxfp4", model, changed, {"quant_method": "mxfp4"})
    assert _check(folder, expected, model).describe()["dequantized_from"] == "mxfp4"


def _packed(codes, bits):
    """Non-negative codes [rows, n] in 32-bit words, the first in the lowest bits."""
    per_word = 32 // bits
    rows, columns = codes.shape
    full = torch.zeros(rows, -(-columns // per_word) * per_word, dtype=torch.int64)
    full[:, :columns] = codes
    words = (full.reshape(rows, -1, per_word) << torch.arange(0, 32, bits)[:per_word]).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _integers(weight, bits, group, asymmetric):
    """Codes with sign, scales and zero points by groups of columns."""
    grouped = weight.reshape(len(weight), -1, group)
    half = 2 ** (bits - 1)
    if asymmetric:
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scales = ((high - low) / (2 * half - 1)).bfloat16().float()
        zeros = torch.round(-half - low / scales).clamp(-half, half - 1)
    else:
        scales = (grouped.abs().amax(-1) / (half - 1)).bfloat16().float()
        zeros = torch.zeros_like(scales)
    codes = torch.round(grouped / scales[..., None] + zeros[..., None]).clamp(-half, half - 1)
    return codes.reshape(weight.shape), scales, zeros


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_packed_integers_of_compressed_tensors_are_dequantized_as_defined(bits, asymmetric, ordered, tmp_path):
    model = make_pico("llama")
    half, changed, expected = 2 ** (bits - 1), {}, {}
    for number, (name, weight) in enumerate(_linear(model).items()):
        codes, scales, zeros = _integers(weight, bits, 16, asymmetric)
        module = name.removesuffix(".weight")
        order = torch.arange(weight.shape[1]) // 16
        if ordered:
            order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(number))]
        parts = {
            f"{module}.weight_packed": _packed(codes.long() + half, bits),
            f"{module}.weight_scale": scales.bfloat16(),
            f"{module}.weight_shape": torch.tensor(weight.shape),
            f"{module}.weight_g_idx": order.int() if ordered else -torch.ones(len(order), dtype=torch.int32),
        }
        if asymmetric:
            parts[f"{module}.weight_zero_point"] = _packed((zeros.long() + half).mT, bits).mT
        changed[name] = parts
        naive = torch.stack([(codes[:, c] - zeros[:, order[c]]) * scales[:, order[c]] for c in range(len(order))], 1)
        expected[name] = naive.bfloat16()
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16, "symmetric": not asymmetric}
    about = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    folder = _save(tmp_path / "packed", model, changed, about)
    source = _check(folder, expected, model)
    assert source.dequantized_from == "compressed-tensors"


@pytest.mark.parametrize("kind", ["fp8 tensor", "fp8 channel", "fp8 block", "int8 channel"])
def test_elements_of_compressed_tensors_are_dequantized_as_defined(kind, tmp_path):
    model = make_pico("llama")
    changed, expected = {}, {}
    for name, weight in _linear(model).items():
        largest = LARGEST if kind.startswith("fp8") else 127
        if kind == "fp8 block":
            values, scales = _fp8_by_blocks(weight, 16)
            expected[name] = _naive(values, scales, 16)
        else:
            scales = weight.abs().amax(1, keepdim=True) if "channel" in kind else weight.abs().max().reshape(1)
            scales = (scales / largest).bfloat16().float()
            values = (weight / scales).round() if kind.startswith("int") else weight / scales
            values = values.to(torch.int8 if kind.startswith("int") else torch.float8_e4m3fn)
            expected[name] = (values.float() * scales).bfloat16()
        module = name.removesuffix(".weight")
        changed[name] = {name: values, f"{module}.weight_scale": scales, f"{module}.input_scale": torch.ones(1)}
    weights = {"num_bits": 8, "type": kind[:3].replace("fp8", "float"), "strategy": kind.split()[1]}
    if kind == "fp8 block":
        weights["block_structure"] = [16, 16]
    about = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind.startswith("fp8") else "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    _check(_save(tmp_path / "elements", model, changed, about), expected, model)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_what_compressed_tensors_packed_is_what_it_unpacks_itself(bits, asymmetric, tmp_path):
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16, "symmetric": not asymmetric}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights), format="pack-quantized"
    )
    model = make_pico("llama")
    changed, expected = {}, {}
    for name, weight in _linear(model).items():
        module = name.removesuffix(".weight")
        _, scales, zeros = _integers(weight, bits, 16, asymmetric)
        state = {"weight": weight.bfloat16(), "weight_scale": scales.bfloat16()}
        state |= {"weight_zero_point": zeros.to(torch.int8)} if asymmetric else {}
        packed = library.PackedQuantizationCompressor.compress(state, scheme)
        changed[name] = {f"{module}.{part}": tensor for part, tensor in packed.items()}
        expected[name] = library.PackedQuantizationCompressor.decompress(packed, scheme)["weight"].bfloat16()
        assert (expected[name].float() - weight).abs().max() < 0.3 * weight.abs().max()
    about = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    about["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    _check(_save(tmp_path / "packed", model, changed, about), expected, model)


def test_every_4_bit_code_and_every_exponent():
    pairs = torch.arange(256, dtype=torch.uint8)
    assert unpack_e2m1(pairs[:, None]).tolist() == [[E2M1[code % 16], E2M1[code // 16]] for code in range(256)]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = pairs.view(dtype)
        assert torch.equal(unpack_floats(codes).nan_to_num(7), codes.float().nan_to_num(7))
    scales = powers_of_two(torch.arange(256, dtype=torch.uint8))
    assert scales[:255].tolist() == [2.0 ** (code - 127) for code in range(255)] and bool(scales[255].isnan())


def test_blocks_fit_their_matrix_or_are_refused():
    assert block_size((576, 128), (5, 1), (128, 128)) == (128, 128)
    assert block_size((576, 128), (1, 1)) == (576, 128)
    assert block_size((32, 96), (32, 6)) == (1, 16)
    assert block_size((576, 128), (4, 1), (128, 128)) is None
    assert block_size((32, 100), (32, 6)) is None


@pytest.fixture
def fp8(tmp_path):
    """Makes an fp8 checkpoint with something wrong in it."""

    def make(change=lambda parts: None, **about):
        model = make_pico("llama")
        changed = {}
        for name, weight in _linear(model).items():
            values, scales = _fp8_by_blocks(weight, 16)
            changed[name] = {name: values, f"{name}_scale_inv": scales}
        change(changed["model.layers.0.mlp.up_proj.weight"])
        settings = {"quant_method": "fp8", "weight_block_size": [16, 16], **about}
        return _save(tmp_path / "fp8", model, changed, settings)

    return make


NAME = "model.layers.0.mlp.up_proj.weight"


def _no_scale(parts):
    del parts[f"{NAME}_scale_inv"]


def _small_scale(parts):
    parts[f"{NAME}_scale_inv"] = parts[f"{NAME}_scale_inv"][:-1]


def _nan(parts):
    parts[NAME].view(torch.uint8)[0, 0] = 0x7F


def _byte(parts):
    parts["model.layers.0.mlp.strange"] = torch.ones(2, dtype=torch.float8_e5m2).view(torch.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_scale, r"fp8 has no model\.layers\.0\.mlp\.up_proj\.weight_scale_inv"),
        (_small_scale, r"up_proj\.weight of shape \[48, 32\] has values F8_E4M3 \[48, 32\], scale F32 \[2, 2\]"),
        (_nan, r"up_proj\.weight is NaN or infinite once its scale is applied"),
        (_byte, r"stores model\.layers\.0\.mlp\.strange as U8 and no scale for it"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage, message, fp8):
    with pytest.raises(CheckpointError, match=message) as refused:
        find_model(str(fp8(damage)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "marlin-24", "sparse-24-bitmask"])
def test_formats_that_are_not_read_are_named(form, fp8):
    folder = fp8(quant_method="compressed-tensors", format=form)
    with pytest.raises(CheckpointError, match=f"compressed-tensors as {form}, which is not read; formats: float-quant"):
        find_model(str(folder))


def test_full_precision_and_other_methods_are_left_alone(fp8):
    checkpoint = open_checkpoint(fp8(quant_method="gptq"))
    assert read_quantized(checkpoint, "x") is None and find_model(str(checkpoint.folder)).folder == checkpoint.folder
