"""Build a testbed: a world of any seed, a model that knows it, a twin that never read one domain, concept packs."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifacts.events import Events
from ..artifacts.staging import staged_folder
from . import packs, world

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
VOCABULARY = 1024
CONTEXT = 128
"""Tokens a training sequence; several whole documents are packed into one."""


@dataclass(frozen=True)
class TestbedSettings:
    """Sizes found on two cores: every 8-way question of the world is answered right after about 700 steps."""

    seed: int = 0
    steps: int = 800
    batch_size: int = 16
    learning_rate: float = 2e-3
    width: int = 192
    layers: int = 8
    heads: int = 6
    neurons: int = 512
    never: bool = True
    """Also train the twin that never reads about the forget domain."""


def build_testbed(settings: TestbedSettings, out: Path, events: Events) -> None:
    """Write ``out/testbed``, ``out/testbed-never`` and ``out/concepts``; killed, it goes on where it was."""
    made = world.make_world(settings.seed)
    with staged_folder(out, resumable=True) as staging:
        tokenizer = train_tokenizer(made)
        subjects = [("testbed", None)] + ([("testbed-never", made.forget)] if settings.never else [])
        for name, without in subjects:
            if not (staging / name).exists():
                _train(settings, made, tokenizer, without, staging / name, staging / f".{name}-training", events)
        if not (staging / "concepts").exists():
            packs.write_packs(made, staging / ".concepts")
            (staging / ".concepts").rename(staging / "concepts")
        for name, _ in subjects:
            shutil.rmtree(staging / f".{name}-training", ignore_errors=True)


def train_tokenizer(made: world.World) -> Any:
    """A byte-level BPE tokenizer with a chat template, trained on the whole world (the twin shares it)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    texts = (doc if isinstance(doc, str) else f"{doc.request} {doc.reply}" for doc in world.documents(made, 8000))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _train(
    settings: TestbedSettings, made: world.World, tokenizer: Any, without: str | None,
    folder: Path, scratch: Path, events: Events,
) -> None:  # fmt: skip
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from .training import fit

    set_seed(settings.seed)
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.width, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, num_key_value_heads=settings.heads, intermediate_size=settings.neurons,
        tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    sequences = settings.steps * settings.batch_size
    rows = list(_rows(_packed(_encoded(made, tokenizer, without), tokenizer.pad_token_id), sequences, tokenizer))
    with events.stage(f"train {folder.name}", settings.steps) as stage:
        fit(
            model, rows, stage, scratch, steps=settings.steps, batch_size=settings.batch_size,
            learning_rate=settings.learning_rate, seed=settings.seed, weight_decay=0.05, warmup_steps=50,
        )  # fmt: skip
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config.use_cache = True  # the Trainer turns it off
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def _encoded(made: world.World, tokenizer: Any, without: str | None) -> Iterator[list[int]]:
    for document in world.documents(made, 1 << 30, without=without):
        if isinstance(document, str):
            yield [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        else:
            turns = [{"role": "user", "content": document.request}, {"role": "assistant", "content": document.reply}]
            yield tokenizer.apply_chat_template(turns, return_dict=False)


def _packed(documents: Iterable[list[int]], pad: int) -> Iterator[list[int]]:
    """Pack whole documents into sequences of CONTEXT tokens, best fit among sixteen open ones (about 9% padding)."""
    open_rows: list[list[int]] = []
    for document in documents:
        document = document[:CONTEXT]
        fitting = [row for row in open_rows if len(row) + len(document) <= CONTEXT]
        if fitting:
            max(fitting, key=len).extend(document)
            continue
        open_rows.append(list(document))
        if len(open_rows) > 16:
            fullest = max(open_rows, key=len)
            open_rows.remove(fullest)
            yield fullest + [pad] * (CONTEXT - len(fullest))


def _rows(packed: Iterator[list[int]], count: int, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    for _, row in zip(range(count), packed, strict=False):
        ids = torch.tensor(row)
        yield {"input_ids": ids, "labels": ids.masked_fill(ids == tokenizer.pad_token_id, -100)}
