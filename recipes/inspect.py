"""What directions stand for: where they point, which contexts lie at their ends, and what taking them out costs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifacts.checkpoints.directions import FILE, load_directions, save_directions
from ..artifacts.checkpoints.manifest import FOLDER
from ..artifacts.checkpoints.read import open_checkpoint
from ..artifacts.checkpoints.sae import is_autoencoder, load_latents
from ..artifacts.checkpoints.staging import refuse_existing, staged_folder
from ..artifacts.concepts import load_concept, read_training
from ..artifacts.models.find import find_model
from ..artifacts.models.load import LoadedModel, choose_device, choose_dtype, load_model
from ..artifacts.reporting.directions_page import write_report
from ..editing.architectures import architecture_of, layer_count, residual_width
from ..editing.directions.sae_latents import SparseLatents
from ..editing.directions.subspaces import Subspace
from ..editing.errors import RequestError, nearest
from ..editing.hooks.concept_ablation import concept_ablated
from ..editing.modules import language_config, unembedding_rows
from ..eval.concept import Concept, TrainingRow
from .caft.direction_sources import BATCH, activations
from .caft.sae_latent_scores import SCORES, by_attribution, by_contrast, ranked
from .common.examples import Example, example_batch, sequence_nll
from .common.tokens import Row, encode, pieces

TEXTS = 512
"""Texts to look through, at most; what is left out is counted."""
WINDOW = 512
"""Tokens read at once; a longer text is read in pieces."""
TOP = 20
"""Latents of an autoencoder to look at, where none are named (paper: top by score)."""
TOKENS, CONTEXTS, AROUND = 8, 6, 12
"""Tokens shown of each end, contexts of each end, and tokens of context around the one that counts."""


@dataclass(frozen=True)
class Context:
    """A place in a text and how far along the direction it lies."""

    before: str
    token: str
    after: str
    projection: float


@dataclass(frozen=True)
class Inspected:
    """One direction, looked at."""

    place: str
    index: int
    """Its number for ``pick``."""
    name: str
    score: float
    top_tokens: tuple[str, ...]
    """What the unembedding reads most from it (logit lens, without the final norm's scale)."""
    bottom_tokens: tuple[str, ...]
    top: tuple[Context, ...]
    bottom: tuple[Context, ...]
    mean: float
    deviation: float
    """Of the projection, over all tokens looked at."""
    effect: float
    """Nats a token by which the texts' loss rises when this direction alone is ablated."""


@dataclass(frozen=True)
class Looked:
    """An inspection, as ``inspect.json`` holds it."""

    model: dict[str, Any]
    texts: int
    left_out: int
    """Texts that were not looked through, being over the limit."""
    directions: tuple[Inspected, ...]


def inspect(
    where: Path,
    model: str,
    concept: str | None,
    texts: Path | None,
    out: Path | None,
    device: str,
    dtype: str,
    advance: Callable[[int], None] = lambda _: None,
    *,
    latents: Sequence[int] = (),
    top: int | None = None,
    score: str | None = None,
) -> Looked:
    """Look at directions on disk, or at latents of an autoencoder, through a model's eyes.

    Args:
        where: A directions file, the folder of the run or checkpoint that holds one, or the folder of an autoencoder.
        concept: Pack whose texts are looked through, unless ``texts`` is given.
        texts: JSON lines of messages, prompt and completion, or text.
        out: Folder for ``inspect.json``, ``inspect.html`` and, of latents, their ``directions.safetensors``.
        latents: Latents of an autoencoder; without any, the first ``top`` by ``score``, or ``TOP`` of them.
        score: ``contrast`` where the pack has contrast pairs, else ``attribution``, if none is given.

    Raises:
        RequestError: Anything that could not work, before the model is loaded.
    """
    if out:
        refuse_existing(out)
    source = find_model(model)
    config = open_checkpoint(source.folder).config
    width, layers = residual_width(config), layer_count(config)
    sparse = load_latents(where, latents or None, width, layers) if is_autoencoder(where) else None
    subspaces = () if sparse else load_directions(_file(where), width=width, layers=layers)
    if texts is None and concept is None:
        raise RequestError("give the texts to look through: --concept PACK or --texts FILE.jsonl")
    pack = load_concept(concept) if concept else None
    if score and score not in SCORES:
        raise RequestError(f"no score {score!r}{nearest(score, list(SCORES))}; scores: {', '.join(SCORES)}")
    if not sparse and (latents or score or top):
        raise RequestError(
            f"{where} is no autoencoder, whose latents could be chosen; leave out --latents, --score and --top"
        )
    if latents and (score or top):
        raise RequestError("--score and --top choose latents where none are named; leave them out, or --latents")
    if sparse and score == "contrast" and not latents and not (pack and pack.contrast):
        raise RequestError(
            "score=contrast compares contrast pairs; give a --concept that has some, or --score attribution"
        )
    pool = _texts(pack) if texts is None and pack else _rows(texts)
    some = pool[:TEXTS]
    chosen = choose_device(device)
    loaded = load_model(source, chosen, choose_dtype(dtype, chosen))
    if sparse:
        subspaces = (
            _ranked(loaded, sparse, pack, some, top or TOP, score).subspace if not latents else sparse.subspace,
        )
    results = look(loaded, subspaces, some, advance)
    looked = Looked(source.describe(), len(some), len(pool) - len(some), tuple(results))
    if out:
        about = asdict(looked)
        with staged_folder(out) as staging:
            (staging / "inspect.json").write_text(
                json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            write_report(staging / "inspect.html", about)
            if sparse:
                save_directions(
                    [one.with_provenance({"model": source.describe()}) for one in subspaces], staging / FILE
                )
    return looked


def _ranked(
    loaded: LoadedModel, sparse: SparseLatents, pack: Concept | None, texts: Sequence[str], top: int, score: str | None
) -> SparseLatents:
    """The latents worth a look: those that tell contrast pairs apart, or that the texts' loss depends on."""
    row = architecture_of(loaded.model.config.to_dict())
    if pack and pack.contrast and score != "attribution":
        return ranked(sparse, by_contrast(loaded, row, sparse, pack.contrast), top)
    examples = [Example(ids, 1) for ids in _windows(loaded, texts)]
    return ranked(sparse, by_attribution(loaded, row, sparse, examples), top)


def look(
    loaded: LoadedModel,
    subspaces: Sequence[Subspace],
    texts: Sequence[str],
    advance: Callable[[int], None] = lambda _: None,
) -> list[Inspected]:
    """Every direction of every subspace."""
    row = architecture_of(loaded.model.config.to_dict())
    rows = _windows(loaded, texts)
    places = list(dict.fromkeys(subspace.place for subspace in subspaces))
    tokens, values = _read(loaded, rows, places)
    plain = _loss(loaded, rows)
    results = []
    for subspace in subspaces:
        for index, name in enumerate(subspace.names):
            direction = subspace.basis[:, index]
            along = values[subspace.place] @ direction
            # An oblique projector works only as a whole.
            alone = subspace if subspace.readers is not None else subspace.pick([index])
            with concept_ablated(loaded.model, row, [alone]):
                ablated = _loss(loaded, rows)
            top, bottom = _ends(loaded, direction)
            order = along.argsort(descending=True).tolist()
            results.append(
                Inspected(
                    str(subspace.place),
                    index,
                    name,
                    subspace.scores[index],
                    top,
                    bottom,
                    _contexts(loaded, rows, tokens, order, along),
                    _contexts(loaded, rows, tokens, order[::-1], along),
                    float(along.mean()),
                    float(along.std()),
                    ablated - plain,
                )
            )
            advance(1)
    return results


def _windows(loaded: LoadedModel, texts: Sequence[str]) -> list[Row]:
    """Texts in pieces that the model can read."""
    window = min(WINDOW, getattr(language_config(loaded.model), "max_position_embeddings", WINDOW))
    whole = (encode(loaded.tokenizer, text, True) for text in texts)
    return [ids for text in whole for ids in pieces(text, window) if len(ids) > 1]


def _read(
    loaded: LoadedModel, rows: Sequence[Row], places: Sequence[Any]
) -> tuple[list[tuple[int, int]], dict[Any, Tensor]]:
    """Where each token stands (text, position), and the activations there."""
    row = architecture_of(loaded.model.config.to_dict())
    states: dict[Any, list[Tensor]] = {place: [] for place in places}
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        values = activations(loaded.model, row, part, places)
        for place in places:
            states[place] += [values[place][i, : len(ids)] for i, ids in enumerate(part)]
    where = [(text, position) for text, ids in enumerate(rows) for position in range(len(ids))]
    return where, {place: torch.cat(parts) for place, parts in states.items()}


@torch.no_grad()
def _loss(loaded: LoadedModel, rows: Sequence[Row]) -> float:
    """Nats a token over all texts."""
    total, count = 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = {
            key: value.to(loaded.device)
            for key, value in example_batch([Example(ids, 1) for ids in rows[start : start + BATCH]]).items()
        }
        total += float(sequence_nll(loaded.model, batch).sum())
        count += int(batch["lengths"].sum())
    return total / count


def _ends(loaded: LoadedModel, direction: Tensor) -> tuple[tuple[str, ...], tuple[str, ...]]:
    logits = unembedding_rows(loaded.model) @ direction
    return tuple(
        tuple(loaded.tokenizer.decode([token]) for token in (sign * logits).topk(TOKENS).indices.tolist())
        for sign in (1, -1)
    )  # type: ignore[return-value]


def _contexts(
    loaded: LoadedModel,
    rows: Sequence[Row],
    where: Sequence[tuple[int, int]],
    order: Sequence[int],
    along: Tensor,
) -> tuple[Context, ...]:
    """The first few places of an order, no two with the same words around them."""
    contexts: dict[tuple[str, str], Context] = {}
    for place in order:
        text, position = where[place]
        ids = rows[text]
        before = loaded.tokenizer.decode(ids[max(0, position - AROUND) : position])
        token = loaded.tokenizer.decode(ids[position : position + 1])
        after = loaded.tokenizer.decode(ids[position + 1 : position + 1 + AROUND])
        contexts.setdefault((before, token), Context(before, token, after, float(along[place])))
        if len(contexts) == CONTEXTS:
            break
    return tuple(contexts.values())


def _file(where: Path) -> Path:
    for inner in (where, where / FILE, where / FOLDER / FILE, where / "checkpoint" / FOLDER / FILE):
        if inner.is_file():
            return inner
    raise RequestError(f"{where} holds no {FILE}; give one, the folder of a caft run, or of an autoencoder")


def _texts(concept: Concept) -> list[str]:
    """A pack's own texts, contrast pairs, training rows and retain texts in turn."""
    pairs = [text for pair in concept.contrast for text in (pair.positive, pair.negative)]
    trained = [_text_of(row) for row in concept.train]
    in_turn = chain.from_iterable(zip_longest(pairs, trained, (row.text for row in concept.retain)))
    return [text for text in dict.fromkeys(in_turn) if text and text.strip()]


def _rows(path: Path | None) -> list[str]:
    assert path is not None
    if not path.is_file():
        raise RequestError(f"{path} is no file; give a .jsonl file of texts")
    return [_text_of(row) for row in read_training(path)]


def _text_of(row: TrainingRow) -> str:
    return row.text or (row.prompt or "") + (row.completion or "") or "\n".join(m.content for m in row.messages)
