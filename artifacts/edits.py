"""Edits on disk: ``edit.json`` says what, ``edit.safetensors`` holds the subspace."""

import json
from pathlib import Path
from typing import Any

from ..editing.edit import Edit
from ..editing.errors import RequestError

SCHEMA_VERSION = 1
DESCRIPTION, TENSORS = "edit.json", "edit.safetensors"


def save_edit(edit: Edit, folder: Path) -> None:
    """Write an edit into a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({"basis": edit.basis.contiguous()}, folder / TENSORS, metadata={"format": "pt"})
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "method": "orthogonalize",
        "model_type": edit.model_type,
        "width": edit.basis.shape[0],
        "rank": edit.basis.shape[1],
        "layer_strengths": list(edit.layer_strengths),
        "embeddings": edit.embeddings,
        "variant": edit.variant,
        "provenance": edit.provenance,
    }
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_edit(folder: Path) -> Edit:
    """Read an edit written by ``save_edit``.

    Raises:
        RequestError: The folder holds no edit, or one of another version or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = folder / DESCRIPTION
    if not description.is_file():
        inner = folder / "excise"
        hint = (
            f"; did you mean {inner}?" if (inner / DESCRIPTION).is_file() else "; give a run's checkpoint/excise folder"
        )
        raise RequestError(f"{folder} holds no {DESCRIPTION}{hint}")
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION or content["method"] != "orthogonalize":
            raise RequestError(
                f"{description} is a {content['method']} edit of version {content['schema_version']}; "
                f"this excise applies orthogonalize edits of version {SCHEMA_VERSION}"
            )
        return Edit(
            basis=load_file(folder / TENSORS)["basis"].float(),
            model_type=content["model_type"],
            layer_strengths=tuple(content["layer_strengths"]),
            embeddings=content["embeddings"],
            variant=content["variant"],
            provenance=content["provenance"],
        )
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise RequestError(f"the edit in {folder} is damaged ({error}); fetch it again") from error
