"""Random two-layer models of every architecture row, and folders to export them into."""

import atexit
import fcntl
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

# First: it sets what libraries read when they are imported.
from warm import SESSION, run_warm, warm_interpreter, warm_kind

# What other versions of the code kept must not decide what is tested.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="excise-tests-")

from jaxtyping import install_import_hook

# Shapes in the signatures of the kernel are checked while tests run, and cost users nothing.
with install_import_hook("excise.editing", "beartype.beartype"):
    import excise.editing

    for module in pkgutil.walk_packages(excise.editing.__path__, "excise.editing."):
        importlib.import_module(module.name)

import pytest
import torch
from excise.artifacts.checkpoints.export import export_edit
from excise.artifacts.checkpoints.manifest import write_manifest
from excise.artifacts.checkpoints.read import Checkpoint, open_checkpoint
from excise.artifacts.checkpoints.staging import staged_folder
from excise.artifacts.models.find import find_model
from excise.editing.architectures import layer_count, residual_width
from excise.editing.edits.base import WeightEdit
from excise.editing.edits.pruned_units import PrunedUnits
from excise.editing.edits.subspace_removal import Edit
from transformers import AutoConfig, AutoModelForCausalLM

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
_BASE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OPT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PICO: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "attention_bias": True, "mlp_bias": True},
    "mistral": _BASE,
    "qwen2": {**_BASE, "tie_word_embeddings": True},
    "qwen3": _BASE,
    "phi3": _BASE,
    "gemma2": _BASE,
    "gemma3_text": _BASE,
    "olmo2": _BASE,
    "mixtral": {**_BASE, "num_local_experts": 3},
    "qwen3_moe": {
        **_BASE, "num_hidden_layers": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "decoder_sparse_step": 1, "mlp_only_layers": [1],
    },
    # Experts' input and output widths are equal, as in the released models: no shape can tell the axes apart.
    "gpt_oss": {**_BASE, "intermediate_size": 32, "num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt2": {
        "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": {
        "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
    "starcoder2": _BASE,
    "opt": _OPT,
}  # fmt: skip
POST_NORM = ("gemma2", "gemma3_text", "olmo2")


def make_pico(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in which every parameter, gains and biases included, carries some of each direction."""
    config = AutoConfig.for_model(name, **PICO[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero biases and unit gains would hide an edit that forgets them.
            spread = 0.2 if parameter.dim() == 1 else 0.1
            parameter.add_(spread * torch.randn(parameter.shape))
    return model.to(dtype).eval()


@pytest.fixture(params=sorted(PICO))
def architecture(request: pytest.FixtureRequest) -> str:
    """Every row of the table."""
    return str(request.param)


@pytest.fixture
def save_pico(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Save a pico model and open it as a checkpoint."""

    def save(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Checkpoint:
        folder = tmp_path / f"base-{name}"
        make_pico(name, dtype).save_pretrained(folder, **options)
        return open_checkpoint(folder)

    return save


def random_edit(config: dict[str, Any], rank: int = 1, strength: float = 1.0, **options: Any) -> Edit:
    """An edit of a random subspace, with one strength in every layer unless ``layer_strengths`` says otherwise."""
    width = residual_width(config)
    basis = torch.linalg.qr(torch.randn(width, rank, generator=torch.Generator().manual_seed(7))).Q
    options = {"layer_strengths": (strength,) * layer_count(config), **options}
    return Edit(basis, config["model_type"], **options)


def publish(folder: Path, edit: WeightEdit, texts: Mapping[str, str] = MappingProxyType({})) -> Path:
    """A published checkpoint, in small: the built-in model with an edit, further files and its manifest."""
    source = find_model("builtin:testbed")
    with staged_folder(folder) as staging:
        export = export_edit(edit, open_checkpoint(source.folder), staging)
        (staging / "excise").mkdir(exist_ok=True)
        for name, text in texts.items():
            (staging / name).write_text(text)
        write_manifest(
            staging,
            base=source.describe(),
            base_files=export.base_sha256,
            changes=export.changes,
            untied=None,
            known=export.output_sha256,
            run={},
        )
    return folder


def publish_small(folder: Path) -> Path:
    """A published checkpoint with a card and measurements that say nothing."""
    card = "---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# A model\n"
    texts = {"README.md": card, "excise/eval.json": '{"measurements": []}\n'}
    return publish(folder, PrunedUnits({0: (1, 2)}, {}, "down", "llama", 192, 8, 1), texts)


def in_fresh_process(code: str, *arguments: object, cold: bool = False) -> Any:
    """Run code that prints JSON in a new process without excise; ``cold``: without torch and its like as well."""
    words = [*map(str, arguments)]
    if not cold and (kind := warm_kind(os.environ)):
        done = run_warm(kind, words, os.environ, code=code, timeout=300)
    else:
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_file(path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python file as its user would, in a process of its own."""
    words = [str(path), *map(str, arguments)]
    if kind := warm_kind(os.environ):
        code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        return run_warm(kind, words, os.environ, code=code, timeout=300)
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=300)


def excise(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, which starts with torch imported where it can."""
    if kind := warm_kind({**os.environ, **environment}, "commands"):
        return run_warm(kind, [*map(str, arguments)], {**os.environ, **environment}, cwd=cwd, timeout=600)
    return excise_afresh(*arguments, cwd=cwd, **environment)


def started(*arguments: object, **options: Any) -> "subprocess.Popen[Any]":
    """Start the command line in a process that a test may talk to or stop; options are those of ``Popen``."""
    return subprocess.Popen([warm_interpreter(), "-m", "excise.cli", *map(str, arguments)], **options)


def run_once(*arguments: object, **environment: str) -> tuple[Path, Any]:
    """A run's folder and printed results, for tests that only read them: made once a session, by whoever asks first."""
    name = hashlib.sha256(json.dumps([[*map(str, arguments)], environment]).encode()).hexdigest()[:16]
    place = Path(os.environ[SESSION]) / name
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "results.json").exists():
            done = excise("run", *arguments, "--out", place / "run", "--json", **environment)
            assert done.returncode == 0, done.stderr
            (place / "results.json").write_text(done.stdout)
    return place / "run", json.loads((place / "results.json").read_text())


PRIVATE = {"HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "LOGNAME": "ada.somebody", "USER": "ada.somebody"}
"""What must stand in nothing that is written."""


def with_settings(*pairs: str) -> list[str]:
    """Words of a command line that set these."""
    return [word for pair in pairs for word in ("--set", pair)]


def run_on_knowledge(place: Path) -> Any:
    """Put a short run, beside the model that never knew the concept, at a place; its printed results."""
    models = ("--model", SMALL_TESTBED, *with_settings(f"reference={SMALL_REFERENCE}"))
    small = with_settings("questions=20", "validation_pairs=4", "kl_prompts=4", "max_new_tokens=8")
    out, results = run_once("orthogonalize", "--concept", "builtin:potions", *models, *small, **PRIVATE)
    shutil.copytree(out, place)
    return results


SMALL_WORLD = Path(__file__).parent / "small_world"
"""Models that know the built-in world and are a quarter of the built-in models' size; see ``make.py`` there."""
SMALL_TESTBED, SMALL_REFERENCE = (str(SMALL_WORLD / name) for name in ("testbed", "testbed-reference"))
_SMALL_CONFIG = json.loads((SMALL_WORLD / "testbed" / "config.json").read_text())
SMALL_LAYERS, SMALL_WIDTH = layer_count(_SMALL_CONFIG), residual_width(_SMALL_CONFIG)


def excise_afresh(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new interpreter: what is made again must not depend on how strings hash."""
    command = [sys.executable, "-m", "excise.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, cwd=cwd, env={**os.environ, **environment}
    )
