"""Small GGUF files for tests, written with the gguf package: a Llama of random ternary weights."""

from __future__ import annotations

import numpy as np

LAYERS, HIDDEN, WIDE, HEADS, KV_HEADS, VOCABULARY = 2, 256, 512, 4, 2, 96
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (WIDE, HIDDEN),
    "ffn_up": (WIDE, HIDDEN),
    "ffn_down": (HIDDEN, WIDE),
}
# gguf's name of a layer -> transformers' path below model.layers.N
PATHS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def ternary(rng, shape, scales="tensor"):
    """Trits times float16 scales, [N, K] float32: one for the tensor, each row or each 256."""
    n, k = shape
    trits = rng.integers(-1, 2, shape).astype(np.float32)
    trits[:, ::256] = 1  # no block without its scale
    count = {"tensor": (1, 1), "row": (n, 1), "block": (n, k // 256)}[scales]
    values = rng.uniform(0.02, 0.08, count).astype(np.float16).astype(np.float32)
    return trits * np.repeat(values, k // values.shape[1], axis=1)


def write_llama(
    path, kind="TQ2_0", *, scales="tensor", dense=(), architecture="llama", layers=LAYERS, seed=0
):
    """A small Llama at path; -> {gguf tensor name: float32 weights as quantized}.

    kind: type of the linear layers. dense: those (``blk.0.ffn_up``) kept in float16.
    """
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    expected = {}
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            norm = rng.uniform(0.8, 1.2, HIDDEN).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
        for name, shape in SHAPES.items():
            full = f"blk.{layer}.{name}"
            values = ternary(rng, shape, scales)
            if full in dense:
                values = rng.standard_normal(shape).astype(np.float16) * np.float16(0.05)
                writer.add_tensor(f"{full}.weight", values)
            else:
                quantized = gguf.GGMLQuantizationType[kind]
                data = gguf.quantize(values, quantized)
                writer.add_tensor(f"{full}.weight", data, raw_dtype=quantized)
                values = gguf.dequantize(data, quantized)
            expected[f"{full}.weight"] = values.astype(np.float32)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for name in ("token_embd", "output"):
        values = rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float16) * np.float16(0.5)
        writer.add_tensor(f"{name}.weight", values)
        expected[f"{name}.weight"] = values.astype(np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
