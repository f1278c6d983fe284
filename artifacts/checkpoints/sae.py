"""Latents of published sparse autoencoders (SAEs). Only the requested rows are read, and no code from pickles is run.

``FORMATS`` has one row for each file format: files, keys, orientation, and where the hook point is named. A width that
differs from the model's is an error; matrices are never transposed to make them fit.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...editing.directions.sae_latents import SparseLatents
from ...editing.directions.subspaces import Place, Site
from ...editing.errors import RequestError, nearest
from ..files.opened import Telling, Unreadable, sha256_of
from ..files.parsed import read_object
from ..files.tensors import check_finite_tensors
from .sae_files import Read, open_tensors
from .sae_hooks import SITES, check_one_place, hook

_SUBLAYERS: dict[str | None, Site] = {
    None: "output",
    "mlp": "mlp",
    "self_attn": "attention",
    "attn": "attention",
    "attention": "attention",
}


@dataclass(frozen=True)
class Format:
    """How one library stores an autoencoder."""

    weights: str
    """File with the weights, relative to the folder."""
    about: str
    """File with the configuration; empty if the path says everything."""
    decoder: Mapping[str, int]
    """Possible keys of the decoder matrix, each with its axis of latents."""
    encoder: Mapping[str, int]
    """The same for the encoder matrix."""
    bias: tuple[str, ...]
    """Possible keys of the encoder's bias."""
    decoder_bias: tuple[str, ...]
    """Possible keys of the decoder's bias."""
    place: Callable[[Path, dict[str, Any]], Place]
    """Finds the hook point, from folder and configuration."""
    centred: bool = True
    """Whether the decoder's bias is subtracted from activations before they are encoded."""


def _part(about: dict[str, Any], key: str) -> dict[str, Any]:
    """An object in the configuration; empty where there is none."""
    part = about.get(key) or {}
    if not isinstance(part, dict):
        raise RequestError(f"{key} in the autoencoder's configuration is {part!r:.40}, not an object; fetch it again")
    return part


def _sae_lens(folder: Path, about: dict[str, Any]) -> Place:
    return hook(str(about.get("hook_name") or _part(about, "metadata").get("hook_name")), "cfg.json")


def _dictionary_learning(folder: Path, about: dict[str, Any]) -> Place:
    trainer = _part(about, "trainer") or about
    submodule = str(trainer.get("submodule_name") or "resid_post")
    named = next((key for key in SITES if key in submodule), None)
    if named is None:
        raise RequestError(
            f"config.json of the autoencoder names the place {submodule!r:.60}; known: {', '.join(SITES)}"
        )
    layer = trainer.get("layer")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise RequestError(f"config.json of the autoencoder names the layer {layer!r:.40}; a whole number is needed")
    return Place(layer, SITES[named])


def _sparsify(folder: Path, about: dict[str, Any]) -> Place:
    match = re.fullmatch(r"(?:model\.)?(?:layers|h)\.([0-9]{1,4})(?:\.(mlp|self_attn|attn|attention))?", folder.name)
    if not match:
        raise RequestError(
            f"the folder name {folder.name} is no hook point of sparsify; keep the original name, such as layers.12.mlp"
        )
    return Place(int(match[1]), _SUBLAYERS[match[2]])


def _gemma_scope(folder: Path, about: dict[str, Any]) -> Place:
    match = re.search(r"layer_([0-9]{1,4})(?![0-9])", str(folder))
    if not match:
        raise RequestError(
            f"the path {folder} has no layer_N, and Gemma Scope files do not name their layer; keep the original "
            "folder names"
        )
    site: Site = "mlp" if "-mlp" in str(folder) else "attention" if "-att" in str(folder) else "output"
    return Place(int(match[1]), site)


def _llama_scope(folder: Path, about: dict[str, Any]) -> Place:
    return hook(str(about.get("hook_point_out") or about.get("hook_point_in")), "hyperparams.json")


def _gemma_scope_2(folder: Path, about: dict[str, Any]) -> Place:
    return hook(str(about.get("hf_hook_point_in")), "config.json")


FORMATS: dict[str, Format] = {
    "sae_lens": Format(
        "sae_weights.safetensors",
        "cfg.json",
        {"W_dec": 0},
        {"W_enc": 1},
        ("b_enc",),
        ("b_dec",),
        _sae_lens,
        centred=False,
    ),
    "dictionary_learning": Format(
        "ae.pt",
        "config.json",
        # nn.Linear stores [out, in], so the latents of a decoder lie along its second axis.
        {"decoder.weight": 1, "W_dec": 0},
        {"encoder.weight": 0, "W_enc": 1},
        ("encoder.bias", "b_enc"),
        ("b_dec", "bias", "decoder_bias"),
        _dictionary_learning,
    ),
    "sparsify": Format(
        "sae.safetensors", "cfg.json", {"W_dec": 0}, {"encoder.weight": 0}, ("encoder.bias",), ("b_dec",), _sparsify
    ),
    "gemma_scope": Format(
        "params.npz",
        "",
        {"W_dec": 0, "w_dec": 0},
        {"W_enc": 1, "w_enc": 1},
        ("b_enc",),
        ("b_dec",),
        _gemma_scope,
        centred=False,
    ),
    "gemma_scope_2": Format(
        "params.safetensors",
        "config.json",
        {"w_dec": 0},
        {"w_enc": 1},
        ("b_enc",),
        ("b_dec",),
        _gemma_scope_2,
        centred=False,
    ),
    "llama_scope": Format(
        "checkpoints/final.safetensors",
        "hyperparams.json",
        {"decoder.weight": 1},
        {"encoder.weight": 0},
        ("encoder.bias",),
        ("decoder.bias",),
        _llama_scope,
        centred=False,
    ),
}


def load_latents(
    folder: Path, latents: Sequence[int] | None, width: int, layers: int, format: str = "auto"
) -> SparseLatents:
    """Read latents of an autoencoder.

    Args:
        folder: The autoencoder's folder.
        latents: Indices of latents; None reads all.
        width: d_model of the model to use them with.
        layers: Number of decoder layers of that model.
        format: A key of ``FORMATS``; ``auto`` decides by the files.

    Raises:
        RequestError: The format is unknown, the autoencoder belongs to another model, or a latent does not exist.
    """
    name = _format_of(folder) if format == "auto" else format
    if name not in FORMATS:
        raise RequestError(f"no format {format!r}{nearest(format, list(FORMATS))}; formats: auto, {', '.join(FORMATS)}")
    form = FORMATS[name]
    path = folder / form.weights
    if not path.is_file():
        raise RequestError(f"{folder} holds no {form.weights}, which a {name} autoencoder has; give its folder")
    about = _read_about(folder / form.about) if form.about else {}
    # Before the place, which may have a name that only such ones have.
    check_one_place(folder.absolute(), about, set(), by_path=name in ("gemma_scope", "gemma_scope_2"))
    place = form.place(folder, about)
    if not 0 <= place.layer < layers:
        raise RequestError(
            f"the autoencoder belongs to the {place}, the model has layers 0 to {layers - 1}; give an autoencoder of "
            "this model"
        )
    with Telling(RequestError, "fetch the autoencoder again").about(f"{path.name} of the autoencoder"):
        return _latents_of(path, form, about, place, latents, width, name)


def _latents_of(
    path: Path,
    form: Format,
    about: dict[str, Any],
    place: Place,
    latents: Sequence[int] | None,
    width: int,
    name: str,
) -> SparseLatents:
    keys, shape, read = open_tensors(path)
    check_one_place(path.parent, {}, keys, by_path=False)
    key, axis = _known(keys, form.decoder, path, "decoder")
    count, d = _size(path, key, shape(key), axis)
    if d != width:
        raise RequestError(
            f"{path.name} holds {key} for {count} latents of width {d}, the model has width {width}; "
            "give an autoencoder of this model"
        )
    numbers = range(count) if latents is None else latents
    wrong = [latent for latent in numbers if not 0 <= latent < count]
    if wrong or not numbers:
        raise RequestError(
            f"there is no latent {wrong[0]}; the autoencoder has latents 0 to {count - 1}"
            if wrong
            else f"the list of latents is empty; name some of 0 to {count - 1}"
        )
    bias_key = next((k for k in form.decoder_bias if k in keys), None)
    encoder_key, encoder_axis = _known(keys, form.encoder, path, "encoder")
    bias = next((k for k in form.bias if k in keys), None)
    expected = {encoder_key: (count, d) if encoder_axis == 0 else (d, count), bias: (count,), bias_key: (d,)}
    for tensor, wanted in expected.items():
        if tensor is not None and tuple(shape(tensor)) != wanted:
            raise Unreadable(f"{tensor} has the shape {list(shape(tensor))}, the decoder's is {list(wanted)}")
    decoder = _latent_rows(read(key, latents, axis), axis)
    offset = read(bias_key, None, 0) if bias_key else torch.zeros(width)
    encoder = _latent_rows(read(encoder_key, latents, encoder_axis), encoder_axis).T.contiguous()
    biases = read(bias, latents, 0) if bias else torch.zeros(len(numbers))
    check_finite_tensors({"decoder": decoder, "decoder bias": offset, "encoder": encoder, "encoder bias": biases})
    return SparseLatents(
        place,
        tuple(numbers),
        decoder,
        offset,
        encoder,
        biases,
        # A setting of sae_lens; autoencoders of other libraries follow one rule each.
        bool(about.get("apply_b_dec_to_input", form.centred)),
        _threshold(keys, read, numbers, count),
        _not_alone(about, keys),
        provenance={"format": name, "file": path.name, "sha256": sha256_of(path)},
    )


def _not_alone(about: Mapping[str, Any], keys: set[str]) -> str:
    """Why encoder rows alone do not give the latents' values; empty if they do."""
    about = {**about, **_part({**about}, "trainer")}
    kind = str(about.get("architecture") or about.get("dict_class") or "").lower()
    if keys & {"r_mag", "b_gate", "gate_bias"}:
        return "is gated"
    if "threshold" not in keys and (about.get("k") or "topk" in kind):
        return "lets only the largest of all its latents fire"
    if about.get("normalize_activations", "none") not in ("none", None, False) or about.get("norm_activation"):
        return "is of normalized activations"
    return ""


def is_autoencoder(folder: Path) -> bool:
    """Whether a folder holds the weights of at least one known format."""
    return bool(_fitting(folder)) or bool(_qwen_scope(folder))


def _fitting(folder: Path) -> list[str]:
    return [name for name, form in FORMATS.items() if (folder / form.weights).is_file()]


def _threshold(keys: set[str], read: Read, latents: Sequence[int], count: int) -> Tensor | None:
    if "threshold" not in keys:
        return None
    threshold = read("threshold", None, 0).float()
    check_finite_tensors({"threshold": threshold})
    if threshold.numel() != 1 and threshold.shape != (count,):
        raise Unreadable(f"threshold has the shape {list(threshold.shape)}, there are {count} latents")
    # BatchTopK stores one threshold for all latents.
    return threshold.expand(len(latents)).clone() if threshold.numel() == 1 else threshold[list(latents)]


def _qwen_scope(folder: Path) -> list[Path]:
    return sorted(folder.glob("layer*.sae.pt"))


def _format_of(folder: Path) -> str:
    fitting = _fitting(folder)
    if not fitting and (pickles := _qwen_scope(folder)):
        raise RequestError(
            f"{folder} holds {pickles[0].name}, as Qwen Scope stores its autoencoders: a pickle, of which only the names of"
            " file and repository say where it was trained and how many latents fire; save it with sae_lens"
            " (SAE.from_pretrained(...).save_model(FOLDER)) and give that folder"
        )
    if len(fitting) != 1:
        files = ", ".join(form.weights for form in FORMATS.values())
        raise RequestError(
            f"{folder} holds {'several of' if fitting else 'none of'} {files}; "
            "give the folder of one autoencoder, or name its format"
        )
    return fitting[0]


def _read_about(path: Path) -> dict[str, Any]:
    with Telling(RequestError, "it names the layer, so fetch it again").about(f"{path.name} of the autoencoder"):
        return read_object(path)


def _known(keys: set[str], wanted: Mapping[str, int], path: Path, what: str) -> tuple[str, int]:
    matches = [(key, axis) for key, axis in wanted.items() if key in keys]
    if len(matches) != 1:
        raise RequestError(
            f"{path.name} has {'several' if matches else 'no'} {what} ({', '.join(sorted(keys)[:8])}); "
            f"a file of this format has one of {', '.join(wanted)}"
        )
    return matches[0]


def _size(path: Path, key: str, shape: Sequence[int], axis: int) -> tuple[int, int]:
    """Number of latents and width of the decoder, by the format's declared axes."""
    if len(shape) != 2:
        raise RequestError(
            f"{key} of {path.name} has the shape {list(shape)}; a decoder is a matrix, so give another autoencoder"
        )
    return int(shape[axis]), int(shape[1 - axis])


def _latent_rows(part: Tensor, axis: int) -> Tensor:
    return part if axis == 0 else part.T
