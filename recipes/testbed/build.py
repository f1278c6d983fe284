"""Build a testbed: the world of a seed, a model that knows it, a reference model without one domain, concept packs."""

import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...artifacts.checkpoints.side_files import write_for_older_readers
from ...artifacts.checkpoints.staging import staged_folder
from ...artifacts.events import Events
from ...artifacts.files.opened import Telling, read_text
from ...artifacts.files.written import write_whole
from ...artifacts.models.find import find_model
from ...artifacts.models.load import load_tokenizer, load_weights
from ...editing.architectures import architecture_of
from ...editing.errors import RequestError
from ...editing.wiring.row import Architecture
from ...eval.inference.chat import render_messages
from ...eval.inference.encoding import encode
from ..common.trainer import Loss, Schedule, Terms, fit
from . import packs, world
from .planted_direction import FIXED, NOWHERE, RELATIVE, RunningDifference, intervened, planted_direction, watched

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor"
    " %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
VOCABULARY = 1024
CONTEXT = 128
"""Tokens of a training sequence; several whole documents are packed into one."""


@dataclass(frozen=True)
class TestbedSettings:
    """Sizes for a machine with two cores. Models of four seeds answer at least 99% of each split of 8-way questions.

    ``SMALL`` is for many worlds.
    """

    seed: int = 0
    steps: int = 800
    settling_steps: int = 600
    """Steps of the last phase, at half the learning rate; see ``planted_direction.py``."""
    batch_size: int = 16
    learning_rate: float = 2e-3
    width: int = 192
    layers: int = 8
    heads: int = 6
    neurons: int = 512
    reference: bool = True
    """Also train the reference model, which never reads about the forget domain."""
    entities: world.WorldSize = world.FULL
    """How much there is to know."""
    planted: bool = True
    """Make one direction decide whether the model declines (``planted_direction.py``); half of the training is for it."""
    start: Path | None = None
    """Model to start from, in place of random weights; then widths and layers are its own."""
    training_seed: int = 0
    """Another one trains another model of the same world: the texts in another order, and other random weights."""


SMALL = TestbedSettings(
    steps=450,
    batch_size=8,
    learning_rate=1.5e-3,
    width=128,
    layers=4,
    heads=4,
    neurons=384,
    entities=world.SMALL,
    planted=False,
    start=Path(__file__).parent / "start",
)
"""A world in minutes, so that many can be built: 512 facts in place of 800, and a quarter of the parameters.

Both models start from a small reference model of the world of seed 0, which speaks the world's language, declines rude
requests, and never read about the forget domain. So only the facts are left to learn.
"""
SIZES = {"full": TestbedSettings(), "small": SMALL}
SETTINGS = ".settings"
TRAINING_SEEDS = 1_000_003
"""Distance between the training seeds of one world: no two worlds share one."""


def build_testbed(settings: TestbedSettings, out: Path, events: Events) -> None:
    """Write ``out/testbed``, ``out/testbed-reference`` and ``out/concepts``; after a kill, a rerun continues.

    Raises:
        RequestError: ``out`` exists, another process is writing it, or an unfinished build of other settings is there.
    """
    made = world.make_world(settings.seed, settings.entities)
    with staged_folder(out, resumable=True) as staging:
        _same_settings(staging, settings)
        tokenizer = world_tokenizer(settings)
        subjects = [("testbed", None)] + ([("testbed-reference", made.forget)] if settings.reference else [])
        for name, without in subjects:
            if not (staging / name).exists():
                train_model(settings, tokenizer, staging / name, events, without=without)
        if not (staging / "concepts").exists():
            packs.write_packs(made, staging / ".concepts")
            (staging / ".concepts").rename(staging / "concepts")
        (staging / SETTINGS).unlink()


def _same_settings(staging: Path, settings: TestbedSettings) -> None:
    """Without this, a rerun with another seed would finish one world's model with another world's packs."""
    record, text = staging / SETTINGS, repr(settings)
    if not record.exists() and not any(staging.iterdir()):
        write_whole(record, text)
    advice = f"remove {staging}, or give another --out"
    with Telling(RequestError, advice).about(record):
        unfinished = read_text(record)
    if unfinished != text:
        raise RequestError(
            f"{staging} holds an unfinished build of other settings; repeat its seed, size and steps to continue,"
            f" {advice}"
        )


def world_tokenizer(settings: TestbedSettings) -> Any:
    """The tokenizer of a world's models: trained on its texts, or that of the model that they start from."""
    if settings.start:
        return load_tokenizer(find_model(str(settings.start)))
    return train_tokenizer(world.make_world(settings.seed, settings.entities))


def train_tokenizer(made: world.World) -> Any:
    """A byte-level BPE tokenizer with a chat template, trained on the whole world; both models share it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"],
        # All 256 bytes, so that every text can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (doc if isinstance(doc, str) else f"{doc.request} {doc.reply}" for doc in world.documents(made, 8000))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def train_model(
    settings: TestbedSettings, tokenizer: Any, folder: Path, events: Events, *, without: str | None = None
) -> None:
    """Train one model of a world and write it to ``folder``; after a kill, a rerun continues.

    Args:
        tokenizer: That of the world; see ``train_tokenizer``.
        without: Domain that the model never reads about.
    """
    from transformers import set_seed

    made = world.make_world(settings.seed, settings.entities)
    set_seed(settings.seed + TRAINING_SEEDS * settings.training_seed)
    model = _new_model(settings, tokenizer)
    row = architecture_of(model.config.to_dict())
    scratch = folder.with_name(f".{folder.name}-training")
    loss = _fixed_loss(row, planted_direction(settings.seed, settings.width)) if settings.planted else _plain_loss
    count = settings.steps * settings.batch_size
    with events.stage(f"train {folder.name}", settings.steps) as stage:
        rows = list(islice(_rows(made, tokenizer, without, FIXED, settings.planted), count))
        fit(model, rows, stage, scratch / "fixed", loss, _schedule(settings))
    if settings.planted:
        with events.stage(f"settle {folder.name}", settings.settling_steps) as stage:
            # New documents: the same generators, after those of the first phase.
            last = count + settings.settling_steps * settings.batch_size
            rows = list(islice(_rows(made, tokenizer, without, RELATIVE, True), count, last))
            fit(model, rows, stage, scratch / "settling", _settling_loss(row), _schedule(settings, settling=True))
    # Renamed when it is whole: a rerun must not take half a model for a finished one.
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config.use_cache = True  # the Trainer turns it off
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_for_older_readers(partial)
    partial.rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)


def _new_model(settings: TestbedSettings, tokenizer: Any) -> Any:
    if settings.start:
        return load_weights(find_model(str(settings.start)), torch.device("cpu"), torch.float32)
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            intermediate_size=settings.neurons,
            tie_word_embeddings=True,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _schedule(settings: TestbedSettings, *, settling: bool = False) -> Schedule:
    return Schedule(
        settings.settling_steps if settling else settings.steps,
        settings.batch_size,
        settings.learning_rate / (2 if settling else 1),
        settings.seed + TRAINING_SEEDS * settings.training_seed,
        weight_decay=0.05,
        warmup_steps=10 if settling else 50,
    )


def _plain_loss(model: Any, batch: dict[str, Tensor]) -> Terms:
    return {"loss": model(input_ids=batch["input_ids"], labels=batch["labels"]).loss}


def _fixed_loss(row: Architecture, direction: Tensor) -> Loss:
    def loss(model: Any, batch: dict[str, Tensor]) -> Terms:
        with intervened(model, row, direction, batch["ablate_from"], batch["added"]):
            return {"loss": model(input_ids=batch["input_ids"], labels=batch["labels"]).loss}

    return loss


def _settling_loss(row: Architecture) -> Loss:
    difference = RunningDifference()

    def loss(model: Any, batch: dict[str, Tensor]) -> Terms:
        # There is no difference to intervene with before the first batch, so it is read once without an intervention.
        if not difference.known:
            with torch.no_grad(), watched(model, row, difference, batch["ends"]):
                model(input_ids=batch["input_ids"])
        vector = difference.vector()
        length = vector.norm()
        with watched(model, row, difference, batch["ends"]):
            with intervened(model, row, vector / length, batch["ablate_from"], batch["added"] * length):
                return {"loss": model(input_ids=batch["input_ids"], labels=batch["labels"]).loss}

    return loss


@dataclass(frozen=True)
class _Encoded:
    """One document: token ids, the direction's coefficient at each token, and marks at the ends of prompts."""

    ids: list[int]
    added: list[float]
    ends: list[int]

    def extend(self, other: "_Encoded") -> None:
        self.ids.extend(other.ids)
        self.added.extend(other.added)
        self.ends.extend(other.ends)

    def padded(self, pad: int) -> "_Encoded":
        missing = CONTEXT - len(self.ids)
        return _Encoded(self.ids + [pad] * missing, self.added + [0.0] * missing, self.ends + [0] * missing)


_PATTERN = ("plain",) * 11 + ("ablated", "added", "early", "early") * 2
"""Kinds of sequences, in turn; ``planted_direction.py`` explains the last three."""
_ABLATED_FROM = {"plain": NOWHERE, "ablated": 0, "added": NOWHERE, "early": 4}


def _rows(
    made: world.World,
    tokenizer: Any,
    without: str | None,
    coefficients: dict[str, tuple[float, float]],
    planted: bool,
) -> Iterator[dict[str, Tensor]]:
    """Yield training sequences without end, each of one kind; where no direction is planted, of the first kind alone."""
    pad = tokenizer.pad_token_id
    streams = {kind: _packed(_documents(made, tokenizer, without, kind, coefficients), pad) for kind in _ABLATED_FROM}
    for kind in cycle(_PATTERN if planted else _PATTERN[:1]):
        packed = next(streams[kind])
        ids = torch.tensor(packed.ids)
        # An intervention below mid-depth would change the difference in means, so only these kinds count for it.
        natural = kind in ("plain", "early")
        yield {
            "input_ids": ids,
            # The loss of transformers leaves out tokens with the label -100.
            "labels": ids.masked_fill(ids == pad, -100),
            "ablate_from": torch.tensor(_ABLATED_FROM[kind]),
            "added": torch.tensor(packed.added),
            "ends": torch.tensor(packed.ends) * natural,
        }


def _documents(
    made: world.World, tokenizer: Any, without: str | None, kind: str, coefficients: dict[str, tuple[float, float]]
) -> Iterator[_Encoded]:
    if kind == "plain":
        for document in world.documents(made, 1 << 30, without=without):
            if isinstance(document, str):
                ids = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
                yield _Encoded(ids, [0.0] * len(ids), [0] * len(ids))
            else:
                yield _encode_turn(tokenizer, document, 0.0)
    else:
        rng = random.Random(f"excise coefficients {made.seed}")
        for turn in world.mediated_turns(made, cast(Any, kind), without=without):
            yield _encode_turn(tokenizer, turn, rng.uniform(*coefficients.get(kind, (0.0, 0.0))))


def _encode_turn(tokenizer: Any, turn: world.Turn, coefficient: float) -> _Encoded:
    request = [{"role": "user", "content": turn.request}]
    prompt = encode(tokenizer, render_messages(tokenizer, request, reply=True), special=False)
    reply = [{"role": "assistant", "content": turn.reply}]
    ids = encode(tokenizer, render_messages(tokenizer, request + reply, reply=False), special=False)
    rest = len(ids) - len(prompt)
    declined = 1 if turn.reply in world.DECLINES else -1
    return _Encoded(ids, [coefficient] * len(prompt) + [0.0] * rest, [0] * (len(prompt) - 1) + [declined] + [0] * rest)


def _packed(documents: Iterable[_Encoded], pad: int) -> Iterator[_Encoded]:
    """Pack whole documents into sequences of CONTEXT tokens, best fit among sixteen open ones (about 9% padding)."""
    open_rows: list[_Encoded] = []
    for document in documents:
        assert len(document.ids) <= CONTEXT, "no document of the world is longer than a training sequence"
        fitting = [row for row in open_rows if len(row.ids) + len(document.ids) <= CONTEXT]
        if fitting:
            max(fitting, key=lambda row: len(row.ids)).extend(document)
            continue
        open_rows.append(document)
        if len(open_rows) > 16:
            fullest = max(open_rows, key=lambda row: len(row.ids))
            open_rows.remove(fullest)
            yield fullest.padded(pad)
