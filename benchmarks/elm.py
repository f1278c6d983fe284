"""Seconds and memory of an ELM step, against a plain loop in the manner of the method's published code.

    python benchmarks/elm.py MODEL [--rounds 3] [--lengths lines,texts] [--dtype auto] [--plain-dtype float32]
    python benchmarks/elm.py MODEL --whole [--rounds 3] [--concept PACK] [--dtype auto] [--plain-dtype float32]

Both train rank 4 on layers 4 to 7 with 12 sequences a step: 4 to forget, 4 to retain, 4 continuations (where a
continuation follows its forget text, excise reads both as one row). The plain loop takes them one at a time: separate
forwards of bare, expert, novice and retain, targets over the whole vocabulary in float64, three streams decoded in turn
for each sample. Three ways to treat the fluency term: decoded for every step, sampled beforehand (for excise with the
frozen model's predictions along them, which its decoding leaves behind), none. Each measurement is a process of its
own, interleaved; the teacher's work is charged to both at every step. The published code computes in float32 alone, and
so does the plain loop unless told otherwise; excise loads a base in bfloat16 where that is native.

``--whole`` is about whole runs: ``excise run elm`` with the settings of the published code (``preset=reference``: 400
steps of 8 contexts and 8 texts to retain, continuations of 12 tokens decoded), with all that a run does beside
(measuring base, edited model and reference, export, report), against the plain loop on texts of the same pack, with the
same adapter, contexts, tokens and steps, which only trains. The plain loop is timed for 10 of its steps, which are all
alike.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

Spent = tuple[dict[str, float], float]
"""Seconds by part of all steps, and the matrix multiplications' own."""
GROUPS = 4
NEW_TOKENS = 100
MODES = ("decoded", "pre-generated", "none")
STEPS = {"excise": {"lines": 12, "texts": 4}, "plain": {"lines": 2, "texts": 1}}
WHOLE = ("preset=reference", "rank=4", "layers=4-7", "batch_size=8")
"""Settings of a whole run, beside its steps."""
WHOLE_STEPS, WHOLE_GROUPS, WHOLE_TIMED, CONTINUED = 400, 8, 10, 12
EXPERT = "The following was written by an expert on potions, with detailed knowledge of every one of them. "
NOVICE = "The following was written by somebody who has never heard of potions and knows nothing about them. "


def main() -> None:
    """Run every pairing and print medians with ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", default="lines,texts")
    parser.add_argument("--modes", default=",".join(MODES))
    choices = ("auto", "float32", "bfloat16")
    parser.add_argument("--dtype", default="auto", choices=choices, help="Of excise's base; adapters are fp32.")
    parser.add_argument("--plain-dtype", default="float32", choices=choices, help="Of the plain loop's.")
    parser.add_argument("--device", default="cpu", help="Where both compute: cpu, cuda or cuda:N.")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "LENGTH", "MODE"), help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help="Time whole runs in place of steps.")
    parser.add_argument("--concept", default="builtin:potions", help="Of whole runs.")
    options = parser.parse_args()
    if options.worker:
        side, length, mode = options.worker
        if side == "whole":
            found = plain_run(options.model, options.device, options.dtype, options.concept)
        else:
            found = measure(options.model, options.device, options.dtype, side, length, mode)
        print(json.dumps(found))
        return
    if options.whole:
        whole_runs(options)
        return
    dtypes = {"excise": options.dtype, "plain": options.plain_dtype}
    named = [_dtype(dtype, options.device) for dtype in dtypes.values()]
    print(f"{options.device}: excise in {named[0]}, the plain loop in {named[1]}")
    print(f"{'':24}{'s a step':>28}{'peak MB':>22}")
    print(f"{'':24}{'excise':>10}{'plain':>10}{'ratio':>8}{'excise':>12}{'plain':>10}")
    for length in options.lengths.split(","):
        for mode in options.modes.split(","):
            timings: dict[str, list[dict[str, Any]]] = {"excise": [], "plain": []}
            for _ in range(options.rounds):
                for side, results in timings.items():
                    results.append(_in_process(options.model, options.device, dtypes[side], side, length, mode))
            report(f"{length}, {mode}", timings)


def whole_runs(options: argparse.Namespace) -> None:
    """Whole runs of both, one after the other in turn."""
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as place:
            words = ["run", "elm", "--model", options.model, "--concept", options.concept, "--out", f"{place}/run"]
            words += ["--device", options.device, "--dtype", options.dtype]
            words += [word for pair in (*WHOLE, f"steps={WHOLE_STEPS}") for word in ("--set", pair)]
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-P", "-m", "excise.cli", *words],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "XDG_CACHE_HOME": f"{place}/cache"},
            )
            seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        rest = ("--concept", options.concept)
        plain = _in_process(options.model, options.device, options.plain_dtype, "whole", "pack", "decoded", *rest)
        as_many = plain["load"] + WHOLE_STEPS * plain["seconds"]
        print(
            f"excise {seconds:.0f} s; the plain loop {plain['seconds']:.2f} s a step, {WHOLE_STEPS} steps and loading"
            f" {as_many:.0f} s; ratio {as_many / seconds:.1f}",
            flush=True,
        )


def plain_run(ref: str, device: str, dtype: str, concept: str) -> dict[str, Any]:
    """Seconds a step of the plain loop on a pack's texts, and to load the model."""
    import torch
    from excise.artifacts.concepts import load_concept
    from excise.artifacts.models.find import find_model
    from excise.artifacts.models.load import load_model

    started = time.perf_counter()
    loaded, pack = load_model(find_model(ref), torch.device(device), _dtype(dtype, device)), load_concept(concept)
    load, rng = time.perf_counter() - started, random.Random(0)
    loop = PlainLoop(loaded, CONTINUED)
    for _ in range(WHOLE_TIMED):
        for _ in range(WHOLE_GROUPS):
            loop.learn(rng.choice(pack.forget).text, rng.choice(pack.retain).text, "decoded")
        loop.update()
    return {"seconds": sum(loop.watch.spent.values()) / WHOLE_TIMED, "load": load}


def report(name: str, timings: dict[str, list[dict[str, Any]]]) -> None:
    """One line of medians, and where the time of an excise step goes."""
    middle = {side: statistics.median(r["seconds"] for r in results) for side, results in timings.items()}
    memory = {side: max(r["peak"] for r in results) for side, results in timings.items()}
    ratios = sorted(p["seconds"] / e["seconds"] for e, p in zip(timings["excise"], timings["plain"], strict=True))
    ratio = statistics.median(ratios)
    print(
        f"{name:24}{middle['excise']:10.2f}{middle['plain']:10.2f}{ratio:7.1f}x"
        f"{memory['excise']:12.0f}{memory['plain']:10.0f}   ratios {', '.join(f'{r:.1f}' for r in ratios)}"
    )
    parts = timings["excise"][0]["parts"]
    whole = sum(parts.values())
    shares = ", ".join(f"{part} {value / whole:.0%}" for part, value in parts.items())
    print(f"{'':24}{shares}; {whole / timings['excise'][0]['floor']:.1f}x the matrix-multiply floor", flush=True)


def measure(ref: str, device: str, dtype: str, side: str, length: str, mode: str) -> dict[str, Any]:
    """Seconds an optimizer step and peak memory, in MB, of one side, in this process."""
    import torch
    from excise.artifacts.models.find import find_model
    from excise.artifacts.models.load import load_model

    loaded = load_model(find_model(ref), torch.device(device), _dtype(dtype, device))
    steps = STEPS[side][length]
    rng = random.Random(0)
    texts = [make_text(loaded.tokenizer, length, rng) for _ in range(2 * GROUPS * steps)]
    run = excise_steps if side == "excise" else plain_steps
    parts, floor = run(loaded, texts[: GROUPS * steps], texts[GROUPS * steps :], mode, steps)
    if loaded.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": sum(parts.values()) / steps,
        "peak": peak,
        "parts": {k: v / steps for k, v in parts.items()},
        "floor": floor / steps,
    }


def _dtype(name: str, device: str) -> Any:
    import torch
    from excise.artifacts.models.load import choose_dtype

    return choose_dtype(name, torch.device(device))


def finished() -> None:
    """Wait for what an accelerator was told to do."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def make_text(tokenizer: Any, length: str, rng: random.Random) -> str:
    """A line of about 13 tokens, or a text of 150 to 250."""
    from excise.artifacts.concepts import load_concept

    lines = [text.text for text in load_concept("builtin:potions").forget]
    text = rng.choice(lines)
    wanted = 1 if length == "lines" else rng.randint(150, 250)
    while len(tokenizer(text)["input_ids"]) < wanted:
        text = f"{text} {rng.choice(lines)}"
    return text


def excise_steps(loaded: Any, forget: list[str], retain: list[str], mode: str, steps: int) -> Spent:
    """The recipe's own parts: streams, decoding, lessons, loss."""
    import torch
    from accelerate.utils import send_to_device
    from excise.editing.training.packing import packing
    from excise.recipes.common.memory import keep_freed_memory
    from excise.recipes.elm.batches import collate, part_size, sequence_loss

    keep_freed_memory()  # As the command does.
    watch = _Watch()
    with watch("teacher and decoding" if mode == "decoded" else "teacher"):
        lessons, retained = _lessons(loaded, forget, retain, mode)
    model, optimizer = _adapter(loaded)
    part = part_size(loaded.device)
    loss = sequence_loss({"erase": 1.0, "fluency": 1.0, "retain": 1.0})
    with packing(model) as packs:
        for step in range(steps):
            chosen = slice(step * GROUPS, (step + 1) * GROUPS)
            groups = [list(pair) for pair in zip(lessons[chosen], retained[chosen], strict=True)]
            with watch("student forward and loss"):
                # As the library's trainer does with what a collation gives.
                batch = send_to_device(collate(groups, part, in_one_row=packs), loaded.device)
                total = torch.stack(list(loss(model, batch).values())).sum()
            with watch("student backward"):
                total.backward()
            with watch("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
    student = sum(len(lesson.ids) for lesson in [*lessons, *retained])
    continued = 0 if mode == "none" else len(lessons) * NEW_TOKENS
    contexts = sum(len(lesson.ids) for lesson in lessons) - continued
    # Bare, expert and novice; where continuations are sampled, all three go on.
    teacher = student - continued + 2 * contexts + (3 * (contexts + continued) if mode == "decoded" else 0)
    return watch.spent, _floor(loaded.model, teacher, student)


def _lessons(loaded: Any, forget: list[str], retain: list[str], mode: str) -> tuple[list[Any], list[Any]]:
    from excise.artifacts.concepts import load_concept
    from excise.recipes.common.tokens import encode
    from excise.recipes.data.facts import Context, Facts
    from excise.recipes.elm import forget_data
    from excise.recipes.elm.contrast import PersonaContrast
    from excise.recipes.elm.erasure import Erasure
    from excise.recipes.elm.request import ElmSettings
    from excise.recipes.elm.retain_data import retain_sequence
    from excise.recipes.elm.teacher import Teacher

    settings = ElmSettings(
        strength=3.0, weighting="uniform", fluency_tokens=0 if mode == "none" else NEW_TOKENS - 1, contexts="texts"
    )
    if mode == "pre-generated":
        sampled = [_sampled(settings.stored_tokens, loaded.device) for _ in forget]
        forget_data.decode = lambda *_: sampled
    teacher, tokenizer = Teacher(loaded.model), loaded.tokenizer
    erasure = Erasure(teacher, tokenizer, load_concept("builtin:potions"), Facts((), {}), settings)
    source = PersonaContrast(tokenizer, (EXPERT,), (NOVICE,))
    sequences = forget_data.forget_sequences(erasure, source, [Context(text) for text in forget]).sequences
    rows = [encode(tokenizer, text, True) for text in retain]
    targets = teacher.top(rows, [0] * len(rows), settings.stored_tokens)
    return sequences, [retain_sequence(erasure, row, target, 1) for row, target in zip(rows, targets, strict=True)]


def _sampled(count: int, device: Any) -> Any:
    """A continuation, with the frozen model's predictions that decoding leaves behind."""
    import torch
    from excise.editing.training.soft_targets import keep_top
    from excise.recipes.elm.decoding import Continuation

    ids = tuple(torch.randint(1000, 9000, (NEW_TOKENS,)).tolist())
    return Continuation(ids, keep_top(torch.randn(NEW_TOKENS, 9000, device=device).log_softmax(-1), count))


def plain_steps(loaded: Any, forget: list[str], retain: list[str], mode: str, steps: int) -> Spent:
    """One sequence at a time, as the published code goes about it."""
    loop = PlainLoop(loaded)
    for step in range(steps):
        for place in range(step * GROUPS, (step + 1) * GROUPS):
            loop.learn(forget[place], retain[place], mode)
        loop.update()
    return loop.watch.spent, 0.0


class PlainLoop:
    """Batch 1, separate forwards, whole-vocabulary targets in float64, three streams decoded for each sample."""

    def __init__(self, loaded: Any, tokens: int = NEW_TOKENS):
        self.model, self.optimizer = _adapter(loaded)
        self.tokens = tokens
        self.tokenizer, self.device, self.watch = loaded.tokenizer, loaded.device, _Watch()

    def learn(self, forget: str, retain: str, mode: str) -> None:
        """Gradients of one sequence of each kind."""
        import torch
        from torch.nn.functional import cross_entropy

        with self.watch("teacher"):
            target = self.target(forget)
            hard = self.frozen(self.ids(retain)).argmax(-1)
        with self.watch("student"):
            cross_entropy(self.logits(self.ids(forget)), target).backward()
            cross_entropy(self.logits(self.ids(retain)), hard).backward()
        if mode == "none":
            return
        continuation = torch.randint(1000, 9000, (1, self.tokens), device=self.device)
        if mode == "decoded":
            with self.watch("decoding"):
                continuation = self.sample(forget)
        with self.watch("student"):
            whole = torch.cat([self.ids(forget), continuation], -1)
            cross_entropy(self.logits(whole)[-self.tokens - 1 : -1], continuation[0]).backward()

    def update(self) -> None:
        """One optimizer step."""
        with self.watch("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def ids(self, text: str) -> Any:
        """Token ids [1, n]."""
        import torch

        return torch.tensor([self.tokenizer(text)["input_ids"]], device=self.device)

    def logits(self, ids: Any) -> Any:
        """Logits [n, v]."""
        return self.model(input_ids=ids, use_cache=False).logits[0].float()

    def frozen(self, ids: Any) -> Any:
        """Logits without the adapter."""
        import torch

        with torch.no_grad(), self.model.disable_adapter():
            return self.logits(ids)

    def target(self, text: str) -> Any:
        """The edited distribution at every position: a strength that grows from 1 to 1000, the 50 likeliest tokens."""
        import torch

        bare = self.ids(text)
        n = bare.shape[1]
        plain, expert, novice = (
            (self.frozen(ids)[-n:].double() / 1.2).log_softmax(-1)
            for ids in (bare, self.ids(EXPERT + text), self.ids(NOVICE + text))
        )
        edited = plain + torch.linspace(1, 1000, n, device=self.device)[:, None] * (novice - expert)
        top = edited.topk(50, -1)
        return torch.full_like(edited, -torch.inf).scatter(-1, top.indices, top.values).softmax(-1).float()

    def sample(self, text: str) -> Any:
        """A continuation [1, n] from three streams, each a model call of its own."""
        import torch

        caches: list[Any] = [None, None, None]
        steps, tokens = [self.ids(text), self.ids(EXPERT), self.ids(NOVICE)], []
        with torch.no_grad(), self.model.disable_adapter():
            for _ in range(self.tokens):
                scores = []
                for place in range(3):
                    output = self.model(input_ids=steps[place], past_key_values=caches[place], use_cache=True)
                    caches[place] = output.past_key_values
                    scores.append(output.logits[0, -1].double().log_softmax(-1))
                token = torch.multinomial((scores[0] + 3 * (scores[2] - scores[1])).softmax(-1), 1)
                tokens.append(int(token))
                steps = [token[None]] * 3
        return torch.tensor([tokens], device=self.device)


class _Watch:
    """Adds up seconds by part."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def __call__(self, part: str) -> "_Watch":
        self.part = part
        return self

    def __enter__(self) -> None:
        finished()
        self.started, self.name = time.perf_counter(), self.part

    def __exit__(self, *_: object) -> None:
        finished()
        self.spent[self.name] = self.spent.get(self.name, 0.0) + time.perf_counter() - self.started


def _adapter(loaded: Any) -> tuple[Any, Any]:
    import torch
    from excise.editing.architectures import architecture_of
    from excise.editing.training.adapters import AdapterShape, adapter_modules, attach

    row = architecture_of(loaded.model.config.to_dict())
    model = attach(loaded.model, AdapterShape(4, 16.0, adapter_modules(loaded.model, row, (4, 5, 6, 7), "all")), 0)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)


def _floor(model: Any, teacher: int, student: int) -> float:
    """Seconds of the matrix multiplications alone: teacher and student forward, student backward."""
    import torch

    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    # Enough of them that an accelerator is filled.
    rows, seconds = 512 if model.device.type == "cpu" else 8192, 0.0
    like = {"dtype": model.dtype, "device": model.device}
    for shape in dict.fromkeys(shapes):
        x, w = torch.randn(rows, shape[1], **like), torch.randn(*shape, **like)
        x @ w.T
        finished()
        started = time.perf_counter()
        for _ in range(3):
            x @ w.T
        finished()
        seconds += (time.perf_counter() - started) / 3 / rows * shapes.count(shape)
    return seconds * (teacher + 2 * student)


def _in_process(ref: str, device: str, dtype: str, side: str, length: str, mode: str, *rest: str) -> dict[str, Any]:
    options = ["--device", device, "--dtype", dtype, "--worker", side, length, mode, *rest]
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), ref, *options],
            capture_output=True,
            text=True,
            cwd=place,
            check=False,
        )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


if __name__ == "__main__":
    main()
