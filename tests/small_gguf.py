"""A model of one layer as a GGUF file, written tensor by tensor, so that any of them can be wrong."""

from collections.abc import Collection
from pathlib import Path

import gguf
import numpy as np

WIDTH, HIDDEN, HEADS, KEY_HEADS = 32, 48, 4, 2
WORDS = [b"<unk>", b"<s>", b"</s>", *(bytes([letter]) for letter in range(97, 123))]
LAYER = {
    "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH),
    "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN),
}  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (len(WORDS), WIDTH),
    "output_norm.weight": (WIDTH,),
    "output.weight": (len(WORDS), WIDTH),
    **{f"blk.0.{name}.weight": shape for name, shape in LAYER.items()},
}


def write_gguf(
    path: Path,
    *,
    without: Collection[str] = (),
    not_finite: str | None = None,
    layers: int = 1,
    rope_base: float = 10000.0,
    kind: str = "llama",
) -> Path:
    """Write the file; ``layers`` is what its metadata say, not what it holds."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(rope_base)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_token_types([1] * len(WORDS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        values = random.normal(size=shape).astype(np.float32)
        if name == not_finite:
            values.flat[3] = np.nan
        if name not in without:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
