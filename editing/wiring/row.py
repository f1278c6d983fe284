"""Rows: how one model type is wired, as patterns of tensor names.

A row names every tensor of a checkpoint. A writer has the axis that holds d_model and, in post-norm models, the gains
between the matrix and the stream; all other tensors are readers. A tensor that matches no pattern is an error. Nothing
is inferred from shapes, because a shape is ambiguous when d_model equals another width.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RequestError, UnsupportedArchitecture, counted

Kind = Literal["embedding", "position", "attention", "mlp"]


@dataclass(frozen=True)
class Writer:
    """One family of tensors that write to the residual stream."""

    pattern: str
    """Tensor name, with ``{layer}`` and ``{expert}`` in place of numbers."""
    axis: int
    """Axis of d_model, counted from the last: -1 for rows of tokens, Conv1D and biases, -2 for nn.Linear."""
    kind: Kind
    gains: tuple[str, ...] = ()
    """Names of the norm weights that multiply this write before it reaches the stream, one after the other."""
    centred: bool = False
    """Whether the norm takes the mean off first, as LayerNorm does."""


@dataclass(frozen=True)
class ExpertPart:
    """Where a checkpoint stores a part of each expert's matrix, of a parameter that holds all experts together."""

    pattern: str
    """Name of the stored tensor; one with ``{expert}`` holds one expert, without it all of them."""
    axis: int = -2
    """Axis of the matrix in memory along which the parameter is divided."""
    index: int = 0
    """Which of the parts this is, counted from 0."""
    of: int = 1
    """Number of parts: 2 where gate and up projections are one parameter."""
    interleaved: bool = False
    """Whether the parts take turns row by row; otherwise one stands after the other."""
    transposed: bool = False
    """Whether the stored matrix lies the other way round than in memory."""

    def places(self, size: int) -> slice:
        """Which rows (or columns, by ``axis``) of the parameter are stored here, of ``size``."""
        count = size // self.of
        return (
            slice(self.index, size, self.of)
            if self.interleaved
            else slice(self.index * count, (self.index + 1) * count)
        )


@dataclass(frozen=True)
class FusedExperts:
    """A family of parameters [experts, rows, columns] that hold a matrix of every expert of a layer."""

    pattern: str
    """Name in memory, with ``{layer}``."""
    parts: tuple[ExpertPart, ...] = ()
    """Where a checkpoint stores them; empty if only as in memory."""
    inputs_first: bool = False
    """Whether the model's code says that each matrix is [in, out] (``is_transposed``), which decides how peft lays out
    its factors."""


@dataclass(frozen=True)
class Architecture:
    """How one model type is wired, on disk and in memory."""

    writers: tuple[Writer, ...]
    readers: tuple[str, ...]
    """Tensors that do not write to the stream: they read it, gate it, or normalize a write (gains)."""
    embedding: str
    """Name of the token embedding tensor."""
    layers: str
    """Module path of the decoder layers in the causal language model."""
    sublayers: tuple[str, ...]
    """Modules of a layer whose output is added to the stream, in order."""
    attention_units: str | None = "self_attn.o_proj"
    """Module of a layer whose input holds the attention heads' outputs; None if not every layer has it."""
    mlp_units: str | None = "mlp.down_proj"
    """Module of a layer whose input holds the MLP neurons; None if experts are fused in one tensor, or not every layer
    has it."""
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Modules of a layer that compute the MLP neurons; ``gate_up_proj`` holds two matrices, one after the other."""
    unembedding: str = "lm_head.weight"
    gain_offset: float = 0.0
    """Added to the stored norm weight to get the gain (1 for Gemma)."""
    spellings: tuple[tuple[str, str], ...] = ()
    """``(start, other)``: what a name starts with in memory, and what it may start with on disk instead; ``{n}`` stands
    for a number."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of stored tensors that transformers does not load, such as a head that predicts several
    tokens; they are left as they are."""
    tied: bool | None = None
    """Whether the unembedding is the embedding; None if the configuration says."""
    derived: bool = False
    """Whether the row was found out on a small copy of the model, not read from its code."""
    fused: tuple[FusedExperts, ...] = ()
    """Parameters that hold all experts of a layer together, which can carry an adapter."""
    refused: tuple[tuple[str, Any, str], ...] = ()
    """``(config key, value, reason)`` of variants in which editing weights cannot remove a direction."""

    def kinds_in(self, sublayer: str) -> set[Kind]:
        """The kinds of writers whose writes come out of one sublayer."""
        part = f".{sublayer}."
        return {one.kind for one in self.writers if any(part in name for name in (one.pattern, *one.gains))}


@dataclass(frozen=True)
class Site:
    """A tensor of a checkpoint that writes to the stream."""

    name: str
    writer: Writer
    layer: int | None
    """Decoder layer; None for embeddings."""


def spelled(row: Architecture, name: str, names: Collection[str]) -> str | None:
    """A tensor's name as ``names`` spells it, or None: names on disk and in memory may start differently."""
    return next((form for form in forms_of(row, name) if form in names), None)


def forms_of(row: Architecture, name: str) -> Iterator[str]:
    """A tensor's name, and how it may be spelled on disk or in memory."""
    yield name
    for one, other in row.spellings:
        for old, new in ((one, other), (other, one)):
            if form := respelled(name, old, new):
                yield form


def respelled(name: str, old: str, new: str) -> str | None:
    """A name that starts like ``old``, starting like ``new``; ``{n}`` stands for a number, in the same order in both."""
    # Patterns are spelled anew as well, and have placeholders where names have numbers.
    match = re.match(re.escape(old).replace(r"\{n\}", r"(\d+|\{\w+\})"), name)
    if match is None:
        return None
    for number in match.groups():
        new = new.replace("{n}", number, 1)
    return new + name[match.end() :]


def pattern_of(name: str, layers: str, spellings: Sequence[tuple[str, str]] = ()) -> str:
    """A tensor's name with its layer and its other numbers left open."""
    starts = [layers]
    for one, other in spellings:
        starts += [form for old, new in ((one, other), (other, one)) if (form := respelled(f"{layers}.", old, new))]
    for start in starts:
        start = start.removesuffix(".")
        if match := re.match(re.escape(start) + r"\.\d+\.", name):
            # Inside a layer experts alone are alike; other numbers tell apart what stands in a sequence.
            return f"{start}.{{layer}}." + re.sub(r"(expert\w*\.)\d+(?=\.)", r"\1{expert}", name[match.end() :])
    return re.sub(r"(?<=\.)\d+(?=\.)", "{expert}", name)


def classify(row: Architecture, names: Collection[str], depth: int | None = None) -> list[Site]:
    """Find the tensors that write to the stream among all tensors of a checkpoint or state dict, in the order of names.

    Args:
        row: The model's architecture.
        names: All tensors.
        depth: Number of decoder layers that the configuration counts.

    Raises:
        UnsupportedArchitecture: A tensor matches neither a writer nor a reader of the row, or none is a writer.
        RequestError: A tensor belongs to a layer that the configuration does not count.
    """
    sites: list[Site] = []
    unknown: list[str] = []
    for name, (layer, writer, known) in _places(row, names).items():
        uncounted = writer is not None and layer is not None and depth is not None and layer >= depth
        if (uncounted or not known) and _is_ignored(row, name):
            continue
        if uncounted:
            raise RequestError(
                f"the checkpoint stores {name}, and its config.json counts {depth} layers (0 to {(depth or 1) - 1}); "
                "correct num_hidden_layers, or remove the tensors of further layers"
            )
        if writer is not None:
            sites.append(Site(name, writer, layer))
        elif not known:
            unknown.append(name)
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise UnsupportedArchitecture(
            f"{counted(len(unknown), 'tensor is', 'tensors are')} not in the architecture's row and might write to the stream: "
            f"{shown}; add them in editing/architectures.py"
        )
    if not sites:
        raise UnsupportedArchitecture(
            "the checkpoint holds no tensor that writes to the residual stream; give a whole model, not a part of one"
        )
    return sites


def _places(row: Architecture, names: Collection[str]) -> dict[str, tuple[int | None, Writer | None, bool]]:
    """Of each tensor: its layer, the writer that it is, and whether the row names it at all."""
    patterns = [(writer.pattern, writer) for writer in row.writers] + [(pattern, None) for pattern in row.readers]
    regexes = [(regex, writer) for pattern, writer in patterns for regex in _regexes(row, pattern)]
    # Names that differ in numbers alone match alike, and a large checkpoint has tens of thousands of them.
    found: dict[str, tuple[re.Pattern[str], Writer | None] | None] = {}
    places: dict[str, tuple[int | None, Writer | None, bool]] = {}
    for name in names:
        shape = re.sub(r"(?<=\.)\d+(?=\.)", "0", name)
        if shape not in found:
            found[shape] = next(((regex, writer) for regex, writer in regexes if regex.fullmatch(name)), None)
        if (match := found[shape]) is None:
            places[name] = (None, None, False)
            continue
        groups = match[0].fullmatch(name)
        number = groups.groupdict().get("layer") if groups else None
        places[name] = (None if number is None else int(number), match[1], True)
    return places


def _is_ignored(row: Architecture, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in row.ignored)


def left_alone(row: Architecture, names: Collection[str], depth: int) -> list[str]:
    """Stored tensors that transformers does not load, so that no edit changes them and no measurement sees them."""
    return [
        name
        for name, (layer, _, known) in _places(row, names).items()
        if _is_ignored(row, name) and (not known or (layer is not None and layer >= depth))
    ]


def gain_names(site: Site) -> tuple[str, ...]:
    """Names of the norm weights between a tensor and the stream."""
    return tuple(gain.format(layer=site.layer) for gain in site.writer.gains)


def _regexes(row: Architecture, pattern: str) -> Iterator[re.Pattern[str]]:
    for form in dict.fromkeys(forms_of(row, pattern)):
        # re.escape escapes the braces too, so the placeholders are replaced in their escaped form.
        text = re.escape(form).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"\d+")
        yield re.compile(text)
