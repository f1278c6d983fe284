"""Which model types of transformers can be edited: a row derived on a small copy of each, and proved on disk.

python benchmarks/architectures.py [--only TYPE ...] [--jobs 2] [--timeout 200] [--json FILE] [--page docs/architectures.md]

Every type that writes text is tried with the default configuration of its class, in a process of its own, and some with
other options. Types of the table are proved as well. No model is downloaded.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "gemma4_text, experts": {"model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 8,
        "top_k_experts": 2, "moe_intermediate_size": 704},
    "granitemoehybrid, attention": {"model_type": "granitemoehybrid", "num_hidden_layers": 8,
        "layer_types": ["mamba", "attention"] * 4},
    "bamba, attention": {"model_type": "bamba", "num_hidden_layers": 8, "attn_layer_indices": [2, 5]},
    "lfm2, convolutions": {"model_type": "lfm2", "num_hidden_layers": 8, "full_attn_idxs": [2, 5]},
    "lfm2_moe": {"model_type": "lfm2_moe", "num_hidden_layers": 8, "layer_types": ["conv", "full_attention"] * 4},
    "gpt_neox, one after the other": {"model_type": "gpt_neox", "use_parallel_residual": False},
    "falcon, biases": {"model_type": "falcon", "bias": True},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, 70B": {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "intermediate_size": 28672},
    "smollm3, 70B": {"model_type": "smollm3", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "intermediate_size": 28672, "no_rope_layers": None, "layer_types": None},
    "qwen2_vl": {"model_type": "qwen2_vl", "text_config": {"rope_parameters": {"rope_type": "default",
        "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl", "text_config": {"rope_parameters": {"rope_type": "default",
        "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}},
    "deepseek_v2": {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "n_routed_experts": 64,
        "topk_method": "greedy"},
    "aya_vision": {"model_type": "aya_vision", "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152,
        "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 364,
        "patch_size": 14}},
    "dbrx": {"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "attn_config": {"model_type": "",
        "clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000}, "ffn_config": {"model_type": "", "ffn_hidden_size": 10752,
        "moe_num_experts": 16, "moe_top_k": 4}},
    "dots1": {"model_type": "dots1", "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "moe_intermediate_size": 1408},
}  # fmt: skip
"""Options under which a type is wired in another way; and types whose class leaves out what every release says."""


def types() -> list[str]:
    """Every type that transformers loads as a model that writes text, the table's own first."""
    from excise.editing.architectures import ARCHITECTURES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} - set(VARIANTS)
    return [*sorted(ARCHITECTURES), *sorted(known - set(ARCHITECTURES)), *VARIANTS]


def one(name: str) -> dict[str, Any]:
    """Prove one type in this process."""
    import resource

    import transformers
    from excise.artifacts.checkpoints.proof import prove
    from excise.editing.errors import ExciseError

    transformers.logging.set_verbosity_error()
    options = dict(VARIANTS.get(name, {"model_type": name}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        config = json.loads(transformers.AutoConfig.for_model(**options).to_json_string(use_diff=False))
        proof = prove(config)
    except ExciseError as error:
        return {"type": name, "proved": False, "reason": _short(str(error).removeprefix(f"{options['model_type']}: "))}
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        # Some classes cannot make a default configuration of their own.
        return {"type": name, "proved": False, "reason": f"no default configuration: {type(error).__name__}: {error}"}
    if not proof.proved:
        return {"type": name, "proved": False, "reason": _short(str(proof.reason))}
    grown = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    kept = {key: getattr(proof, key) for key in ("row", "proved", "residual", "place", "reason", "seconds")}
    return {"type": name, **kept, "units": list(proof.units), "parameters": proof.parameters, "megabytes": grown}


def _short(reason: str) -> str:
    """A reason in one line, without what is the same for all."""
    return " ".join(reason.split()).removesuffix("; add a row in editing/architectures.py")[:200]


def tried(name: str, timeout: float) -> dict[str, Any]:
    """Prove one type in a process of its own, which may hang or die."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return record
    except subprocess.TimeoutExpired:
        return {"type": name, "proved": False, "reason": f"not done after {timeout:.0f} s"}
    except (IndexError, json.JSONDecodeError):
        return {"type": name, "proved": False, "reason": f"the process died: {done.stderr.strip()[-120:]}"}


def line(record: dict[str, Any]) -> str:
    """One row of the table."""
    if record["proved"]:
        cells = [record["row"], f"{record['residual']:.0e}", ", ".join(record["units"]) or "none"]
        return f"| {record['type']} | {' | '.join(cells)} | {record['seconds']:.1f} s, {record['megabytes']:.0f} MB |"
    reason = " ".join(str(record["reason"]).split()).replace("|", "/").replace("<", "")
    return f"| {record['type']} | refused | | | {reason[:160]} |"


def page(records: list[dict[str, Any]], seconds: float, jobs: int) -> str:
    """The page of the documentation."""
    import transformers

    proved = [record for record in records if record["proved"]]
    derived = [record for record in proved if record["row"] == "derived"]
    worst = max(record["residual"] for record in proved)
    head = (
        "# Architectures\n\n"
        "`excise architecture MODEL` shows whether a model can be edited; a `config.json` is enough. A type without a row in the\n"
        "table derives one on a small copy of the model (its own class and options, every kind of layer, a few numbers wide):\n"
        "each tensor is changed along a random direction while every other module repeats what it returned, and what then moves\n"
        "in the residual stream says how it writes there. The row is proved: the copy is stored in several files, edited on disk,\n"
        "untied where it is tied, loaded again, and read by hooks that do not know the row.\n\n"
        "Of a model for images and text, the language model is edited; the tower for images and what joins them are left as they\n"
        "are, so image tokens may still bring the direction in. Tensors that transformers does not load, such as those that\n"
        "predict several tokens, are left as they are too, and `excise apply` names them.\n\n"
        f"`python benchmarks/architectures.py --jobs {jobs}`, {len(records)} types and variants of transformers {transformers.__version__} in "
        f"{seconds / 60:.0f} minutes:\n"
        f"{len(proved)} can be edited ({len(derived)} of them by a derived row), {len(records) - len(proved)} are refused. Of the "
        f"direction at most {worst:.0e} is left. Each is tried with the\ndefault configuration of its class (some, such as dbrx and dots1, with a release's); released models "
        "of a type that is refused here for its defaults may have a configuration that works.\n\n"
        "| type | row | left | units to prune | proof takes |\n|---|---|---|---|---|\n"
    )
    return head + "\n".join(line(record) for record in records) + "\n"


def main() -> None:
    """Print a line a type as it is done, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--jobs", type=int, default=1, help="types that are tried at the same time")
    parser.add_argument("--timeout", type=float, default=200.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one)))
        return
    start, records = time.monotonic(), []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for record in pool.map(partial(tried, timeout=arguments.timeout), arguments.only or types()):
            records.append(record)
            print(line(record), flush=True)
    if arguments.json:
        # A line a type, so that a difference shows which one.
        lines = ",\n".join(json.dumps(record) for record in records)
        arguments.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    if arguments.page:
        arguments.page.write_text(page(records, time.monotonic() - start, arguments.jobs), encoding="utf-8")
    print(f"{sum(record['proved'] for record in records)} of {len(records)} can be edited")


if __name__ == "__main__":
    main()
