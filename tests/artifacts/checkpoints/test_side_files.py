"""What stands beside the weights of a published checkpoint: whole, without code, and read alike by transformers 4 and 5."""

import json
import shutil

import pytest
import torch
from excise.artifacts.checkpoints.edits import save_edit
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.checkpoints.side_files import copy_side_files
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.artifacts.models.source import BUILTIN
from helpers import SMALL_WORLD, excise, random_edit
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "org/repo--modeling_phi3.Phi3"}


@pytest.fixture
def base(tmp_path):
    """A copy of the built-in model, which may be spoilt."""
    shutil.copytree(find_model("builtin:testbed").folder, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def published(base, tmp_path):
    def apply():
        save_edit(random_edit(open_checkpoint(base).config), tmp_path / "edit")
        done = excise("apply", tmp_path / "edit", "--base", base, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        return tmp_path / "out", done

    return apply


def _change(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def test_code_that_is_not_copied_is_not_named_either(base, published):
    """mergekit #105, vllm #6263: auto_map was kept, and whoever trusted the code could not load the model."""
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        _change(base / name, auto_map=CODE, nested={"auto_map": {"AutoModel": "deep.Model"}, "kept": 1})
    _change(base / "config.json", custom_pipelines={"text-generation": {"impl": "pipeline.Mine"}})
    for name in ("configuration_phi3.py", "modeling_phi3.py", "custom_generate/generate.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("raise SystemExit('run')")
    out, done = published()
    assert "auto_map" in (base / "config.json").read_text()
    for path in out.rglob("*.json"):
        if path.name != "manifest.json":
            assert not {"auto_map", "custom_pipelines"} & set(path.read_text().split('"')), path
    assert json.loads((out / "preprocessor_config.json").read_text())["nested"] == {"kept": 1}
    assert not list(out.rglob("*.py"))
    left_out = json.loads((out / "excise" / "manifest.json").read_text())["code_left_out"]
    assert {"config.json", "tokenizer_config.json", "custom_generate"} < set(left_out)
    assert {*CODE.values(), "deep.Model", "pipeline.Mine"} <= set(left_out["config.json"])
    assert "names Python code in config.json" in done.stdout
    assert "names Python code in config.json" in " ".join((out / "README.md").read_text().split())
    # The theorem: whoever trusts the code loads the model, as without.
    AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


def test_a_base_without_code_leaves_nothing_out(base, published):
    out, done = published()
    assert json.loads((out / "excise" / "manifest.json").read_text())["code_left_out"] == {}
    assert "Python code" not in done.stdout + (out / "README.md").read_text()


def test_every_template_of_a_tokenizer_arrives(base, published):
    """transformers PR #36588, mergekit #589: templates beside the default one stand in a folder of their own."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "TOOLS {{ messages[0].content }}"}
    tokenizer.save_pretrained(base)
    assert (base / "additional_chat_templates" / "tool_use.jinja").is_file()
    out, _ = published()
    message = [{"role": "user", "content": "hello"}]
    copied = AutoTokenizer.from_pretrained(out)
    for name in ("default", "tool_use"):
        expected = tokenizer.apply_chat_template(message, tokenize=False, chat_template=name)
        assert copied.apply_chat_template(message, tokenize=False, chat_template=name) == expected
    assert excise("verify", out).returncode == 0


SIDE = (
    "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "merges.txt", "vocab.json", "tekken.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json",
    "params.json", "sentencepiece.bpe.model", "LICENSE.md", "LICENSE", "NOTICE", "Notice.txt", "chat_template.json",
    "additional_chat_templates/rag.jinja", "qformer_tokenizer/tokenizer.json", "qformer_tokenizer/tokenizer_config.json",
)  # fmt: skip
NOT_COPIED = (
    "modeling.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.pt", "trainer_state.json",
    "all_results.json", "consolidated.safetensors", "onnx/model.onnx", "original/params.json", "model.gguf",
)  # fmt: skip


def test_side_files_are_copied_and_nothing_else(tmp_path):
    """mergekit #275 and #185, llama.cpp #9673: a file beside the weights got lost on the way."""
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    for name in (*SIDE, *NOT_COPIED):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(f'{{"file": "{name}"}}')
    copy_side_files(base, out, {})
    written = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert written == {name: (base / name).read_text() for name in SIDE}


def test_a_generation_config_that_transformers_calls_invalid_is_copied(base, published):
    """LLaVA #1635, transformers #29988: saving failed after hours, because the base's file was invalid."""
    _change(base / "generation_config.json", do_sample=False, temperature=0.6)
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig.from_pretrained(base).validate(strict=True)
    out, _ = published()
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
    load_model(find_model(str(out)), torch.device("cpu"), torch.float32)


def test_a_class_that_transformers_4_lacks_is_written_under_its_old_name(base, published):
    """unsloth #8444, LlamaFactory #10310: "Tokenizer class TokenizersBackend does not exist"."""
    tokenizer = AutoTokenizer.from_pretrained(base, extra_special_tokens=["<|tool|>"])
    tokenizer.save_pretrained(base)
    saved = json.loads((base / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend" and saved["extra_special_tokens"] == ["<|tool|>"]
    out, _ = published()
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    # transformers 4 reads a dictionary under this name and fails on a list.
    assert "extra_special_tokens" not in written and written["additional_special_tokens"] == ["<|tool|>"]
    copied, text = AutoTokenizer.from_pretrained(out), "Where is <|tool|> the harbour?"
    assert copied(text)["input_ids"] == tokenizer(text)["input_ids"] and len(copied) == len(tokenizer)
    assert set(copied.all_special_tokens) == set(tokenizer.all_special_tokens)
    assert copied.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    "folder", [*BUILTIN.glob("testbed*"), *SMALL_WORLD.glob("testbed*")], ids=lambda path: path.name
)
def test_models_of_the_package_say_the_same_to_transformers_4(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
