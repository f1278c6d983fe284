"""Planned peaks of recipes on large models and GPUs, from configurations alone; no weights, no GPU.

    python benchmarks/memory_table.py [--write]

With ``--write`` the table goes into docs/machines.md. Texts are taken to be 512 tokens long, all settings are defaults,
and weights are in bfloat16. Of several GPUs the weights lie on all, and so does the plan.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from excise.artifacts.concepts import load_concept
from excise.editing.architectures import architecture_of, layer_count
from excise.editing.training.adapters import AdapterShape, adapter_modules
from excise.recipes.audit import plan as audit
from excise.recipes.audit.attacks.table import BUDGETS
from excise.recipes.caft import recipe as caft
from excise.recipes.common import memory_plan
from excise.recipes.common.adapter_job import AdapterJob
from excise.recipes.common.measured_run import Job
from excise.recipes.common.memory_plan import MemoryPlan, RunMemory
from excise.recipes.common.memory_sizes import sizes_of
from excise.recipes.elm import recipe as elm
from excise.recipes.orthogonalize import recipe as orthogonalize
from excise.recipes.prune import recipe as prune
from excise.recipes.unlearning import npo

TOKENS = 512
CAPACITIES = {"24 GB": 24e9, "80 GB": 80e9, "8 x 80 GB": 640e9}
PAGE = Path(__file__).parents[1] / "docs" / "machines.md"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA,
    "Qwen3-32B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120,
        "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "Llama-3.3-70B": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
}  # fmt: skip
"""Public values of each config.json; gpt-oss is dequantized to bfloat16 before it is edited."""


class Pretended(RunMemory):
    """The memory of a run whose texts are all of one length, on a device that need not be here."""

    def __init__(self, run: Any):
        self.checkpoint, self.device, self.concept = run.checkpoint, run.device, run.concept
        self.measured = run.settings.measuring() if hasattr(run.settings, "measuring") else None
        self.sizes = sizes_of(run.checkpoint.config, run.dtype)

    def longest(self, texts: Any, most: int) -> int:
        return min(most, TOKENS)

    def tokenizes(self, texts: Any = ()) -> bool:
        return False

    def tokens(self, texts: Any) -> int:
        return 2000 * TOKENS

    def scored(self, full: int, asked: Any = None) -> list[tuple[int, int, int]]:
        return [(full, full, full)]


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    table = "\n".join(rows(options.models.split(",")))
    if not options.write:
        return print(table)
    text = PAGE.read_text(encoding="utf-8")
    between = re.compile(r"(<!-- memory table -->\n).*?(<!-- /memory table -->)", re.S)
    PAGE.write_text(between.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text), encoding="utf-8")


def rows(models: list[str]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["| recipe | memory | " + " | ".join(models) + " |", "| --- | --- |" + " --- |" * len(models)]
    for recipe, plan in PLANS.items():
        for name, capacity in CAPACITIES.items():
            cells = [cell(plan, MODELS[model], int(capacity)) for model in models]
            lines.append(f"| {recipe} | {name} | " + " | ".join(cells) + " |")
    return lines


def cell(plan: Callable[..., MemoryPlan], config: dict[str, Any], capacity: int) -> str:
    """Whether a recipe fits, how, and its peak in GB; or how many GB are missing."""
    made = planned(plan, config, capacity)
    if made.peak.total > capacity and plan is not audit_plan:
        fewer = planned(plan, config, capacity, base_bits=4)
        made = fewer if fewer.peak.total < made.peak.total else made
    peak = made.peak
    if peak.total > capacity:
        return f"no: {(peak.total - capacity) / 1e9:.0f} GB missing ({peak.name.partition(' (')[0]})"
    found = re.findall(r"\((.*?)\)", " ".join(stage.name for stage in made.stages))
    how = ", ".join(dict.fromkeys(word for words in found for word in words.split(", ")))
    return f"yes{f', {how}' if how else ''}: {peak.total / 1e9:.0f} GB"


def planned(plan: Callable[..., MemoryPlan], config: dict[str, Any], capacity: int, **settings: Any) -> MemoryPlan:
    """A plan with so many bytes free."""
    memory_plan.free_memory = lambda device: capacity
    return plan(config, **settings)


def job_of(kind: Any, recipe: str, config: dict[str, Any], **settings: Any) -> Job:
    """A request as ``prepare`` would make it, without files."""
    asked = kind(**{key: value for key, value in settings.items() if key in kind.model_fields})
    checkpoint: Any = SimpleNamespace(config=config, size=0)
    device = torch.device("cuda")
    concept, row = load_concept(asked.concept), architecture_of(config)
    source: Any = None
    return Job(recipe, asked, source, checkpoint, concept, row, device, torch.bfloat16, None, Path("out"), concept)


def adapter_job_of(kind: Any, recipe: str, config: dict[str, Any], **settings: Any) -> AdapterJob:
    """The same of a recipe that trains an adapter on every linear module."""
    run = job_of(kind, recipe, config, **settings)
    layers = tuple(range(layer_count(config)))
    model = sizes_of(config, run.dtype).model
    asked: Any = run.settings
    shape = AdapterShape(asked.rank, asked.alpha, adapter_modules(model, run.row, layers))
    return AdapterJob(run, asked, layers, shape, run.concept)


def elm_plan(config: dict[str, Any], **settings: Any) -> MemoryPlan:
    adapter = adapter_job_of(elm.ElmSettings, "elm", config, **settings)
    job: Any = SimpleNamespace(adapter=adapter, settings=adapter.settings)
    return elm.memory(job)


def npo_plan(config: dict[str, Any], **settings: Any) -> MemoryPlan:
    adapter = adapter_job_of(npo.NpoSettings, "npo", config, **settings)
    job: Any = SimpleNamespace(adapter=adapter, settings=adapter.settings)
    return npo.memory(job)


def caft_plan(config: dict[str, Any], **settings: Any) -> MemoryPlan:
    adapter = adapter_job_of(caft.CaftSettings, "caft", config, **settings)
    data = SimpleNamespace(rows=adapter.run.concept.train)
    job: Any = SimpleNamespace(adapter=adapter, settings=adapter.settings, data=data, places=(0,), directions=())
    return caft.memory(job)


def orthogonalize_plan(config: dict[str, Any], **settings: Any) -> MemoryPlan:
    job: Any = SimpleNamespace(run=job_of(orthogonalize.OrthogonalizeSettings, "orthogonalize", config))
    return orthogonalize.memory(job)


def prune_plan(config: dict[str, Any], **settings: Any) -> MemoryPlan:
    run = job_of(prune.PruneSettings, "prune", config)
    job: Any = SimpleNamespace(run=run, settings=run.settings)
    return prune.memory(job)


def audit_plan(config: dict[str, Any], **settings: Any) -> MemoryPlan:
    base = job_of(npo.NpoSettings, "npo", config)
    # Attacks on whole weights are left out where they do not fit; an audit says so.
    attacks = tuple(name for name in BUDGETS["standard"].attacks if not name.endswith("_full"))
    source = SimpleNamespace(folder=config)
    job: Any = SimpleNamespace(
        sources={"base": source}, device=base.device, dtype=base.dtype, concept=base.concept, attacks=attacks,
        budget=BUDGETS["standard"], optimizer="adamw", settings=base.settings, behaviour=None,
        suppressed_attacks=attacks, locked_attacks=("rtt",), removed_attacks=("rtt",),
    )  # fmt: skip
    return audit.memory(job)


PLANS: dict[str, Callable[..., MemoryPlan]] = {
    "elm": elm_plan,
    "npo": npo_plan,
    "orthogonalize": orthogonalize_plan,
    "caft": caft_plan,
    "prune": prune_plan,
    "audit": audit_plan,
}


def pretend() -> None:
    """Let recipes plan on configurations."""
    RunMemory.of = classmethod(lambda _, run: Pretended(run))  # type: ignore[assignment]
    audit.open_checkpoint = lambda folder: SimpleNamespace(config=folder, size=0)  # type: ignore[assignment,return-value]

    def of_audit(source: Any, checkpoint: Any, device: Any, dtype: Any, concept: Any) -> Pretended:
        run = SimpleNamespace(checkpoint=checkpoint, device=device, dtype=dtype, concept=concept, settings=None)
        return Pretended(run)

    audit.RunMemory = of_audit  # type: ignore[assignment,misc]


if __name__ == "__main__":
    pretend()
    main()
