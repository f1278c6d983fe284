"""Time and memory of ``excise apply ADAPTER`` against peft's ``merge_and_unload``.

    python benchmarks/merge.py [--gigabytes 4] [--folder DIR]

Makes a synthetic sharded bfloat16 Llama-shaped checkpoint and a LoRA of rank 16 on every linear module of it. Then, each
in a process of its own: ``excise apply`` (its output is hashed), and loading with transformers and peft, merging and
``save_pretrained``. Rounds are interleaved; ratios are of medians. At the end both results are compared, tensor by
tensor.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
from pathlib import Path

import torch
from apply import make_checkpoint, timed
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 16
MERGE = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def make(base: Path, adapter: Path, gigabytes: float) -> None:
    """Base and adapter, where they are missing."""
    if not base.exists():
        make_checkpoint(base, gigabytes)
    if not adapter.exists():
        make_adapter(adapter, base)


def make_adapter(folder: Path, base: Path) -> None:
    """Random LoRA factors in peft's names, on all linear modules of all layers."""
    folder.mkdir()
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  the handle has no `in`
                if "_proj" in name:
                    outputs, inputs = file.get_slice(name).get_shape()
                    key = f"base_model.model.{name.removesuffix('.weight')}"
                    tensors[f"{key}.lora_A.weight"] = 0.01 * torch.randn(RANK, inputs, generator=generator)
                    tensors[f"{key}.lora_B.weight"] = 0.01 * torch.randn(outputs, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


def largest_difference(one: Path, other: Path) -> tuple[int, int, float]:
    """Tensors compared, elements that differ, and the largest difference in units in the last place of bfloat16."""
    places: dict[str, Path] = {}
    for shard in other.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), shard)
    tensors, differing, worst = 0, 0, 0.0
    for shard in sorted(one.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                with safe_open(places[name], framework="pt") as second:
                    a, b = file.get_tensor(name), second.get_tensor(name)
                different = a != b
                tensors, differing = tensors + 1, differing + int(different.sum())
                if different.any():
                    a, b = a[different].double(), b[different].double()
                    unit = torch.exp2(torch.floor(torch.log2(torch.maximum(a.abs(), b.abs()))) - 7)
                    worst = max(worst, float(((a - b).abs() / unit).max()))
    return tensors, differing, worst


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-merge"))
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    base, adapter = arguments.folder / "base", arguments.folder / "adapter"
    # In a process of its own: Linux counts the memory of a parent into the peak of its children.
    making = multiprocessing.get_context("spawn").Process(target=make, args=(base, adapter, arguments.gigabytes))
    making.start()
    making.join()
    outs = {name: arguments.folder / name for name in ("excise", "peft")}
    excise = [sys.executable, "-m", "excise.cli", "apply", str(adapter), "--base", str(base)]
    commands = {
        "excise": [*excise, "--out", str(outs["excise"])],
        "peft": [sys.executable, "-c", MERGE, str(adapter), str(base), str(outs["peft"])],
    }
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            timings[name].append(timed(command))
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    shards = [path.stat().st_size for path in base.glob("*.safetensors")]
    print(
        f"{size / 1e9:.2f} GB in {len(shards)} shards of at most {max(shards) / 1e9:.2f} GB, {arguments.rounds} rounds"
    )
    middle = {
        name: tuple(statistics.median(one) for one in zip(*rounds, strict=True)) for name, rounds in timings.items()
    }
    for name, (seconds, megabytes) in middle.items():
        print(
            f"{name:<8} {seconds:7.1f} s  {seconds / middle['peft'][0]:5.2f} x peft    peak {megabytes:8.0f} MB "
            f" {megabytes / middle['peft'][1]:5.2f} x peft"
        )
    tensors, differing, worst = largest_difference(outs["excise"], outs["peft"])
    print(f"{tensors} tensors; {differing} elements differ, by at most {worst:.2f} units in the last place")
    for out in outs.values():
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
