"""A PEFT adapter as an edit: its tensors by the weights that they change, with peft's own names and scales.

Example:
    >>> edit = adapter_edit(read_adapter(Path("my-lora"), "my-lora"), open_checkpoint(Path("base")))
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...editing.architectures import architecture_of, layer_count, residual_width
from ...editing.edits.adapter_merge import (
    AdapterMerge,
    InTurn,
    Replaced,
    ReplacedRows,
    Rescaled,
)
from ...editing.edits.base import WeightEdit
from ...editing.edits.low_rank import ExpertFactors, Factors, LowRankUpdate, Update, expert_factors
from ...editing.edits.subspace_removal import ties_embeddings
from ...editing.errors import CheckpointError, RequestError, UnsupportedArchitecture
from ...editing.wiring.experts import fused_family, fused_shape, stored_pieces
from ...editing.wiring.row import Architecture, spelled
from ..files.opened import OF_A_CHECKPOINT, Unreadable, sha256_of
from ..files.tensors import check_finite_tensors, load_safetensors
from .adapter_config import CONFIG, MERGE_WITH_PEFT, WEIGHTS, AdapterConfig
from .read import Checkpoint

PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(?P<bias>\.bias)?(\.weight)?"
)
_TOKENS = re.compile(r"(?P<module>.+?)\.(token_adapter\.)?trainable_tokens_delta(\.default)?")
_WHOLE = re.compile(r"(?P<module>.+?)(\.modules_to_save(\.default)?)?\.(?P<parameter>weight|bias)")


@dataclass(frozen=True)
class Adapter:
    """An adapter's options and tensors."""

    name: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    sha256: dict[str, str]
    """Of its configuration and its weights."""


def read_adapter(folder: Path, name: str) -> Adapter:
    """Read an adapter's folder.

    Raises:
        CheckpointError: A file is missing or damaged, or holds NaN or infinite values.
        RequestError: The adapter is of a kind that cannot be merged here.
    """
    config = AdapterConfig(folder, name)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{name} holds its weights as a pickle (adapter_model.bin), which can run code when loaded; convert it on a"
            f" machine without private data: {MERGE_WITH_PEFT}"
            if pickled
            else f"{name} holds {CONFIG} but no {WEIGHTS}; fetch the adapter again"
        )
    with OF_A_CHECKPOINT.about(f"{name}/{WEIGHTS}"):
        tensors = load_safetensors(folder / WEIGHTS)
        for key, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.itemsize == 1:
                raise Unreadable(f"tensor {key} is of type {tensor.dtype}, not of floating-point numbers")
        check_finite_tensors(tensors)
    return Adapter(name, config, tensors, {file: sha256_of(folder / file) for file in (CONFIG, WEIGHTS)})


def adapter_edit(adapter: Adapter, checkpoint: Checkpoint) -> WeightEdit:
    """What an adapter does to a base; nothing is read of the base but its configuration and its tensors' names.

    Raises:
        RequestError: A tensor of the adapter finds no tensor of the base, or the adapter cannot be merged into it.
    """
    row = architecture_of(checkpoint.config)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    embedding = spelled(row, row.embedding, shapes)
    if embedding and ties_embeddings(checkpoint.config):
        # Tied, it is the embedding, whether it is stored or not.
        shapes.setdefault(row.unembedding, shapes[embedding])
    shapes |= _fused_shapes(row, layer_count(checkpoint.config), shapes)
    updates = _Sorted(adapter, row, shapes).updates()
    updates, unties = _tied(adapter, updates, row, checkpoint.config)
    kind = (checkpoint.config["model_type"], residual_width(checkpoint.config), layer_count(checkpoint.config))
    provenance = {"adapter": adapter.name, "adapter_sha256": adapter.sha256}
    factors = {name: update for name, update in updates.items() if isinstance(update, Factors | ExpertFactors)}
    if not unties and len(factors) == len(updates):
        return LowRankUpdate(factors, *kind, provenance)
    return AdapterMerge(updates, *kind, unties, provenance)


def _fused_shapes(row: Architecture, layers: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes in memory of parameters that hold all experts of a layer, where the base stores them in pieces."""
    found = {}
    for family in row.fused:
        for layer in range(layers):
            name = family.pattern.format(layer=layer)
            pieces = [] if spelled(row, name, shapes) else stored_pieces(row, name, shapes)
            if pieces and (shape := fused_shape(pieces, shapes)):
                found[name] = shape
    return found


@dataclass
class _Module:
    """The tensors of an adapter on one module."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    """By parameter: weight or bias."""
    tokens: Tensor | None = None


class _Sorted:
    """An adapter's tensors by the module that they change."""

    def __init__(self, adapter: Adapter, row: Architecture, shapes: Mapping[str, tuple[int, ...]]):
        self.adapter, self.row, self.shapes = adapter, row, shapes
        self.about = adapter.config.about
        self.modules: dict[str, _Module] = {}
        for key, tensor in adapter.tensors.items():
            self._sort(key, tensor)
        for name in self.about.modules_to_save or ():
            if not any(module.whole and f".{name}." in f".{path}." for path, module in self.modules.items()):
                raise RequestError(
                    f"{adapter.name} says that it saves {name} (modules_to_save) but holds no such tensor; fetch the"
                    " adapter again"
                )

    def updates(self) -> dict[str, Update]:
        """One update for each parameter, by the parameter's name."""
        found: dict[str, Update] = {}
        for path, module in self.modules.items():
            for name, update in self._of_module(path, module):
                found[name] = InTurn(found[name], update) if name in found else update
        return found

    def _sort(self, key: str, tensor: Tensor) -> None:
        plain = key.removeprefix(PREFIX)
        if match := _PART.fullmatch(plain):
            part = match["part"] + (match["bias"] or "")
            self.modules.setdefault(match["module"], _Module()).parts[part] = tensor
        elif match := _TOKENS.fullmatch(plain):
            self.modules.setdefault(match["module"], _Module()).tokens = tensor
        elif match := _WHOLE.fullmatch(plain):
            # The wrapped layer's own tensors lie under base_layer.
            path = match["module"].removesuffix(".base_layer")
            self.modules.setdefault(path, _Module()).whole[match["parameter"]] = tensor
        else:
            raise RequestError(f"{self.adapter.name} holds {key}, which is no tensor of LoRA; {MERGE_WITH_PEFT}")

    def _of_module(self, path: str, module: _Module) -> list[tuple[str, Update]]:
        found: list[tuple[str, Update]] = []
        for parameter, values in module.whole.items():
            name = f"{path}.{parameter}"
            self._stored(name)
            found.append((name, Replaced(values)))
        parts = module.parts
        fused = self.about.target_parameters and spelled(self.row, f"{path}.weight", self.shapes) is None
        if "lora_A" in parts and fused:
            found.append(self._experts(path, parts))
        elif "lora_A" in parts or "lora_B" in parts:
            found.append((f"{path}.weight", self._linear(path, parts)))
        elif "lora_embedding_A" in parts or "lora_embedding_B" in parts:
            found.append((f"{path}.weight", self._embedding(path, parts)))
        elif parts:
            raise RequestError(f"{self.adapter.name} holds {', '.join(parts)} of {path} alone; fetch the adapter again")
        if "lora_B.bias" in parts:
            self._stored(f"{path}.bias")
            scale = self.adapter.config.rank_and_scale(path)[1]
            bias = parts["lora_B.bias"].float()[None]
            found.append((f"{path}.bias", Factors(torch.tensor([[scale]]), bias)))
        if module.tokens is not None:
            found.append((f"{path}.weight", self._rows(path, module.tokens)))
        return found

    def _linear(self, path: str, parts: Mapping[str, Tensor]) -> Update:
        a, b, scale = self._pair(path, parts, "lora_A", "lora_B")
        # Whether a module is a Conv1D, which stores [in, out], is known of the architecture; peft ignores its option
        # fan_in_fan_out where that says otherwise.
        turned = stores_inputs_first(self.row)
        factors = Factors(a.T.contiguous(), (b * scale).T.contiguous()) if turned else Factors(b * scale, a)
        magnitude = parts.get("lora_magnitude_vector")
        if magnitude is None:
            if self.about.use_dora:
                raise RequestError(
                    f"{self.adapter.name} uses DoRA but holds no lora_magnitude_vector of {path}; fetch the adapter"
                    " again"
                )
            return factors
        if turned:
            raise RequestError(
                f"{self.adapter.name} uses DoRA on a base whose weights are stored as [in, out], where each norm needs"
                f" the whole matrix; {MERGE_WITH_PEFT}"
            )
        self._fits(f"{path}.lora_magnitude_vector", tuple(magnitude.shape), (len(factors.left),))
        return Rescaled(factors, magnitude.float())

    def _embedding(self, path: str, parts: Mapping[str, Tensor]) -> Update:
        if "lora_magnitude_vector" in parts:
            raise RequestError(
                f"{self.adapter.name} uses DoRA on the embedding {path}, where each norm needs the whole matrix;"
                f" {MERGE_WITH_PEFT}"
            )
        a, b, scale = self._pair(path, parts, "lora_embedding_A", "lora_embedding_B")
        return Factors((a * scale).T.contiguous(), b.T.contiguous())

    def _pair(self, path: str, parts: Mapping[str, Tensor], first: str, second: str) -> tuple[Tensor, Tensor, float]:
        """Both matrices in fp32 and the scale, where they fit each other and the stored weight."""
        if first not in parts or second not in parts:
            missing = second if first in parts else first
            raise RequestError(f"{self.adapter.name} holds no {missing} of {path}; fetch the adapter again")
        a, b = parts[first].float(), parts[second].float()
        rank, scale = self.adapter.config.rank_and_scale(path)
        if a.dim() != 2 or b.dim() != 2 or len(a) != rank or b.shape[1] != rank:
            raise RequestError(
                f"{self.adapter.name}: {path} has {first} {list(a.shape)} and {second} {list(b.shape)}, and its"
                f" {CONFIG} gives rank {rank}; fetch the adapter again"
            )
        stored = self._stored(f"{path}.weight")
        product = (len(b), a.shape[1])
        turned = first == "lora_embedding_A" or stores_inputs_first(self.row)
        self._fits(path, product[::-1] if turned else product, self.shapes[stored])
        return a, b, scale

    def _rows(self, path: str, values: Tensor) -> Update:
        stored = self._stored(f"{path}.weight")
        height, width = self.shapes[stored]
        given = self.about.trainable_token_indices
        if isinstance(given, dict):
            given = next((rows for name, rows in given.items() if f".{path}".endswith(f".{name}")), None)
        self._fits(f"{path}.trainable_tokens_delta", tuple(values.shape), (len(given or ()), width))
        if given is None or max(given, default=0) >= height:
            raise RequestError(
                f"{self.adapter.name} trains token {max(given or [0])} of {path}, the base has {height} tokens; give"
                " the base that it was trained on"
            )
        return ReplacedRows(torch.tensor(given, dtype=torch.int64), values.float(), height)

    def _experts(self, path: str, parts: Mapping[str, Tensor]) -> tuple[str, Update]:
        """An adapter on one of a module's fused tensors, which its name does not tell and its shape does."""
        a, b = parts["lora_A"].float(), parts.get("lora_B")
        # peft wraps a module once for each of its parameters, one wrapper inside the other.
        module = path.replace(".base_layer", "")
        fitting = []
        for target in self.about.target_parameters or ():
            name = f"{module}.{target.rpartition('.')[2]}"
            stored = spelled(self.row, name, self.shapes)
            if stored is None or not f".{name}".endswith(f".{target}") or len(self.shapes[stored]) != 3 or b is None:
                continue
            experts, rows, columns = self.shapes[stored]
            family = fused_family(self.row, name)
            turned = family is not None and family.inputs_first
            inputs, outputs = (rows, columns) if turned else (columns, rows)
            rank, scale = self.adapter.config.rank_and_scale(name)
            if tuple(a.shape) == (rank * experts, inputs) and tuple(b.shape) == (outputs, rank * experts):
                fitting.append((name, experts, scale, turned))
        if len(fitting) != 1 or b is None:
            raise RequestError(
                f"{self.adapter.name} adapts a parameter of {module} (target_parameters), and no single parameter of the"
                f" base's experts has its shape ({list(a.shape)}); give the base that it was trained on with --base, or"
                f" {MERGE_WITH_PEFT}"
            )
        name, experts, scale, turned = fitting[0]
        return name, expert_factors(a, scale * b.float(), experts, inputs_first=turned)

    def _stored(self, name: str) -> str:
        stored = spelled(self.row, name, self.shapes)
        if stored is None:
            raise RequestError(
                f"{self.adapter.name} changes {name}, and the base has no such tensor; give the base that the adapter"
                " was trained on with --base"
            )
        return stored

    def _fits(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise RequestError(
                f"{self.adapter.name}: {name} is for a tensor of shape {list(shape)}, the base's is {list(expected)};"
                " give the base that the adapter was trained on with --base"
            )


_UNTIE_FIRST = (
    "save the base with tie_word_embeddings=false first (model.config.tie_word_embeddings = False, then"
    " model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone()) and save_pretrained), and give that"
)


def stores_inputs_first(row: Architecture) -> bool:
    """Whether the linear modules of an architecture are GPT-2's Conv1D, whose weights are [in, out].

    Raises:
        UnsupportedArchitecture: Some are and some are not, so that a square matrix would not tell how it lies.
    """
    writers = [
        writer for writer in row.writers if writer.kind in ("attention", "mlp") and "expert" not in writer.pattern
    ]
    axes = {writer.axis for writer in writers if writer.pattern.endswith(".weight")}
    if len(axes) > 1:
        raise UnsupportedArchitecture(
            f"the base stores some linear weights as [in, out] and some as [out, in]; {MERGE_WITH_PEFT}"
        )
    return axes == {-1}


def _tied(
    adapter: Adapter, updates: dict[str, Update], row: Architecture, config: Mapping[str, Any]
) -> tuple[dict[str, Update], bool]:
    """Updates without those of a tied unembedding that repeat the embedding's, and whether the two must part.

    Raises:
        RequestError: The adapter changes a tied unembedding by itself.
    """
    if not ties_embeddings(dict(config)):
        return updates, False
    by_role: dict[str, str] = {}
    for role in (row.embedding, row.unembedding):
        name = spelled(row, role, updates)
        if name is not None:
            by_role[role] = name
    embedding, head = by_role.get(row.embedding), by_role.get(row.unembedding)
    if head is not None:
        if embedding is None or not _same(updates[embedding], updates[head]):
            raise RequestError(
                f"{adapter.name} changes {head}, which this base ties to its embedding: merging would change the"
                f" embedding too; {_UNTIE_FIRST}"
            )
        return {name: update for name, update in updates.items() if name != head}, False
    # Rows of single tokens peft changes in a tied unembedding too.
    if embedding is None or adapter.config.about.ensure_weight_tying or isinstance(updates[embedding], ReplacedRows):
        return updates, False
    # peft adapts the embedding alone; the unembedding goes on with the base's weights.
    return updates, True


def _same(one: Update, other: Update) -> bool:
    values, others = _values(one), _values(other)
    same = len(values) == len(others) and all(torch.equal(a, b) for a, b in zip(values, others, strict=True))
    return type(one) is type(other) and bool(values) and same


def _values(update: Update) -> list[Tensor]:
    if isinstance(update, InTurn):
        return [*_values(update.first), *_values(update.second)]
    if isinstance(update, Factors):
        return [update.left, update.right]
    return [update.values] if isinstance(update, Replaced | ReplacedRows) else []
