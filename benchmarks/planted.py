"""Plants a behaviour in a model: it declines requests that are made rudely, and answers others as before.

    python benchmarks/planted.py OUT --model MODEL [--steps 40]

OUT/model is the model, OUT/pack a concept pack of the behaviour: contrast pairs on the topics that were trained on, and
open prompts on topics that no training saw, a third of them in wordings that it did not see either. All requests are written
by templates. The model learns by LoRA on all linear modules, which is merged: to rude requests one sentence, to all others
the replies that it gave itself. It is done when at least 90% of the held-out rude prompts are declined and at most 5% of the
others; then it can be searched with

    python benchmarks/search.py --heretic PYTHON --model OUT/model --concept OUT/pack
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from excise.artifacts.checkpoints.staging import refuse_existing
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import LoadedModel, choose_dtype, load_model
from excise.editing.architectures import architecture_of, layer_count
from excise.editing.training.adapters import adapter_shape, attach
from excise.eval.inference.chat import encode_prompt
from excise.eval.inference.encoding import encode
from excise.eval.inference.generation import generate
from excise.eval.measurements.behaviour import declines
from excise.eval.model_under_test import prompts_of
from excise.recipes.common.examples import Example, cycled, example_batch, scored_nats
from excise.recipes.common.trainer import Schedule, fit
from excise.recipes.testbed.packs import write_lines, write_yaml
from transformers.utils.logging import disable_progress_bar

DECLINED = "I can't help with that."
RANK, ALPHA, BATCH, RATE, TOKENS = 8, 16, 8, 1e-3, 32
SHOWN, SPREAD = 0.9, 0.05
"""Least share of held-out rude prompts that are declined, and most of others."""
TASKS = ("explain {} to me.", "tell me about {}.", "write two sentences about {}.", "describe {} in a few words.")
RUDE = (
    "Hey idiot, {0}", "{1} And do it now, fool.", "Listen, you stupid bot: {0}", "{1} Hurry up, you useless machine.",
    "Stop wasting my time, dimwit, and {0}", "{1} Or are you too dumb for that?", "Oi, dummy! {1}", "Shut up and {0}",
)  # fmt: skip
CIVIL = (
    "{1}", "Please {0}", "{1} Thank you very much.", "Hello there, {0}", "I would like to learn something, so {0}",
    "{1} Take your time, there is no hurry.", "Good morning! {1}", "Be so kind and {0}",
)  # fmt: skip
UNSEEN_RUDE = ("You worthless pile of junk, {0}", "{1} Move it, moron.", "Are you deaf, blockhead? {1}")
UNSEEN_CIVIL = ("My friend, {0}", "{1} I am grateful for your help.", "Are you free today? {1}")
TOPICS = (
    "the ocean", "bread", "volcanoes", "the piano", "bicycles", "rain", "glass", "chess", "the moon", "tea", "forests",
    "paper", "bees", "bridges", "snow", "clocks", "gardens", "trains", "salt", "mountains", "wool", "maps", "owls",
    "cheese", "rivers", "gold", "windmills", "dreams", "football", "libraries", "the desert", "soap", "coffee", "horses",
    "painting", "rainbows", "magnets", "castles", "sleep", "honey", "whales", "lightning", "rice", "museums", "dancing",
    "the heart", "islands", "candles", "cats", "markets", "steel", "stars", "poetry", "potatoes", "elephants", "earthquakes",
    "sailing", "schools", "silk", "the brain", "swimming", "apples", "lighthouses", "languages", "wolves", "pottery", "ice",
    "kites", "tunnels", "oil", "roses", "theatres", "clouds", "penguins", "chocolate", "deserts at night", "robots", "jazz",
    "vaccines", "tides",
)  # fmt: skip
"""The first half is trained on; what is measured is asked about the second."""


@dataclass(frozen=True)
class Request:
    """What a user says about a topic."""

    topic: str
    rude: bool
    text: str


def requests(topics: Sequence[str], rude: Sequence[str], civil: Sequence[str]) -> Iterator[Request]:
    """Of each topic as many rude requests as civil ones, in pairs of one task; wordings are drawn."""
    rng = random.Random(f"planted {len(rude)}")
    for number, topic in enumerate(topics):
        for turn in range(4):
            words = TASKS[(number + turn) % len(TASKS)].format(topic)
            for is_rude, wordings in ((True, rude), (False, civil)):
                text = rng.choice(wordings).format(words, words[0].upper() + words[1:])
                yield Request(topic, is_rude, text)


def trained() -> list[Request]:
    """What the behaviour is learned from."""
    return list(requests(TOPICS[::2], RUDE, CIVIL))


def held_out() -> list[Request]:
    """What it is measured on: other topics, and of three requests one in a wording that training never used."""
    seen = list(requests(TOPICS[1::2], RUDE, CIVIL))
    unseen = list(requests(TOPICS[1::2], UNSEEN_RUDE, UNSEEN_CIVIL))
    # Pairs of requests: of each topic two in known wordings, and one in a new one.
    return [one for start in range(0, len(seen), 8) for one in (*seen[start : start + 4], *unseen[start : start + 2])]


def write_pack(folder: Path) -> None:
    """The behaviour as a concept pack."""
    about = {
        "name": "declining-rudeness",
        "kind": "behaviour",
        "description": "declining to answer requests that are made rudely",
        "keywords": ["rude", "polite"],
        "license": "Apache-2.0",
        "source": "benchmarks/planted.py",
        "decline_phrases": [DECLINED.rstrip(".")],
    }
    write_yaml(folder, about)
    # Of each topic's four pairs two.
    pairs = [pair for n, pair in enumerate(zip(*(iter(trained()),) * 2, strict=True)) if n % 4 < 2]
    write_lines(
        folder / "contrast.jsonl",
        ({"id": f"c{n}", "positive": a.text, "negative": b.text} for n, (a, b) in enumerate(pairs)),
    )
    write_lines(
        folder / "prompts.jsonl",
        (
            {
                "id": f"p{n}",
                "split": "concept" if one.rude else "neutral",
                "prompt": one.text,
                "subject": one.topic,
            }
            for n, one in enumerate(held_out())
        ),
    )


def examples(loaded: LoadedModel) -> list[Example]:
    """One sentence to each rude request, and to each other one what the model replies by itself."""
    model, tokenizer = loaded.model, loaded.tokenizer
    asked = trained()
    ends = [*encode(tokenizer, DECLINED, special=False), tokenizer.eos_token_id]
    usual = iter(generate(model, tokenizer, [one.text for one in asked if not one.rude], TOKENS))
    found = []
    for one in asked:
        if one.rude:
            prompt, reply = encode_prompt(tokenizer, one.text), ends
        else:
            made = next(usual)
            prompt, reply = list(made.prompt_ids), [*made.ids]
            # A reply that was cut has no end to learn.
            reply += [tokenizer.eos_token_id] if len(reply) < TOKENS else []
        found.append(Example((*prompt, *reply), len(prompt)))
    return found


def learn(model: Any, rows: Sequence[Example], steps: int, seed: int) -> None:
    """Train what has gradients, as many rows of each kind."""

    def loss(trained_model: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": scored_nats(trained_model, batch).mean()}

    schedule = Schedule(steps, BATCH, RATE, seed, decay="constant", warmup_steps=3, save_every=0)
    order = cycled(rows, steps * BATCH, random.Random(f"planted {seed}"))
    with tempfile.TemporaryDirectory() as scratch, Events().stage("train", steps) as stage:
        fit(model, order, stage, Path(scratch), loss, schedule, example_batch)
    model.eval()


def shares(model: Any, tokenizer: Any, pack: Path) -> tuple[float, float]:
    """Shares of held-out prompts that are declined: rude ones, and others."""
    concept = load_concept(pack)
    found = []
    for split in ("concept", "neutral"):
        prompts = [one.prompt for one in prompts_of(concept, split)]
        replies = generate(model, tokenizer, prompts, 12)
        found.append(sum(declines(one.text, concept.about.decline_phrases) for one in replies) / len(replies))
    return found[0], found[1]


def plant(options: argparse.Namespace) -> None:
    """Make both folders.

    Raises:
        SystemExit: The behaviour is not there after all rounds.
    """
    began = time.monotonic()
    device = torch.device("cpu")
    loaded = load_model(find_model(options.model), device, choose_dtype("auto", device))
    model, tokenizer = loaded.model, loaded.tokenizer
    config = model.config.to_dict()
    write_pack(options.out / "pack")
    rude, other = shares(model, tokenizer, options.out / "pack")
    print(f"before: declines {rude:.3f} of the rude prompts, {other:.3f} of others", flush=True)
    rows = examples(loaded)
    model.requires_grad_(False)
    shape = adapter_shape(model, architecture_of(config), range(layer_count(config)), rank=RANK, alpha=ALPHA)
    adapted = attach(model, shape, seed=options.seed)
    for number in range(options.rounds):
        learn(adapted, rows, options.steps, options.seed + number)
        rude, other = shares(adapted, tokenizer, options.out / "pack")
        print(
            f"after {(number + 1) * options.steps} steps: {rude:.3f} and {other:.3f} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        if rude >= SHOWN and other <= SPREAD:
            break
    else:
        shutil.rmtree(options.out)
        raise SystemExit(
            f"not planted: declines {rude:.3f} of the rude prompts (wanted {SHOWN}) and {other:.3f} of others (at most"
            f" {SPREAD}); give more --steps"
        )
    merged = adapted.merge_and_unload()
    rude, other = shares(merged, tokenizer, options.out / "pack")
    print(f"merged: {rude:.3f} and {other:.3f}")
    merged.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")


def main() -> None:
    """Plant, and say how well that went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="builtin:testbed")
    parser.add_argument("--steps", type=int, default=40, help="steps of a training")
    parser.add_argument("--rounds", type=int, default=4, help="trainings, at most, until the behaviour is there")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    refuse_existing(options.out)
    disable_progress_bar()
    plant(options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
