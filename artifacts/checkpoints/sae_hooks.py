"""Hook points of autoencoders by the names that libraries give them, and who reads at another place than it writes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...editing.directions.subspaces import Place, Site
from ...editing.errors import RequestError

SITES: dict[str, Site] = {"resid_pre": "input", "resid_post": "output", "mlp_out": "mlp", "attn_out": "attention"}
_PAIRS = (
    ("hook_name", "hook_name_out"),
    ("hook_point_in", "hook_point_out"),
    ("hf_hook_point_in", "hf_hook_point_out"),
    ("hf_hook_name", "hf_hook_name_out"),
)
_TO_ANOTHER_PLACE = ("transcoder", "crosscoder")
_SKIPS = {"W_skip", "w_skip", "affine_skip_connection"}


def hook(name: str, where: str) -> Place:
    """``blocks.12.hook_resid_post`` and the like, or ``model.layers.12`` as transformers names a layer.

    Raises:
        RequestError: It is none of these.
    """
    if match := re.search(r"(?<![0-9])([0-9]{1,4})\.(?:hook_)?(resid_pre|resid_post|mlp_out|attn_out)", name):
        return Place(int(match[1]), SITES[match[2]])
    layer = r"(?:[a-z_]+\.)*(?:layers|h)\.([0-9]{1,4})"
    if match := re.fullmatch(layer + r"(?:\.output)?", name):
        return Place(int(match[1]), "output")
    # Of Gemma, whose norm's output is what the MLP adds to the stream.
    if match := re.fullmatch(layer + r"\.post_feedforward_layernorm\.output", name):
        return Place(int(match[1]), "mlp")
    raise RequestError(
        f"{where} names the hook {name!r}; allowed are blocks.N.hook_ with {', '.join(SITES)}, and model.layers.N: other"
        " places have no directions of the residual stream, or lie where none can be taken out"
    )


def check_one_place(folder: Path, about: Mapping[str, Any], keys: set[str], *, by_path: bool) -> None:
    """Check that an autoencoder writes back what it reads.

    Args:
        by_path: Whether this library tells only in the path what it stores.

    Raises:
        RequestError: It is a transcoder or a crosscoder: its encoder reads at another place than its decoder writes.
    """
    parts = {**about, **_object(about, "metadata"), **_object(about, "trainer")}
    kinds = [str(parts.get(key) or "").lower() for key in ("architecture", "dict_class", "type")]
    kinds += [part.lower() for part in folder.parts[-6:]] if by_path else []
    why = next((f"it is a {word}" for word in _TO_ANOTHER_PLACE for kind in kinds if word in kind), "")
    for source, target in _PAIRS:
        read, written = parts.get(source), parts.get(target)
        if read and written and read != written:
            why = why or f"it reads at {read} and writes at {written}"
    for key in ("transcode", "skip_connection", "affine_connection"):
        if parts.get(key) is True:
            why = why or f"its configuration says {key}"
    if keys & _SKIPS:
        why = why or f"it holds {min(keys & _SKIPS)}, which passes its input on to another place"
    if why:
        raise RequestError(
            f"{folder.name} is no autoencoder of one place: {why}. What its latents read and what they write lie at"
            " different places, so they cannot be scored and taken out at one; give a sparse autoencoder"
        )


def _object(about: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = about.get(key)
    return part if isinstance(part, dict) else {}
