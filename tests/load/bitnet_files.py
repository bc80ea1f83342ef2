"""Small Hugging Face BitNet checkpoints for tests, packed with transformers' own functions."""

from __future__ import annotations

import torch

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def assert_equal_but_for_turned_activations(ours, expected):
    """x / (s / 127) here, x * (127 / s) there: now and then an activation rounds the other way,
    which in a model 32 wide moves some logits by 2 % of the largest; their RMS stays far below.
    """
    error = (ours - expected).square().mean().sqrt()
    assert error < 0.03 * expected.square().mean().sqrt()


def write_bitnet(
    directory, linear_class="bitlinear", mode="offline", *, kept=("lm_head",), layers=2
):
    """-> {layer path: (trits [N, K], weight_scale)}; online: {path: (latent weight, None)}."""
    from safetensors.torch import save_file
    from transformers import BitNetConfig, BitNetForCausalLM
    from transformers.integrations.bitnet import pack_weights

    model = BitNetForCausalLM(
        BitNetConfig(**TINY | {"num_hidden_layers": layers}, tie_word_embeddings=True)
    )
    tensors, stored = {}, {}
    for name, value in model.state_dict().items():
        path = name.removesuffix(".weight")
        if "_proj" not in name or path in kept:
            if name != "lm_head.weight":
                tensors[name] = value.clone()
        elif mode == "online":
            tensors[name], stored[path] = value.clone(), (value.clone(), None)
        else:
            trits = torch.randint(-1, 2, value.shape).float()
            scale = torch.rand(1) + 0.5
            tensors[name] = pack_weights(trits.clone())
            tensors[f"{path}.weight_scale"] = scale
            stored[path] = (trits, scale)
    model.config.architectures = ["BitNetForCausalLM"]
    model.config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": mode,
        "modules_to_not_convert": list(kept),
    }
    model.config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return stored
