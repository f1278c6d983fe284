"""Throughput of reading the residual stream against the same truncated forward without hooks.

    python benchmarks/activations.py [MODEL]

Prints the paired ratio of medians; both stop at the same layer, in the same process, interleaved.
"""

import statistics
import sys
import time

import torch
from excise.artifacts.checkpoints.read import open_checkpoint
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import choose_device, choose_dtype, load_model
from excise.editing.architectures import architecture_of
from excise.editing.hooks.residual_stream import decoder_layers, residual_stream

ROUNDS = 15


def main() -> None:
    """Time both, interleaved."""
    source = find_model(sys.argv[1] if len(sys.argv) > 1 else "builtin:testbed")
    device = choose_device("auto")
    loaded = load_model(source, device, choose_dtype("auto", device))
    row = architecture_of(open_checkpoint(source.folder).config)
    layers = decoder_layers(loaded.model, row)
    deepest = max(1, int(0.8 * len(layers)))
    ids = torch.randint(4, loaded.model.config.vocab_size, (32, 48), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    points = tuple(range(deepest + 1))

    @torch.no_grad()
    def bare() -> None:
        # The same model without its upper layers runs the very same kernels, and no hook.
        whole = list(layers)
        del layers[deepest:]
        try:
            loaded.model.base_model(**inputs, use_cache=False)
        finally:
            layers.extend(whole[deepest:])

    times: dict[str, list[float]] = {"bare": [], "read": []}
    for _ in range(ROUNDS + 2):
        for name, call in (("bare", bare), ("read", lambda: residual_stream(loaded.model, row, inputs, points, 4))):
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    ratios = [b / r for b, r in zip(times["bare"][2:], times["read"][2:], strict=True)]
    tokens = ids.numel() / statistics.median(times["read"][2:])
    print(f"{source.name}: {len(points)} points of {deepest} layers, {tokens:,.0f} tokens/s")
    print(f"throughput over the bare truncated forward: {statistics.median(ratios):.3f} (paired median of {ROUNDS})")


if __name__ == "__main__":
    main()
