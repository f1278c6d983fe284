"""A new format of sparse autoencoders: one row, and a function that says where in the model it was trained.

python docs/examples/autoencoder_format.py
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from excise.artifacts.checkpoints.sae import FORMATS, Format, load_latents
from excise.editing.directions.subspaces import Place
from safetensors.torch import save_file


def place(folder: Path, about: dict[str, Any]) -> Place:
    """This library writes the layer and the site into its settings: {"layer": 3, "site": "output"}."""
    return Place(int(about["layer"]), about["site"])


FORMATS["our_library"] = Format(
    weights="ours.safetensors",
    about="ours.json",
    # Key of a tensor, and the axis along which latents stand in it.
    decoder={"directions": 0},
    encoder={"readers": 0},
    bias=("reader_bias",),
    decoder_bias=("centre",),
    place=place,
)

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    tensors = {
        "directions": torch.randn(8, 32),
        "readers": torch.randn(8, 32),
        "reader_bias": torch.zeros(8),
        "centre": torch.zeros(32),
    }
    save_file(tensors, folder / "ours.safetensors")
    (folder / "ours.json").write_text(json.dumps({"layer": 3, "site": "output"}))
    # The format is recognized by its files; only the rows of the named latents are read.
    found = load_latents(folder, [2, 5], width=32, layers=8)
print(f"{len(found.numbers)} latents at the {found.place}")
assert found.place == Place(3, "output") and found.numbers == (2, 5)
