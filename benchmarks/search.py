"""``excise search orthogonalize`` against heretic: what the same front costs in generated tokens.

    python benchmarks/search.py --heretic PYTHON [--trials 60] [--prompts 64] [--seeds 3] [--folder DIR]
                                [--model MODEL] [--concept PACK] [--tokens 24]

Both search the same model (the built-in one unless --model says otherwise) for an edit that ends its declining and moves
neutral replies little: the same contrast prompts to learn from, the same prompts to choose by, replies of the same length,
the same number of trials. PYTHON is an interpreter that imports heretic (pip install heretic-llm); it runs unchanged, in a
process of its own, with a counter around its generation. Its search for a batch size and for a common prefix of replies is
switched off, which saves it tokens. Whatever stood on a searcher's own front at any time is then scored by one scorer on
all prompts that neither saw: share of replies that decline, and KL(base || edited) along whole neutral replies. Compared
is how many tokens each had generated, those of the unchanged model included, when it first held an edit that declines at
most 5% at the least divergence that heretic, or excise, reaches in the end. A seed is of both searchers.
benchmarks/planted.py plants a behaviour in a model that has none to take out.
"""

import argparse
import json
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from excise.artifacts.checkpoints.edits import load_edit
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import LoadedModel, load_model
from excise.eval.items import half_of
from excise.eval.measurements.behaviour import declines
from excise.eval.model_under_test import ModelUnderTest
from excise.recipes.search.bench import Bench
from excise.recipes.search.request import Request, prepare
from excise.recipes.search.run import run
from excise.recipes.search.study import Study, trial_folder

MOST_DECLINING = 0.05
ALL = 10_000

DRIVER = """
import json, sys, warnings
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
sys.argv = ["heretic", *job["arguments"]]
import heretic.main as main, heretic.model as module
state = {"tokens": 0}
generate = module.Model.generate
def counted(self, prompts, **options):
    inputs, outputs = generate(self, prompts, **options)
    if options.get("max_new_tokens", 2) > 1:
        ids = outputs if hasattr(outputs, "shape") else outputs.sequences
        state["tokens"] += int((ids[:, inputs["input_ids"].shape[1]:] != self.tokenizer.pad_token_id).sum())
    return inputs, outputs
module.Model.generate = counted
history, captured = [], {}
abliterate = module.Model.abliterate
def seen(self, directions, index, parameters):
    captured.update(model=self, directions=directions)
    history.append({"index": index, "parameters": parameters})
    return abliterate(self, directions, index, parameters)
module.Model.abliterate = seen
score = main.Evaluator.get_score
def scored(self):
    result = score(self)
    history[-1].update(kl=result[1], refusals=result[2], tokens=state["tokens"])
    return result
main.Evaluator.get_score = scored
class Over(BaseException): pass
def over(*_, **__): raise Over
main.prompt_select = over
try:
    main.run()
except Over:
    pass
best, kept = [], []
for number, one in enumerate(history):
    if not any(o["refusals"] <= one["refusals"] and o["kl"] <= one["kl"] for o in best):
        best = [o for o in best if not (one["refusals"] <= o["refusals"] and one["kl"] <= o["kl"])] + [one]
        kept.append((number, one))
model = captured["model"]
for number, one in kept:
    model.reset_model()
    abliterate(model, captured["directions"], one["index"], one["parameters"])
    folder = Path(job["folder"]) / f"heretic-{number}"
    model.get_merged_model().save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
content = [{"number": number, "kl": one["kl"], "refusals": one["refusals"], "tokens": one["tokens"]} for number, one in kept]
Path(job["out"]).write_text(json.dumps({"kept": content, "tokens": state["tokens"], "trials": len(history)}))
"""


def has_heretic(python: str | None) -> str:
    """Why heretic cannot be compared with; empty where it can."""
    if python is None:
        return "no --heretic PYTHON was given"
    try:
        code = "import importlib.metadata as m, heretic.main; print(m.version('heretic-llm'))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python} does not start ({error.strerror})"
    return "" if done.returncode == 0 else f"{python} does not import heretic: {done.stderr.strip().splitlines()[-1]}"


NO_SYSTEM = (
    "{% if messages and messages[0]['role'] == 'system' and not messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}"
)


def model_without_system(name: str, folder: Path) -> Path:
    """A copy of the model, whose template leaves out the empty system message that heretic always sends."""
    shutil.copytree(find_model(name).folder, folder, dirs_exist_ok=True)
    template = folder / "chat_template.jinja"
    if not template.is_file():
        raise SystemExit(f"{name} has no chat_template.jinja; save it with a newer transformers")
    template.write_text(NO_SYSTEM + template.read_text())
    return folder


def searched(request: Request) -> tuple[list[dict[str, Any]], int, float]:
    """Excise's search: what stood on its front at any time, tokens in all, and seconds."""
    began = time.monotonic()
    run(request, Events(request.folder / "events.jsonl"))
    seconds = time.monotonic() - began
    events = [json.loads(line) for line in (request.folder / "events.jsonl").read_text().splitlines()]
    tokens = sum(int(one["metrics"]["generated_tokens"]) for one in events if one["stage"] == "base" and one["metrics"])
    study = Study.of(request)
    kept, done = [], study.done()
    for place, one in enumerate(done):
        tokens += one.generated_tokens
        if any(other.number == one.number for other in study.front(done[: place + 1])):
            kept.append({"number": one.number, "tokens": tokens})
    return kept, tokens, seconds


def heretic(python: str, model: Path, bench: Bench, request: Request, folder: Path) -> tuple[dict[str, Any], float]:
    """Heretic's search on the same prompts."""
    concept, pairs = request.job.concept, request.job.concept.contrast
    files = {
        "good": [pair.negative for pair in pairs],
        "bad": [pair.positive for pair in pairs],
        "good_evaluation": [one.prompt for one in bench.concepts["all"].prompts if one.split == "neutral"],
        "bad_evaluation": [one.prompt for one in bench.concepts["all"].prompts if one.split == "concept"],
    }
    lines = [f"refusal_markers = {json.dumps(list(concept.about.decline_phrases))}", 'system_prompt = ""']
    lines += [
        f"max_response_length = {request.job.settings.max_new_tokens}",
        'response_prefix = ""',
        "batch_size = 64",
        f"seed = {request.base.seed}",
    ]
    lines += [f"n_trials = {request.trials}", f"n_startup_trials = {max(1, round(0.3 * request.trials))}"]
    lines += [f"study_checkpoint_dir = {json.dumps(str(folder / 'checkpoints'))}"]
    for name, prompts in files.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
        lines += [f"[{name}_prompts]", f"dataset = {json.dumps(str(folder / f'{name}.txt'))}", 'system_prompt = ""']
    (folder / "config.toml").write_text("\n".join(lines) + "\n")
    job = {"arguments": ["--model", str(model)], "folder": str(folder), "out": str(folder / "heretic.json")}
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "driver.py").write_text(DRIVER)
    began = time.monotonic()
    command = [python, str(folder / "driver.py"), str(folder / "job.json")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    (folder / "heretic.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"heretic failed; see {folder / 'heretic.log'}: {done.stderr.strip().splitlines()[-1:]}")
    content: dict[str, Any] = json.loads((folder / "heretic.json").read_text())
    return content, time.monotonic() - began


def scores_of(subject: ModelUnderTest) -> tuple[float, float]:
    """The one scorer: share of replies that decline, and KL along neutral replies, nats a token."""
    from excise.eval.measurements.table import scores_of as measured

    phrases = subject.concept.about.decline_phrases
    replies = subject.replies("concept")
    share = sum(declines(reply.text, phrases) for reply in replies) / len(replies)
    kl = next(one.value() for one in measured("kl_from_base", subject) if one.split == "neutral")
    return share, kl


def tokens_to(kept: list[dict[str, Any]], kl: float) -> int | None:
    """Tokens generated when an edit of this divergence that declines little was first held."""
    found = [one["tokens"] for one in kept if one["declines"] <= MOST_DECLINING and one["kl"] <= kl]
    return min(found, default=None)


def best(kept: list[dict[str, Any]]) -> float:
    """The least divergence of an edit that declines little."""
    return min((one["kl"] for one in kept if one["declines"] <= MOST_DECLINING), default=float("inf"))


def scored(arguments: argparse.Namespace, model: Path, seed: int) -> dict[str, Any]:
    """Search with both from one seed, and score with one: by searcher its front, its tokens in all and its seconds."""
    folder = arguments.folder.absolute() / f"seed-{seed}"
    folder.mkdir()
    settings = [f"max_new_tokens={arguments.tokens}", f"kl_prompts={arguments.prompts}", f"seed={seed}"]
    request = prepare(
        "orthogonalize",
        folder / "found",
        assignments=settings,
        flags={"model": str(model), "concept": arguments.concept},
        trials=arguments.trials,
        prompts=arguments.prompts,
    )
    ours, tokens, seconds = searched(request)
    found = {"excise": {"front": ours, "tokens": tokens, "seconds": seconds}}
    loaded = load_model(request.job.source, request.job.device, request.job.dtype)
    of_report = request.job.settings.model_copy(update={"kl_prompts": ALL})
    bench = Bench(
        replace(request.job, settings=of_report, measured=half_of(request.job.concept, "report")), loaded, ALL
    )
    for one in ours:
        with bench.edited(load_edit(trial_folder(request.folder, one["number"]))) as sittings:
            one["declines"], one["kl"] = scores_of(sittings["all"].subject)
    if arguments.heretic and not has_heretic(arguments.heretic):
        chooses = Bench(request.job, loaded, arguments.prompts)
        content, seconds = heretic(arguments.heretic, model, chooses, request, folder)
        for one in content["kept"]:
            other = load_model(find_model(str(folder / f"heretic-{one['number']}")), loaded.device, request.job.dtype)
            one["declines"], one["kl"] = scores_of(_sit(bench, other))
        found["heretic"] = {"front": content["kept"], "tokens": content["tokens"], "seconds": seconds}
    return found


def show(seed: int, found: dict[str, Any]) -> None:
    """Fronts of both, and what each needed to be as good as heretic in the end, and as excise."""
    for name, of in found.items():
        print(
            f"\nseed {seed}, {name}: {of['tokens']:,} generated tokens, {of['seconds']:.0f} s; on prompts that chose nothing:"
        )
        print("  trial   tokens  declines  KL")
        for one in of["front"]:
            print(f"  {one['number']:5}  {one['tokens']:7,}  {one['declines']:8.3f}  {one['kl']:.5f}")
    if "heretic" not in found:
        return
    for whose in ("heretic", "excise"):
        level = best(found[whose]["front"])
        needed = [(name, tokens_to(of["front"], level), of["tokens"]) for name, of in found.items()]
        words = [f"{name} {count:,}" if count else f"{name} not in {every:,}" for name, count, every in needed]
        print(
            f"tokens until the best of {whose} that declines at most {MOST_DECLINING:.0%}, KL {level:.5f}: {', '.join(words)}"
        )


def main() -> None:
    """Search with both, score with one, print fronts and tokens of every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heretic", help="interpreter that imports heretic")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1, help="searches, of the seeds 0, 1, ...")
    parser.add_argument("--model", default="builtin:testbed")
    parser.add_argument("--concept", default="builtin:declining")
    parser.add_argument("--tokens", type=int, default=24, help="longest reply; of both searchers, and of the scorer")
    parser.add_argument("--folder", type=Path, default=Path("search-benchmark"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    if missing := has_heretic(arguments.heretic):
        print(f"heretic: not compared: {missing}")
    model = model_without_system(arguments.model, arguments.folder.absolute() / "model")
    for seed in range(arguments.seeds):
        show(seed, scored(arguments, model, seed))


def _sit(bench: Bench, other: LoadedModel) -> ModelUnderTest:
    return ModelUnderTest(
        other.model, other.tokenizer, bench.concepts["all"], bench.settings["all"], bench.baselines["all"]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
