"""Time and memory of ``excise apply`` against copying the same files, and against load, edit, save.

    python benchmarks/apply.py [--gigabytes 8] [--folder DIR]

Makes a synthetic sharded bfloat16 Llama-shaped checkpoint, then in the same run: ``cp`` + fsync, ``excise apply``
(its copy is verified and hashed), and loading with transformers + editing + ``save_pretrained``. Rounds are
interleaved; ratios are of medians.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from excise.artifacts.checkpoints.edits import save_edit
from excise.editing.edits.subspace_removal import Edit
from safetensors.torch import save_file

REST = 10.0
"""Seconds between commands."""
WIDTH, NEURONS, VOCABULARY, SHARD = 4096, 14336, 128256, 2_000_000_000

LOAD_EDIT_SAVE = """
import sys
from pathlib import Path
import torch
from excise.artifacts.edits import load_edit
from transformers import AutoModelForCausalLM
edit = load_edit(Path(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="auto")
with torch.no_grad():
    basis = edit.basis
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            wide = weight.float()
            weight.copy_(wide - basis @ (basis.T @ wide))
        elif name.endswith("embed_tokens.weight"):
            wide = weight.float()
            weight.copy_(wide - (wide @ basis) @ basis.T)
model.save_pretrained(sys.argv[3])
"""


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Random weights in Llama's names and shapes, in shards of about 2 GB."""
    layer = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 4 + 3 * WIDTH * NEURONS + 2 * WIDTH)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) / layer))
    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        for name in ("q_proj", "o_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (WIDTH, WIDTH)
        for name in ("k_proj", "v_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (WIDTH // 4, WIDTH)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}mlp.{name}.weight"] = (NEURONS, WIDTH)
        shapes[f"{prefix}mlp.down_proj.weight"] = (WIDTH, NEURONS)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (WIDTH,)
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        bytes_ = 2 * torch.Size(shape).numel()
        if shards[-1] and size + bytes_ > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += bytes_
    noise = (0.02 * torch.randn(1 << 24)).bfloat16()
    weight_map = {}
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in members.items():
            count = torch.Size(shape).numel()
            tensors[name] = noise.repeat(count // len(noise) + 1)[:count].reshape(shape).clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
    index = {
        "metadata": {"total_size": sum(2 * torch.Size(s).numel() for s in shapes.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    basis = torch.linalg.qr(torch.randn(WIDTH, 1)).Q
    save_edit(Edit(basis, "llama", (1.0,) * layers), folder.parent / "edit")


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory in MB of a command, on a machine that has come to rest.

    What a deleted file held is at hand for a moment; virtual machines then give it back to their host,
    and taking it again costs more than copying. Every command starts after that moment.
    """
    os.sync()
    time.sleep(REST)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{command} failed"
    return time.monotonic() - started, usage.ru_maxrss / 1024


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=8.1)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-apply"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--skip-load", action="store_true", help="leave out load, edit, save_pretrained")
    arguments = parser.parse_args()
    base, out, edit = arguments.folder / "base", arguments.folder / "out", arguments.folder / "edit"
    if not base.exists():
        make_checkpoint(base, arguments.gigabytes)
    size = sum(path.stat().st_size for path in base.iterdir())
    copy = f"cp -r {base} {out} && find {out} -type f -exec sync {{}} + && sync {out}"
    commands = {
        "cp + fsync": ["sh", "-c", copy],
        "excise apply": [
            sys.executable,
            "-m",
            "excise.cli",
            "apply",
            str(edit),
            "--base",
            str(base),
            "--out",
            str(out),
        ],
    }
    if not arguments.skip_load:
        commands["load, edit, save"] = [sys.executable, "-c", LOAD_EDIT_SAVE, str(edit), str(base), str(out)]
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            timings[name].append(timed(command))
    shutil.rmtree(out, ignore_errors=True)
    reference = statistics.median(seconds for seconds, _ in timings["cp + fsync"])
    print(f"{size / 1e9:.2f} GB, {arguments.rounds} rounds, {os.cpu_count()} cores")
    for name, rounds in timings.items():
        seconds = statistics.median(s for s, _ in rounds)
        each = ", ".join(f"{s:.1f}" for s, _ in rounds)
        print(
            f"{name:<18} {seconds:7.1f} s ({each})  {seconds / reference:5.2f} x cp  peak "
            f"{max(m for _, m in rounds):8.0f} MB"
        )


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
