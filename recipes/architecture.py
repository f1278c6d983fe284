"""Whether a model type can be edited: its row, proved on a small copy. A ``config.json`` is enough."""

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..artifacts.checkpoints.manifest import checkpoint_of
from ..artifacts.checkpoints.proof import Proof, prove
from ..artifacts.files.opened import OF_A_CHECKPOINT
from ..artifacts.files.parsed import read_object
from ..artifacts.models.find import find_model
from ..artifacts.models.hub import config_from_hub
from ..editing.errors import CheckpointError, RequestError, UnsupportedArchitecture


def config_of(ref: str) -> dict[str, Any]:
    """The content of a model's ``config.json``; of a Hub model, nothing else is downloaded.

    Raises:
        RequestError: There is no such model.
        CheckpointError: The file is damaged or names no type.
    """
    path = Path(ref)
    if path.is_file() and path.suffix == ".json":
        file = path
    elif path.is_dir():
        file = checkpoint_of(path) / "config.json"
    elif path.exists() or ref.startswith(("builtin:", ".", "/")) or path.suffix == ".gguf":
        file = find_model(ref).folder / "config.json"
    else:
        file = config_from_hub(ref)
    if not file.is_file():
        raise RequestError(
            f"{ref} has no config.json; give a model folder, a config.json, or a Hub id such as org/name"
        )
    with OF_A_CHECKPOINT.about(file.name):
        config = read_object(file)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{file} names no model_type; give the config.json of a transformers model")
    return config


def run(ref: str) -> Proof:
    """Prove that a model can be edited, or say why it cannot.

    Example:
        >>> run("builtin:testbed").proved
        True
    """
    config = config_of(ref)
    try:
        return prove(config)
    except UnsupportedArchitecture as error:
        return Proof.refused(str(config["model_type"]), str(error))


def record(proof: Proof) -> dict[str, Any]:
    """The record as JSON."""
    content = {**asdict(proof), "prune": proof.units, "lora": proof.adaptable}
    return {key: value for key, value in content.items() if key not in ("units", "adaptable")}


def text(proof: Proof, width: int | None) -> str:
    """The record in words, for a terminal."""
    rows = [("why not", proof.reason or "")]
    rows += [
        (
            "row",
            {"table": "in the table", "derived": "derived, from a small copy of the model"}.get(proof.row or "", ""),
        )
    ]
    if proof.residual is not None:
        rows.append(
            (
                "proof",
                f"{proof.residual:.1e} of a random direction is left at worst ({proof.place}), edited on disk and loaded"
                f" again; a copy of {proof.parameters:,} parameters, {proof.seconds} s",
            )
        )
    if proof.writers:
        rows += [("writers" if index == 0 else "", pattern) for index, pattern in enumerate(proof.writers)]
        rows.append(("prune", ", ".join(proof.units) or "nothing: no units stand in the same module of every layer"))
        rows.append(("LoRA", ", ".join(proof.adaptable) or "nothing"))
    lines = [f"{proof.model_type} {'can' if proof.proved else 'cannot'} be edited"]
    for name, said in rows:
        if said:
            lines += textwrap.wrap(said, width or 120, initial_indent=f"  {name:<9}", subsequent_indent=" " * 11)
    return "\n".join(lines) + "\n"
