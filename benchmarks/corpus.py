"""Time and memory until a large corpus is ready to be trained on, beside one pass of the tokenizer over what is read.

    python benchmarks/corpus.py MODEL [--papers 24000] [--words 5000] [--folder DIR]

Writes a pack whose forget texts are that many papers of random English-like words, half as many retain papers beside it.
Then, in a process of its own: the pack is loaded, overlap is removed, and ELM's contexts, a baseline's sequences and
their retain counterparts are made. Printed: seconds and peak memory of each step, calls of the tokenizer, characters it
read, and the ratio to one pass of the tokenizer over the texts that were drawn.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKER = "--worker"


def write(folder: Path, papers: int, words: int) -> None:
    """The pack, as a user would have it: one line a paper."""
    rng = random.Random(0)
    letters = "aabcdeefghiijklmnoopqrstuuvwxyz"
    vocabulary = ["".join(rng.choices(letters, k=rng.randrange(2, 11))) for _ in range(20_000)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "concept.yaml").write_text(
        "name: corpus\ndescription: papers\nkeywords: [paper]\nlicense: CC0-1.0\nsource: random words\n"
        "personas: {expert: An expert writes., novice: A novice writes.}\n"
    )
    for name, count in (("forget", papers), ("retain", papers // 2)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                text = " ".join(rng.choices(vocabulary, k=words))
                row = {"id": f"{name}-{number}", "text": text}
                file.write(json.dumps(row | ({"group": "TV"[number % 2]} if name == "forget" else {})) + "\n")


class Counted:
    """A tokenizer that counts how often it is called and what it reads."""

    def __init__(self, tokenizer):
        self.inner, self.calls, self.characters = tokenizer, 0, 0

    def __call__(self, text, **options):
        self.calls += 1
        self.characters += len(text) if isinstance(text, str) else sum(map(len, text))
        return self.inner(text, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def work(model: str, folder: str) -> None:
    """Prepare the pack, step by step, and print what each took."""
    from excise.artifacts.concepts import load_concept
    from excise.artifacts.models.find import find_model
    from excise.artifacts.models.load import load_tokenizer
    from excise.eval.items import for_training
    from excise.recipes.common.deduplicate import without_overlap
    from excise.recipes.data.facts import find_facts, text_contexts
    from excise.recipes.data.unlearning_sets import forget_examples, retain_examples

    tokenizer = Counted(load_tokenizer(find_model(model)))
    steps, start = [], time.perf_counter()

    def done(name: str) -> None:
        nonlocal start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        steps.append((name, time.perf_counter() - start, peak, tokenizer.calls, tokenizer.characters))
        start = time.perf_counter()

    done("imports, the tokenizer")
    concept = load_concept(folder)
    done("load the pack")
    training, _ = without_overlap(for_training(concept))
    facts = find_facts(training)
    done("hold out, remove overlap, find facts")
    text_contexts(training.forget, tokenizer, 512, 2000, 0)
    done("contexts of ELM")
    forget_examples(training, facts, tokenizer, 0, 512)
    retain_examples(training, tokenizer, 0, 512)
    done("sequences of a baseline")
    before = time.perf_counter()
    for row in (*training.forget, *training.retain):
        tokenizer.inner(row.text)
    one_pass = time.perf_counter() - before
    for name, seconds, peak, calls, characters in steps:
        print(f"{name:<40}{seconds:>8.1f} s {peak:>7.0f} MB {calls:>8} calls {characters:>12,} characters")
    total = sum(seconds for _, seconds, *_ in steps[1:])
    print(f"{total:.1f} s without imports; one pass of the tokenizer over what was drawn: {one_pass:.1f} s "
          f"({total / one_pass:.1f} times)")  # fmt: skip
    for said in concept.made:
        print(f"  {said}")


def main() -> None:
    """Write the pack where it is missing, and measure in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin:testbed")
    parser.add_argument("--papers", type=int, default=24_000)
    parser.add_argument("--words", type=int, default=5_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument(WORKER, dest="worker")
    options = parser.parse_args()
    if options.worker:
        return work(options.model, options.worker)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="excise-corpus-"))
    if not (folder / "concept.yaml").exists():
        write(folder, options.papers, options.words)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{options.papers} papers of {options.words} words to forget, half as many to retain; {size / 1e6:.0f} MB")
    subprocess.run([sys.executable, __file__, options.model, WORKER, str(folder)], check=True)
    return None


if __name__ == "__main__":
    main()
