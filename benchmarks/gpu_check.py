"""Runs every recipe, every measurement, an audit and an ELM step on this machine's GPU, and says what failed.

    python benchmarks/gpu_check.py [--out FOLDER] [--minutes 9] [--shape 8b] [--only NAME,...]
    python benchmarks/gpu_check.py --tiny

Needs no network: the models are the built-in one and a Llama of random weights, made in place. One process runs the jobs
one after the other, because imports take longer than many of them; after a job that failed a new one goes on, because
an error on a GPU can spoil all that follows. Prints a line a job and a table; ``FOLDER/gpu_check.json`` holds all of it,
and each job's log and ``events.jsonl`` stand beside. ``--tiny`` makes the random model and every job small, takes the CPU
where there is no GPU, and times nothing: it shows that all of it works.
"""

import argparse
import gc
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 9216},
}  # fmt: skip
"""Llama 3.1 8B, Llama 3.2 1B (with a head of its own), and one for a machine without a GPU."""
SMALL = "questions=12 kl_prompts=4 max_new_tokens=4"
TRAINED = f"{SMALL} steps=6 batch_size=4"
ERASED = f"{TRAINED} max_contexts=48 chat_facts=8 reference_subjects=4 fluency_tokens=4"
SEARCHED = f"{SMALL} train_pairs=32 validation_pairs=8"
TINY: dict[str, int] = {
    "questions": 6, "kl_prompts": 2, "max_new_tokens": 2, "steps": 2, "batch_size": 2, "max_contexts": 12,
    "chat_facts": 1, "reference_subjects": 2, "fluency_tokens": 2, "train_pairs": 12, "validation_pairs": 4,
    "examples": 8, "validate_units": 1, "watch": 1, "components": 1, "rank": 2, "texts": 8, "samples": 4,
}  # fmt: skip
"""What ``--tiny`` gives the settings that a job names."""
PATIENCE = 8
"""How many times longer ``--tiny`` waits for a job: processors are slow, and may be busy with other things."""


@dataclass(frozen=True)
class Job:
    """One command, its settings, and the most seconds that it may take."""

    command: str
    settings: str = ""
    limit: int = 90
    gpu_only: bool = False


JOBS: dict[str, Job] = {
    "make": Job("", limit=120),
    "elm": Job("run elm", ERASED),
    "elm_big": Job("run elm --model {big}", ERASED, 150),
    "audit": Job("audit {elm} --budget quick --questions 20 --attacks "
        "few_shot,hints,int8,int4,bf16,prune,skip_layer,interpolate,undo_cliff,amplify,undo_singular,undo_direction,logit_lens,probe,soft_prompt,latent,rtt,"
        "few_8,unrelated,rtt_full,relearn", limit=120),
    "step": Job("{big} texts none", limit=120),
    "audit_big": Job("audit {elm_big} --base {big} --budget quick --questions 20 --attacks "
        "int8,probe,few_8,unrelated,soft_prompt", "", 120),
    "orthogonalize": Job("run orthogonalize", f"{SEARCHED} positions=2"),
    "prune": Job("run prune", f"{SMALL} examples=64 validate_units=4"),
    "caft": Job("run caft", f"{SMALL} steps=6 batch_size=4 watch=8 components=3"),
    "caft_big": Job("run caft --model {big}", f"{SMALL} steps=6 batch_size=4 watch=4 components=3", 150),
    "elm_4bit": Job("run elm --model {big}", f"{ERASED} base_bits=4", 150, gpu_only=True),
    "elm_reference": Job("run elm", f"{TRAINED} preset=reference rank=16 max_contexts=48"),
    "elm_checkpointed": Job("run elm", f"{ERASED} gradient_checkpointing=true"),
    "prune_big": Job("run prune --model {big}", f"{SMALL} examples=32 controls=false", 150),
    "apply": Job("apply {caft_big} --base {big}"),
    "step_decoded": Job("{big} texts decoded", limit=150),
    "caft_whole": Job("run caft --concept builtin:quirk", f"{SMALL} steps=6 batch_size=4 tune=full watch=0"),
    "lorra": Job("run lorra", f"{SMALL} steps=6 batch_size=4"),
    "rmu": Job("run rmu", TRAINED),
    "grad_diff": Job("run grad_diff", TRAINED),
    "npo": Job("run npo", TRAINED),
    "simnpo": Job("run simnpo", TRAINED),
    "audit_searched": Job("audit {elm} --budget quick --questions 20 --attacks sampling,prefix", limit=120),
    "audit_whole_big": Job("audit {elm_big} --base {big} --budget quick --questions 20 --attacks rtt_full", "", 150),
    "audit_behaviour": Job("audit {orthogonalize} --budget quick --questions 20", limit=150),
    "jensun": Job("run jensun", TRAINED),
    "options": Job("run npo", f"{TRAINED} sam=0.01 noise=0.02 mask=sign normalize=true adversary=1"),
    "repselect": Job("run repselect", f"{SMALL} texts=16 batch_size=4"),
    "distill": Job("run distill", f"{SMALL} steps=6 batch_size=2 samples=16 teacher={{elm}}"),
    "kl_budget": Job("run grad_diff --kl-budget 0.05", TRAINED),
    "elm_whole": Job("run elm", limit=240, gpu_only=True),
    "eval": Job("eval builtin:testbed-reference --concept builtin:potions --base builtin:testbed", SMALL),
}  # fmt: skip
"""In the order of what would be missed most if time ran out. ``{NAME}`` is an earlier job's folder, ``{big}`` the
random model."""
WRITES = ("run", "audit", "apply")
AUDIT_STEPS = 8


@dataclass
class Outcome:
    """What became of one job."""

    name: str
    status: str
    """``passed``, ``failed``, ``too slow`` or ``not run``."""
    seconds: float = 0.0
    why: str = ""
    peak_allocated_gb: float | None = None
    peak_reserved_gb: float | None = None
    peak_host_gb: float | None = None
    busy: float | None = None
    """Share of the time in which the GPU ran a kernel, as its driver counts it."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage of a run."""
    figures: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    """Run the jobs; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="Folder of results.")
    parser.add_argument("--minutes", type=float, help="No job begins after so many: 9, with --tiny 60.")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="Of the random model.")
    parser.add_argument("--only", help="Names of jobs, comma-separated; those that they need are run too.")
    parser.add_argument("--tiny", action="store_true", help="A tiny random model; also runs without a GPU.")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, SHAPES[options.shape])
        return 0
    if options.tiny:
        options.shape = "tiny"
    options.minutes = options.minutes or (60 if options.tiny else 9)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    names = wanted(options.only.split(",") if options.only else list(JOBS))
    place = tempfile.mkdtemp(prefix="gpu-check-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    try:
        outcomes = check(options, names, Path(place))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return report(outcomes)


def check(options: argparse.Namespace, names: list[str], scratch: Path) -> list[Outcome]:
    """Run every job that can be run; what is known so far stands in the results' file after each."""
    started = time.monotonic()
    worker = Worker(scratch, options.shape)
    machine = worker.machine
    print(f"{machine['gpu']}, torch {machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}")
    has_gpu = machine["gpu"] != "none"
    if not has_gpu and not options.tiny:
        worker.stop()
        sys.exit("gpu_check: PyTorch sees no GPU here; give --tiny to try the check itself on the CPU")
    print(f"ready after {time.monotonic() - started:.1f} s", flush=True)
    outcomes: dict[str, Outcome] = {}
    for name in names:
        job = JOBS[name]
        missing = [one for one in needed(name) if outcomes[one].status != "passed"]
        if missing:
            outcomes[name] = Outcome(name, "not run", why=f"needs {missing[0]}")
        elif job.gpu_only and not has_gpu:
            outcomes[name] = Outcome(name, "not run", why="needs a GPU")
        elif time.monotonic() - started > 60 * options.minutes:
            outcomes[name] = Outcome(name, "not run", why="no time was left")
        else:
            outcomes[name] = worker.run(name, job.limit * (PATIENCE if options.tiny else 1))
            keep_files(name, scratch, options.out)
            if outcomes[name].status != "passed":
                worker.stop()
                worker = Worker(scratch, options.shape)
        one = outcomes[name]
        peak = f"{one.peak_allocated_gb:6.1f} GB" if one.peak_allocated_gb is not None else ""
        print(f"[{time.monotonic() - started:4.0f}s] {name:18}{one.status:9}{one.seconds:7.1f} s {peak}  {one.why}")
        print(f"        {one.figures or one.stages}", flush=True)
        content = {"machine": machine, "shape": options.shape, "outcomes": [asdict(one) for one in outcomes.values()]}
        (options.out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    worker.stop()
    return list(outcomes.values())


def wanted(names: list[str]) -> list[str]:
    """These jobs and those that they need, in the order of the table."""
    waiting, found = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name not in JOBS:
            sys.exit(f"gpu_check: {name!r} is no job; jobs: {', '.join(JOBS)}")
        found.add(name)
        waiting += needed(name)
    return [name for name in JOBS if name in found]


def needed(name: str) -> list[str]:
    """Jobs that must have passed before."""
    job = JOBS[name]
    return ["make" if other == "big" else other for other in re.findall(r"{(\w+)}", f"{job.command} {job.settings}")]


def keep_files(name: str, scratch: Path, out: Path) -> None:
    """Log and events of a job, beside the results."""
    shutil.copy(scratch / f"{name}.log", out / f"{name}.log")
    for events in (scratch / name).rglob("events.jsonl"):
        shutil.copy(events, out / f"{name}.events.jsonl")


class Worker:
    """A process that has imported everything and does one job after the other."""

    def __init__(self, scratch: Path, shape: str):
        self.scratch = scratch
        options = ["--worker", str(scratch), "--shape", shape]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.machine: dict[str, Any] = json.loads(self.answers.get(timeout=180))

    def run(self, name: str, limit: int) -> Outcome:
        """One job, for at most ``limit`` seconds."""
        started = time.monotonic()
        with _Busy() as busy:
            self._tell(name)
            answer = self._answer(limit)
        status = "passed" if answer.get("code") == 0 else "failed" if "code" in answer else "too slow"
        log = (self.scratch / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in log.splitlines() if line.strip()]
        events = next(iter((self.scratch / name).rglob("events.jsonl")), None)
        return Outcome(
            name,
            status,
            round(time.monotonic() - started, 1),
            "" if status == "passed" or not lines else lines[-1][:300],
            **answer.get("peaks", {}),
            busy=busy.share,
            stages=stages(events) if events else {},
            figures=answer.get("figures", {}),
        )

    def stop(self) -> None:
        """End the process; one that hangs in a kernel hears nothing but this."""
        self.process.kill()
        self.process.wait()

    def _tell(self, name: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()

    def _answer(self, limit: int) -> dict[str, Any]:
        try:
            return dict(json.loads(self.answers.get(timeout=limit)))
        except queue.Empty:
            # As a user would who has waited long enough: what it was doing stands in the log.
            self.process.terminate()
        try:
            return {"peaks": json.loads(self.answers.get(timeout=5))["peaks"]}
        except queue.Empty:
            return {}

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put('{"code": 1}')  # it died


def work(scratch: Path, shape: dict[str, int]) -> None:
    """What a worker does: one job for each line of its input; answers are lines of JSON."""
    import torch

    for module in ("excise.cli", "excise.recipes.elm.recipe", "excise.recipes.audit.recipe"):
        import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps(machine()), file=answers, flush=True)
    for line in sys.stdin:
        name = line.strip()
        log = os.open(scratch / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        if torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        figures: dict[str, Any] = {}
        try:
            figures, code = do(name, scratch, shape) or {}, 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # noqa: BLE001 (whatever it is belongs into the log, and the check goes on)
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        print(json.dumps({"code": code, "figures": figures, "peaks": peaks()}), file=answers, flush=True)


def do(name: str, scratch: Path, shape: dict[str, int]) -> dict[str, Any] | None:
    """One job; its figures, if it has any of its own."""
    folders = {other: str(scratch / other) for other in JOBS} | {"big": str(scratch / "make")}
    words = JOBS[name].command.format_map(folders).split()
    if name == "make":
        return make_model(scratch / "make", shape)
    tiny = shape == SHAPES["tiny"]
    if name.startswith("step"):
        return step_times(*words, tiny=tiny)
    if words[0] in WRITES:
        words += ["--out", folders[name]]
    settings = JOBS[name].settings.format_map(folders).split()
    words += [word for pair in settings for word in ("--set", as_small(pair) if tiny else pair)]
    command(words, scratch, tiny=tiny)
    return None


def as_small(pair: str) -> str:
    """A setting as ``--tiny`` gives it."""
    key = pair.partition("=")[0]
    return f"{key}={TINY[key]}" if key in TINY else pair


def machine() -> dict[str, Any]:
    """What is computed on, and with which versions."""
    from importlib.metadata import version

    from excise.artifacts.checkpoints.manifest import package_versions, platform_of

    return {**platform_of(), "cpus": os.cpu_count(), **package_versions(), "peft": version("peft")}


def peaks() -> dict[str, float]:
    """Most memory that was held: on the GPU by this job, in main memory by this process."""
    import resource

    import torch

    found = {"peak_host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_initialized():
        found["peak_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return {name: round(value, 2) for name, value in found.items()}


def command(words: list[str], scratch: Path, *, tiny: bool) -> None:
    """The command line, in this process."""
    from excise import cli
    from excise.recipes.audit.attacks.table import BUDGETS

    fewer = {"seeds": 1, "batch": 2} if tiny else {}
    BUDGETS["quick"] = replace(BUDGETS["quick"], steps=2 if tiny else AUDIT_STEPS, **fewer)
    os.environ |= {"XDG_CACHE_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    os.chdir(scratch)
    sys.argv = ["excise", *words, "--debug"]
    cli.main()


def make_model(out: Path, shape: dict[str, int]) -> dict[str, Any]:
    """Write a Llama of random weights, with the built-in model's tokenizer."""
    import excise
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    builtin = Path(next(iter(excise.__path__))) / "artifacts/builtin/testbed"
    known = json.loads((builtin / "config.json").read_text(encoding="utf-8"))
    tokens = {key: known[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in known}
    config = LlamaConfig(**shape, **tokens, max_position_embeddings=8192, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="3GB")
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(builtin / name, out / name)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def step_times(model: str, length: str, mode: str, *, tiny: bool) -> dict[str, Any]:
    """Seconds of an ELM step of excise and of the plain loop, and the products' own time."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    import elm

    if tiny:
        length, elm.NEW_TOKENS = "lines", 4
    elm.STEPS = {"excise": {length: 1 if tiny else 4}, "plain": {length: 1}}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The first kernels of a process are loaded when they are called.
    elm.measure(model, device, "auto", "excise", length, "none")
    sides = {side: elm.measure(model, device, "auto", side, length, mode) for side in ("excise", "plain")}
    ours, plain = sides["excise"], sides["plain"]
    return {
        "excise_seconds": round(ours["seconds"], 3),
        "plain_seconds": round(plain["seconds"], 3),
        "ratio_to_plain": round(plain["seconds"] / ours["seconds"], 2),
        "ratio_to_floor": round(ours["seconds"] / ours["floor"], 2),
        "excise_parts": {part: round(seconds, 3) for part, seconds in ours["parts"].items()},
        "plain_parts": {part: round(seconds, 3) for part, seconds in plain["parts"].items()},
        "excise_peak_gb": round(ours["peak"] / 953.7, 2),
        "plain_peak_gb": round(plain["peak"] / 953.7, 2),
    }


def stages(events: Path) -> dict[str, float]:
    """Seconds of each stage that ended; the last that did not end has none and is marked."""
    spent: dict[str, float] = {}
    open_stage = ""
    for line in events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if "total" in event["metrics"]:
            open_stage = event["stage"]
        if "seconds" in event["metrics"]:
            spent[event["stage"]] = spent.get(event["stage"], 0.0) + event["metrics"]["seconds"]
            open_stage = ""
    return {name: round(seconds, 1) for name, seconds in spent.items()} | ({open_stage: -1.0} if open_stage else {})


class _Busy:
    """Asks the driver, while something runs, how busy the first GPU is; knows nothing where it cannot be asked."""

    def __init__(self) -> None:
        self.readings: list[int] = []
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Busy":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    @property
    def share(self) -> float | None:
        return round(sum(self.readings) / len(self.readings) / 100, 2) if self.readings else None

    def _watch(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # noqa: BLE001 (the library is absent, or there is no driver)
            return
        while not self.stopped.wait(0.2):
            self.readings.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)


def report(outcomes: list[Outcome]) -> int:
    """A table, and at its end what failed."""
    print(f"\n{'job':18}{'':10}{'seconds':>8}{'busy':>7}{'GPU GB':>8}{'host GB':>8}")
    for one in outcomes:
        busy = "" if one.busy is None else f"{one.busy:.0%}"
        peak = "" if one.peak_allocated_gb is None else f"{one.peak_allocated_gb:.1f}"
        host = "" if one.peak_host_gb is None else f"{one.peak_host_gb:.1f}"
        print(f"{one.name:18}{one.status:10}{one.seconds:8.1f}{busy:>7}{peak:>8}{host:>8}")
    failed = [one for one in outcomes if one.status in ("failed", "too slow")]
    for one in failed:
        print(f"{one.status}: {one.name}: {one.why}")
    print(f"{len(outcomes)} jobs: {sum(one.status == 'passed' for one in outcomes)} passed, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
