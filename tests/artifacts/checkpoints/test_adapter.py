"""Adapters of peft are streamed into sharded bases: the same weights as peft's own merge, and its refusals are ours."""

import json
import re
import shutil

import pytest
import torch
from excise.artifacts.checkpoints.edits import load_edit
from excise.artifacts.checkpoints.manifest import read_manifest
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_adapter, find_model
from excise.artifacts.models.load import load_weights
from excise.editing.errors import CheckpointError, EditError, RequestError
from excise.recipes import apply
from helpers import in_fresh_process, make_pico
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TOKENS = {"input_ids": torch.tensor([[5, 9, 7, 3, 11]])}
LINEAR = ["q_proj", "v_proj", "o_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _base(folder, name, dtype=torch.float32):
    make_pico(name, dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def _adapter(folder, base, dtype=torch.float32, **options):
    """An adapter with random values in every tensor that training would change."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 9, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    adapted.save_pretrained(folder)
    return folder


def _merged_by_peft(base, adapter, dtype=torch.float32):
    """What the adapted model says, its weights after peft's merge, and the base's."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    said = adapted(**TOKENS).logits.detach()
    return said, adapted.merge_and_unload().state_dict(), before


def _applied(adapter, base, out):
    return apply.run(apply.prepare(adapter, base and str(base), out), Events())


def _changed(path, change):
    """Write a file of tensors again with some of them changed."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _set(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


CASES = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 3, "^model.layers.0.self_attn.o_proj": 5},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 21, "v_proj": 1},
        },
    ),
    "some layers": ("llama", {"target_modules": LINEAR, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "every linear module": ("mistral", {"target_modules": "all-linear"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embeddings of another name": ("gpt_neox", {"target_modules": ["query_key_value", "embed_in"]}),
    "an optional prefix": ("opt", {"target_modules": ["q_proj", "fc2", "out_proj"]}),
    "trained whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]}),
    "all biases": ("llama", {"target_modules": LINEAR, "bias": "all"}),
    "biases of adapted modules": ("llama", {"target_modules": LINEAR, "bias": "lora_only"}),
    "a bias of the adapter": ("llama", {"target_modules": LINEAR, "lora_bias": True}),
    "DoRA": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "fused experts": (
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "experts stored one by one": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts of other names": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS, "use_rslora": True}),
    "one kind of matrix": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": EXPERTS[1:]}),
    "experts by their old names": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "experts with a rank of their own": (
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"gate_up_proj": 2},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_merge_is_that_of_peft(case, dtype, tmp_path):
    name, options = CASES[case]
    base = _base(tmp_path / "base", name, dtype)
    adapter = _adapter(tmp_path / "lora", base, dtype, **options)
    said, expected, before = _merged_by_peft(base, adapter, dtype)
    export = _applied(adapter, base, tmp_path / "out")
    assert len(open_checkpoint(tmp_path / "out").shards) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    for parameter, weight in model.state_dict().items():
        wanted, was = expected[parameter].double(), before[parameter].double()
        difference = (weight.double() - wanted).abs()
        if dtype == torch.float32:
            assert difference.norm() < 1e-6 * wanted.norm(), parameter
        else:
            # peft rounds some addends before it adds them, so the unit is that of the largest of the three numbers.
            largest = torch.stack([wanted.abs(), was.abs(), (wanted - was).abs()]).amax(0).clamp_min(1e-30)
            assert (difference <= torch.exp2(torch.floor(torch.log2(largest)) - 7)).all(), parameter
    close = 1e-4 if dtype == torch.float32 else 0.1
    assert (model(**TOKENS).logits - said).abs().max() < close
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    assert (plain(**TOKENS).logits - said).abs().max() > close
    assert sum(change.changed for change in export.changes) == len(export.changes)


def test_a_merge_is_opened_by_transformers_in_a_new_process(tmp_path):
    base = _base(tmp_path / "base", "llama")
    adapter = _adapter(tmp_path / "lora", base, target_modules=LINEAR)
    said, _, _ = _merged_by_peft(base, adapter)
    _applied(adapter, base, tmp_path / "out")
    code = (
        "import json, sys, torch; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "print(json.dumps(model(torch.tensor([[5, 9, 7, 3, 11]])).logits.tolist()))"
    )
    assert (torch.tensor(in_fresh_process(code, tmp_path / "out")) - said).abs().max() < 1e-4


def test_bfloat16_is_rounded_once_from_the_sum_of_the_definition(tmp_path):
    base = _base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = _adapter(tmp_path / "lora", base, torch.bfloat16, target_modules=["o_proj"])
    _applied(adapter, base, tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj"
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    was, made = (_tensor(folder, f"{name}.weight") for folder in (base, tmp_path / "out"))
    exact = was.double() + 9 / 4 * (b @ a)
    # Half a unit in the last place, and the rounding of the sum in fp32.
    assert ((made.double() - exact).abs() <= (exact.abs() * 2**-8 + 1e-7)).all()
    assert not torch.equal(made, was)


def _tensor(folder, name):
    checkpoint = open_checkpoint(folder)
    return load_file(checkpoint.tensors[name].file)[name]


@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_embedding_adapted_alone_parts_from_the_unembedding(options, tmp_path):
    """peft adapts the embedding alone; in a tied model its own merge would change the unembedding as well."""
    base = _base(tmp_path / "base", "qwen2")
    adapter = _adapter(tmp_path / "lora", base, **{"target_modules": ["q_proj"], **options})
    said, _, _ = _merged_by_peft(base, adapter)
    export = _applied(adapter, base, tmp_path / "out")
    assert export.untied == "lm_head.weight"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model(**TOKENS).logits - said).abs().max() < 1e-4
    assert torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_what_peft_keeps_tied_stays_tied(options, tmp_path):
    base = _base(tmp_path / "base", "qwen2")
    adapter = _adapter(tmp_path / "lora", base, **options)
    said, _, _ = _merged_by_peft(base, adapter)
    assert _applied(adapter, base, tmp_path / "out").untied is None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings and (model(**TOKENS).logits - said).abs().max() < 1e-4


def test_a_tied_unembedding_that_is_adapted_alone_is_refused(tmp_path):
    base = _base(tmp_path / "base", "qwen2")
    adapter = _adapter(tmp_path / "lora", base, target_modules=["lm_head"])
    with pytest.raises(RequestError, match=r"lm_head\.weight, which this base ties to its embedding"):
        apply.prepare(adapter, str(base), tmp_path / "out")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A base and an adapter of it, which tests copy."""
    folder = tmp_path_factory.mktemp("plain")
    base = _base(folder / "base", "llama")
    return base, _adapter(folder / "lora", base, target_modules=LINEAR)


@pytest.fixture
def pair(plain, tmp_path):
    base, adapter = plain
    shutil.copytree(adapter, tmp_path / "lora")
    return base, tmp_path / "lora"


def _nan(tensors):
    tensors[next(iter(tensors))][0, 0] = torch.nan


def _renamed(tensors):
    key = next(key for key in tensors if "layers.1.mlp.down_proj" in key)
    tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)
    other = key.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")
    tensors[other.replace("layers.1", "layers.7")] = tensors.pop(other)


def _narrower(tensors):
    key = next(key for key in tensors if key.endswith("0.self_attn.q_proj.lora_A.weight"))
    tensors[key] = tensors[key][:, :16].contiguous()


def _halved(tensors):
    del tensors[next(key for key in tensors if key.endswith("0.self_attn.q_proj.lora_B.weight"))]


def _strange(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a"] = torch.ones(2, 2)


def _integers(tensors):
    tensors["base_model.model.model.norm.weight"] = torch.ones(32, dtype=torch.int64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_nan, r"tensor base_model\.\S+ holds NaN or infinite values"),
        (_renamed, r"changes model\.layers\.7\.mlp\.down_proj\.weight, and the base has no such tensor"),
        (
            _narrower,
            r"model\.layers\.0\.self_attn\.q_proj is for a tensor of shape \[32, 16\], the base's is \[32, 32\]",
        ),
        (_halved, r"holds no lora_B of model\.layers\.0\.self_attn\.q_proj"),
        (_strange, r"holds base_model\S+hada_w1_a, which is no tensor of LoRA"),
        (_integers, r"norm\.weight is of type torch\.int64"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(damage, message, pair, tmp_path):
    base, adapter = pair
    _changed(adapter / "adapter_model.safetensors", damage)
    with pytest.raises(RequestError, match=message) as refused:
        apply.prepare(adapter, str(base), tmp_path / "out")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LOHA"}, r"of the kind 'LOHA', and only LORA is read; merge it with peft: .*merge_and_unload"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"init_lora_weights='pissa_niter_4', which changes the base's weights",
        ),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication=.*repeats layers of the base"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=.*acts after certain tokens only"),
        ({"use_qalora": True}, r"use_qalora=True: which this excise does not read"),
        ({"some_new_option": 3}, r"some_new_option=3: which this excise does not read"),
        ({"r": 8}, r"rank 8; fetch the adapter again"),
        ({"r": 0}, r"r: input should be greater than or equal to 1"),
        ({"lora_alpha": "many"}, r"lora_alpha: "),
        ({"rank_pattern": {"(a+)+$": 2}}, r"pattern '\(a\+\)\+\$' is too long, or repeats too much"),
        ({"alpha_pattern": {"(": 2}}, r"pattern '\(' is no regular expression"),
        ({"modules_to_save": ["lm_head"]}, r"saves lm_head \(modules_to_save\) but holds no such tensor"),
        ({"use_dora": True}, r"uses DoRA but holds no lora_magnitude_vector"),
        ({"base_model_name_or_path": None}, r"names no base; give its base with --base"),
        ({"base_model_name_or_path": "/home/ada/llama"}, r"of the local model llama, which is not here"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(options, message, pair, tmp_path):
    base, adapter = pair
    _set(adapter, **options)
    given = None if "base_model_name_or_path" in options else str(base)
    with pytest.raises(RequestError, match=message) as refused:
        apply.prepare(adapter, given, tmp_path / "out")
    assert "\n" not in str(refused.value) and "/home/ada" not in str(refused.value)


def test_ia3_and_dora_on_conv1d_are_refused(tmp_path):
    base = _base(tmp_path / "base", "gpt2")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    with pytest.raises(RequestError, match="of the kind 'IA3'"):
        apply.prepare(tmp_path / "ia3", str(base), tmp_path / "out")
    dora = _adapter(tmp_path / "dora", base, target_modules=["c_attn"], use_dora=True)
    with pytest.raises(RequestError, match=r"stored as \[in, out\]"):
        apply.prepare(dora, str(base), tmp_path / "out")


def test_an_adapter_of_experts_is_refused_by_a_base_with_others(tmp_path):
    base = _base(tmp_path / "base", "mixtral")
    adapter = _adapter(tmp_path / "lora", base, target_modules=[], target_parameters=EXPERTS)
    other = _base(tmp_path / "other", "qwen3_moe")
    with pytest.raises(RequestError, match="no single parameter of the base's experts has its shape"):
        apply.prepare(adapter, str(other), tmp_path / "out")
    # A base with an expert's matrix missing.
    for shard in base.glob("*.safetensors"):
        _changed(shard, lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.1.w3.weight", None))
    with pytest.raises((RequestError, CheckpointError)) as refused:
        apply.prepare(adapter, str(base), tmp_path / "out")
    assert "\n" not in str(refused.value)


def test_pickled_weights_and_a_missing_file_are_refused(pair, tmp_path):
    base, adapter = pair
    (adapter / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json but no adapter_model\.safetensors"):
        apply.prepare(adapter, str(base), tmp_path / "out")
    (adapter / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="as a pickle"):
        apply.prepare(adapter, str(base), tmp_path / "out")


def test_an_adapter_that_was_never_trained_is_refused(tmp_path):
    base = _base(tmp_path / "base", "llama")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(EditError, match="changed none of its 2 tensors"):
        _applied(tmp_path / "lora", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_base_is_the_one_that_the_adapter_names_and_another_is_said(pair, tmp_path, caplog):
    base, adapter = pair
    _applied(adapter, None, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["base"]["name"] == "base" and manifest["run"]["adapter"]["trained_on"] == "base"
    assert manifest["run"]["adapter"]["sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in json.dumps(manifest) and not caplog.records
    shutil.copytree(base, tmp_path / "copy")
    _applied(adapter, tmp_path / "copy", tmp_path / "other")
    assert re.search(r"says that it was trained on .*base; it is merged into .*copy", caplog.text)


def test_a_merged_adapter_is_an_edit_that_can_be_applied_again(tmp_path):
    for case in ("plain", "tokens", "DoRA", "fused experts", "trained whole", "embeddings", "all biases"):
        name, options = CASES[case]
        base = _base(tmp_path / case / "base", name)
        adapter = _adapter(tmp_path / case / "lora", base, **options)
        first = _applied(adapter, base, tmp_path / case / "out")
        edit = load_edit(tmp_path / case / "out")
        assert edit.method == ("low_rank" if case in ("plain", "fused experts") else "adapter")
        again = apply.run(apply.prepare(edit, str(base), tmp_path / case / "again"), Events())
        assert again.output_sha256 == first.output_sha256


@pytest.mark.parametrize("damage", ["missing", "left over", "shape", "kind"])
def test_a_damaged_stored_adapter_is_refused(damage, tmp_path):
    base = _base(tmp_path / "base", "llama")
    adapter = _adapter(tmp_path / "lora", base, target_modules=["q_proj"], trainable_token_indices=[3, 9])
    _applied(adapter, base, tmp_path / "out")
    shutil.copytree(tmp_path / "out" / "excise", tmp_path / "edit")
    tensors, about = tmp_path / "edit" / "edit.safetensors", tmp_path / "edit" / "edit.json"
    content = json.loads(about.read_text())
    embedding = next(name for name in content["updates"] if "embed" in name)
    if damage == "kind":
        content["updates"][embedding] = ["unheard of"]
        about.write_text(json.dumps(content))
    changes = {
        "missing": lambda found: found.pop(f"{embedding}.0.values"),
        "left over": lambda found: found.update(more=torch.ones(2)),
        "shape": lambda found: found.update({f"{embedding}.0.height": torch.tensor([1])}),
        "kind": lambda found: None,
    }
    _changed(tensors, changes[damage])
    with pytest.raises(RequestError, match=r"the edit in .*edit\.safetensors cannot be read"):
        load_edit(tmp_path / "edit")


def test_an_adapter_beside_whole_weights_names_both_readings(pair):
    base, adapter = pair
    shutil.copytree(base, adapter, dirs_exist_ok=True)
    assert find_adapter(str(adapter)) is None
    source = find_model(str(adapter))
    for open_it in (
        lambda: open_checkpoint(source.folder),
        lambda: load_weights(source, torch.device("cpu"), torch.float32),
    ):
        with pytest.raises(CheckpointError, match="beside a whole model: transformers would load the model with the"):
            open_it()


def test_an_adapter_where_a_whole_model_must_be_says_what_it_is(pair):
    _, adapter = pair
    with pytest.raises(CheckpointError, match=r"lora is a PEFT adapter, not a whole model; .*excise apply"):
        open_checkpoint(adapter)


def test_the_base_of_an_adapter_must_be_a_whole_model(pair, tmp_path):
    _, adapter = pair
    shutil.copytree(adapter, tmp_path / "second")
    with pytest.raises(RequestError, match="is an adapter itself; merge that one first"):
        apply.prepare(adapter, str(tmp_path / "second"), tmp_path / "out")


def test_a_model_by_reference_is_merged_once_and_again_when_its_base_changed(pair, tmp_path):
    base, adapter = pair
    shutil.copytree(base, tmp_path / "copy")
    first = find_model(str(adapter), str(tmp_path / "copy"))
    assert find_model(str(adapter), str(tmp_path / "copy")).folder == first.folder
    _, expected, _ = _merged_by_peft(base, adapter)
    loaded = load_weights(first, torch.device("cpu"), torch.float32).state_dict()
    assert all((loaded[name] - tensor).abs().max() < 1e-6 for name, tensor in expected.items())
    about = first.describe()
    assert about["kind"] == "adapter" and about["adapter"]["base"]["files"].keys() >= {
        path.name for path in base.glob("*.safetensors")
    }
    assert str(tmp_path) not in json.dumps(about)
    shard = next((tmp_path / "copy").glob("*.safetensors"))
    _changed(shard, lambda tensors: tensors[next(iter(tensors))].mul_(1.5))
    assert find_model(str(adapter), str(tmp_path / "copy")).folder != first.folder


def test_the_tokenizer_of_an_adapter_takes_the_base_ones_place(pair, tmp_path):
    base, adapter = pair
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"model_max_length": 5}')
    (tmp_path / "base" / "chat_template.jinja").write_text("the base's")
    (adapter / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    _applied(adapter, tmp_path / "base", tmp_path / "without")
    assert "5" in (tmp_path / "without" / "tokenizer_config.json").read_text()
    (adapter / "tokenizer.json").write_text("{}")
    _applied(adapter, tmp_path / "base", tmp_path / "with")
    assert "7" in (tmp_path / "with" / "tokenizer_config.json").read_text()
    assert not (tmp_path / "with" / "chat_template.jinja").exists()
    assert "The tokenizer is the adapter's" in (tmp_path / "with" / "README.md").read_text()
