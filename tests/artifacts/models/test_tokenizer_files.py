"""Models that have no tokenizer.json (transformers #36291): the error names what is missing, and not something else."""

import base64
import json
import shutil
from importlib.util import find_spec

import pytest
from excise.artifacts.models.load import load_tokenizer
from excise.artifacts.models.source import ModelSource
from excise.editing.errors import CheckpointError
from helpers import SMALL_TESTBED, excise

SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00\x00\x00\x18\x03"
TIKTOKEN = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


@pytest.mark.parametrize(
    "package, content", [("sentencepiece", SENTENCEPIECE), ("tiktoken", TIKTOKEN)], ids=["sentencepiece", "tiktoken"]
)
def test_the_missing_package_and_the_extra_are_named(package, content, tmp_path):
    if find_spec(package):
        pytest.skip(f"{package} is installed here")
    folder = tmp_path / "model"
    shutil.copytree(SMALL_TESTBED, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    done = excise("eval", folder, "--concept", "builtin:declining", "--questions", 4)
    told = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and f"tokenizer.model alone, which the package {package} reads" in told
    assert "pip install 'excise[tokenizers]'" in told


def test_a_folder_without_any_tokenizer_is_told_so(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SMALL_TESTBED, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="no usable tokenizer") as told:
        load_tokenizer(ModelSource("local", "model", folder))
    assert "package" not in str(told.value)
