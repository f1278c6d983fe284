"""Models by reference: built in, on the Hub, in a folder or in a GGUF file; each becomes a safetensors folder."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from ..editing.attention import attend_by_products
from ..editing.errors import CheckpointError, ExciseError, RequestError, one_line
from .checkpoints import Checkpoint, open_checkpoint
from .concepts import nearest
from .manifest import sha256_of
from .staging import staged_folder

BUILTIN = Path(__file__).parent / "builtin"
WANTED = [
    "README.md",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
]
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found; its weights were not read."""

    kind: Literal["builtin", "hub", "local", "gguf"]
    name: str
    """How it can be named in public: ``builtin:NAME``, a Hub id, or the last part of a local path."""
    folder: Path
    revision: str | None = None
    """40-hex commit of a Hub model."""
    sha256: str | None = None
    """Of the GGUF file a model was made from."""

    @property
    def reference(self) -> str:
        """How a command names it, at its commit."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def describe(self) -> dict[str, Any]:
        """What may be published about where the model came from."""
        return {
            "kind": self.kind, "name": self.name, "revision": self.revision, "gguf_sha256": self.sha256,
            "license": "apache-2.0" if self.kind == "builtin" else license_of(self.folder),
        }  # fmt: skip


def license_of(folder: Path) -> str | None:
    """The licence that a model's own card names, or None."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---"):
        return None
    try:
        content = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return None
    found = content.get("license") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def builtin_models() -> list[str]:
    """Names of the models in the package."""
    return sorted(path.name for path in BUILTIN.glob("*") if (path / "config.json").exists())


def find_model(ref: str) -> ModelSource:
    """Resolve a reference to a folder; downloads from the Hub and converts GGUF, once each.

    Raises:
        RequestError: Nothing has that name, or the Hub cannot be reached.
        CheckpointError: The file is a pickle or not a model.
    """
    path = Path(ref)
    if ref.startswith("builtin:"):
        name = ref.removeprefix("builtin:")
        if name not in builtin_models():
            known = ", ".join(f"builtin:{model}" for model in builtin_models())
            raise RequestError(f"no built-in model {name!r}{nearest(name, builtin_models())}; models: {known}")
        return ModelSource("builtin", ref, BUILTIN / name)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise CheckpointError(
            f"{path.name} is a pickle, which can run code when loaded; convert it on a machine you can spare: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW_FOLDER)"
        )
    if path.is_dir():
        own = path.resolve()
        # A run's model is told by the run.
        return ModelSource("local", f"{own.parent.name}/{own.name}" if own.name == "checkpoint" else own.name, path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise RequestError(
                f"there is no file {ref}; give a .gguf file, a model folder, a Hub id or builtin:testbed"
            )
        return _from_gguf(path)
    match = _HUB_ID.fullmatch(ref)
    if path.exists() or not match or ref.startswith((".", "/")):
        raise RequestError(
            f"{ref} is no model folder; give a folder, a .gguf file, a Hub id such as org/name or builtin:testbed"
        )
    return _from_hub(match["id"], match["revision"])


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to measure, and its tokenizer (left padding)."""

    model: Any
    tokenizer: Any
    source: ModelSource

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_model(
    source: ModelSource, device: torch.device, dtype: torch.dtype, *, bits: Literal[4, 16] = 16
) -> LoadedModel:
    """Load weights in evaluation mode: safetensors only, no remote code, no tensor missing, unexpected or reshaped.

    Args:
        bits: 4 quantizes to bitsandbytes NF4 while loading, on a GPU.

    Raises:
        CheckpointError: The weights and the configuration do not fit together, or there is no tokenizer.
        ExciseError: The device has too little memory.
    """
    from transformers import AutoModelForCausalLM

    check_memory(open_checkpoint(source.folder), device, dtype)
    tokenizer = load_tokenizer(source)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            local_files_only=True, output_loading_info=True, **_quantized(bits, device, dtype),
        )  # fmt: skip
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{source.name} does not load: {one_line(error)}") from error
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in info.get(problem, ())):
            raise CheckpointError(
                f"{source.name} has {len(names)} {problem.replace('_', ' ')}, the first is {names[0]}; "
                "transformers would go on with random weights; fetch the checkpoint again"
            )
    if device.type == "cpu" and dtype == torch.bfloat16:
        attend_by_products(model)
    return LoadedModel(model.to(device).eval(), tokenizer, source)


def _quantized(bits: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    if bits == 16:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": device}}


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, padding on the left."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source.name} has no usable tokenizer: {one_line(error)}; add its tokenizer files"
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device.

    Raises:
        RequestError: The name is another one, or there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise RequestError(f"device {name!r} is unknown; give auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"device {name} is not there, this machine has {torch.cuda.device_count()} GPUs; give auto or cpu"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn ``auto``, ``float32`` or ``bfloat16`` into a dtype to compute in."""
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    if name not in choices:
        raise RequestError(f"dtype {name!r} is unknown; give auto, float32 or bfloat16")
    return choices[name]


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are native; on a CPU without AVX512-BF16 they take 60 times as long as fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported())


def check_memory(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Raise before loading if the weights alone would not fit."""
    weights = sum(_elements(tensor.shape) for tensor in checkpoint.tensors.values()) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if weights > free:
        raise ExciseError(
            f"the model needs {weights / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')}, {device} has {free / 1e9:.1f} GB free; "
            "use --dtype bfloat16 or a larger machine; `excise apply` needs no memory for the model"
        )


def available_memory() -> int:
    """Bytes of main memory that can be taken without swapping."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "excise"


def _from_hub(repo_id: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Resolves the revision to a commit first; without a connection it takes the cached snapshot of that revision.
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=WANTED))
    except LocalEntryNotFoundError as error:
        raise RequestError(
            f"{repo_id} is no local folder, the Hub cannot be reached and its cache does not hold the model; "
            "check the name, go online, or give a model folder, a .gguf file or builtin:testbed"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise RequestError(
            f"the Hub refused {repo_id}{'@' + revision if revision else ''} ({status}); check the name and revision, "
            "and log in with `hf auth login` if the model is private or gated"
        ) from error
    if not re.fullmatch(r"[0-9a-f]{40}", folder.name):
        raise CheckpointError(
            f"the Hub's cache holds {repo_id} under {folder.name}, which is no commit; clear the cache"
        )
    return ModelSource("hub", repo_id, folder, revision=folder.name)


def _from_gguf(path: Path) -> ModelSource:
    """Dequantize into an ordinary bfloat16 checkpoint, kept in the cache under the file's hash."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path.name} is not a GGUF file; fetch it again")
    digest = sha256_of(path)
    folder = cache_folder() / f"gguf-{digest[:16]}"
    if not folder.exists():
        with staged_folder(folder) as staging:
            _dequantize(path, staging)
    return ModelSource("gguf", path.name, folder, sha256=digest)


def _dequantize(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}
    parent = path.resolve().parent
    try:
        tokenizer = AutoTokenizer.from_pretrained(parent, **place)
        model: Any = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, **place)
    except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{path.name} cannot be converted: {one_line(error)}") from error
    # The weights are ordinary tensors now; transformers refuses to save while these marks stand.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner in (model, model.config):
        for mark in ("quantization_method", "quantization_config", "_pre_quantization_dtype"):
            if mark in vars(owner):
                delattr(owner, mark)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
