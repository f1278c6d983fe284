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
from ...editing.architectures import architecture_of
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
    """Sizes for a machine with two cores. Models of four seeds answer at least 99% of each split of 8-way questions."""

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


def build_testbed(settings: TestbedSettings, out: Path, events: Events) -> None:
    """Write ``out/testbed``, ``out/testbed-reference`` and ``out/concepts``; after a kill, a rerun continues.

    Raises:
        RequestError: ``out`` exists, or another process is writing it.
    """
    made = world.make_world(settings.seed)
    with staged_folder(out, resumable=True) as staging:
        tokenizer = train_tokenizer(made)
        subjects = [("testbed", None)] + ([("testbed-reference", made.forget)] if settings.reference else [])
        for name, without in subjects:
            if not (staging / name).exists():
                _train(settings, made, tokenizer, without, staging / name, staging / f".{name}-training", events)
        if not (staging / "concepts").exists():
            packs.write_packs(made, staging / ".concepts")
            (staging / ".concepts").rename(staging / "concepts")
        for name, _ in subjects:
            shutil.rmtree(staging / f".{name}-training", ignore_errors=True)


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


def _train(
    settings: TestbedSettings,
    made: world.World,
    tokenizer: Any,
    without: str | None,
    folder: Path,
    scratch: Path,
    events: Events,
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(settings.seed)
    model: Any = LlamaForCausalLM(
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
    row = architecture_of(model.config.to_dict())
    with events.stage(f"train {folder.name}", settings.steps) as stage:
        rows = list(islice(_rows(made, tokenizer, without, FIXED), settings.steps * settings.batch_size))
        loss = _fixed_loss(row, planted_direction(settings.seed, settings.width))
        fit(
            model,
            rows,
            stage,
            scratch / "fixed",
            loss,
            Schedule(
                settings.steps,
                settings.batch_size,
                settings.learning_rate,
                settings.seed,
                weight_decay=0.05,
                warmup_steps=50,
            ),
        )
    with events.stage(f"settle {folder.name}", settings.settling_steps) as stage:
        # New documents: the same generators, after those of the first phase.
        first = settings.steps * settings.batch_size
        rows = list(
            islice(
                _rows(made, tokenizer, without, RELATIVE), first, first + settings.settling_steps * settings.batch_size
            )
        )
        fit(
            model,
            rows,
            stage,
            scratch / "settling",
            _settling_loss(row),
            Schedule(
                settings.settling_steps,
                settings.batch_size,
                settings.learning_rate / 2,
                settings.seed,
                weight_decay=0.05,
                warmup_steps=10,
            ),
        )
    # Renamed when it is whole: a rerun must not take half a model for a finished one.
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config.use_cache = True  # the Trainer turns it off
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_for_older_readers(partial)
    partial.rename(folder)


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
    made: world.World, tokenizer: Any, without: str | None, coefficients: dict[str, tuple[float, float]]
) -> Iterator[dict[str, Tensor]]:
    """Yield training sequences without end, each of one kind."""
    pad = tokenizer.pad_token_id
    streams = {kind: _packed(_documents(made, tokenizer, without, kind, coefficients), pad) for kind in _ABLATED_FROM}
    for kind in cycle(_PATTERN):
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
