"""Export tiny random models of many architectures: the table of docs/models.md.

    python tools/architectures.py                   # all, 10 to 30 seconds each on one core
    python tools/architectures.py Whisper Mixtral   # some, printed only
    python tools/architectures.py --write           # all, into docs/models.md

Each model goes the way a user's directory goes: written by transformers, loaded from its
configuration, made ternary without training, lowered to stock ONNX Runtime operators, verified.
What is asked is whether every step works and agrees, not how good a random model is.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accuracy_table
import torch
import transformers

import bitnet_export as be
from bitnet_export.errors import BitnetExportError

DOC = Path(__file__).resolve().parents[1] / "docs" / "models.md"
Fields = dict[str, Any]

BLOCKS: Fields = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
)
TEXT: Fields = {**BLOCKS, "vocab_size": 128, "max_position_embeddings": 64}
TOKENS: Fields = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
DECODER: Fields = {**TEXT, **TOKENS, "num_key_value_heads": 2}
IMAGES: Fields = {**BLOCKS, "image_size": 32, "patch_size": 8}
TOWERS: Fields = dict(text_config={**TEXT, **TOKENS}, vision_config=IMAGES)
EXPERTS: Fields = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
BOTH_SIDES: Fields = dict(
    vocab_size=128,
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    decoder_start_token_id=1,
    **TOKENS,
)


@dataclass(frozen=True)
class Spec:
    """A model class of transformers, its configuration's class and fields."""

    model: str
    fields: Fields = field(default_factory=dict)
    config: str = ""

    def make(self) -> Any:
        """The model with random weights."""
        family = self.config or next(
            self.model.removesuffix(end) for end in ENDS if self.model.endswith(end)
        )
        # A copy: some configurations write into the parts they are given.
        config = getattr(transformers, f"{family}Config")(**copy.deepcopy(self.fields))
        torch.manual_seed(0)
        return getattr(transformers, self.model)(config).eval()


ENDS = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForSemanticSegmentation",
    "ForAudioClassification",
    "ForConditionalGeneration",
    "ForCausalLM",
    "ForMaskedLM",
    "ForCTC",
    "LMHeadModel",
    "EncoderModel",
    "Model",
)
T5: Fields = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=128)
DISTIL: Fields = dict(dim=64, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=128)

FAMILIES: dict[str, list[Spec]] = {
    "text encoders": [
        Spec("BertForSequenceClassification", TEXT),
        Spec("RobertaForMaskedLM", TEXT),
        Spec("DistilBertModel", DISTIL),
        Spec("AlbertModel", {**TEXT, "embedding_size": 32}),
        Spec("ElectraModel", {**TEXT, "embedding_size": 32}),
        Spec("MPNetModel", TEXT),
        Spec("DebertaV2Model", {**TEXT, "relative_attention": True, "position_buckets": 16}),
        Spec("ModernBertModel", {**TEXT, **TOKENS, "cls_token_id": 3, "sep_token_id": 4}),
        Spec("T5EncoderModel", T5),
    ],
    "decoders": [
        Spec(
            "GPT2LMHeadModel",
            dict(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, **TOKENS),
        ),
        Spec("OPTForCausalLM", {**TEXT, **TOKENS, "ffn_dim": 128, "word_embed_proj_dim": 64}),
        Spec("GPTNeoXForCausalLM", {**TEXT, **TOKENS}),
        Spec("FalconForCausalLM", {**BLOCKS, **TOKENS, "vocab_size": 128}),
        Spec("BloomForCausalLM", dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=128)),
        Spec("LlamaForCausalLM", DECODER),
        Spec("MistralForCausalLM", DECODER),
        Spec("Qwen2ForCausalLM", DECODER),
        Spec("Qwen3ForCausalLM", {**DECODER, "head_dim": 16}),
        Spec("GemmaForCausalLM", {**DECODER, "head_dim": 16}),
        Spec("Gemma2ForCausalLM", {**DECODER, "head_dim": 16, "sliding_window": 8}),
        Spec(
            "Gemma3ForCausalLM",
            {**DECODER, "head_dim": 16, "sliding_window": 8},
            config="Gemma3Text",
        ),
        Spec("PhiForCausalLM", {**TEXT, **TOKENS}),
        Spec("Phi3ForCausalLM", DECODER),
        Spec("SmolLM3ForCausalLM", DECODER),
        Spec("BitNetForCausalLM", DECODER),
    ],
    "mixtures of experts": [
        Spec("MixtralForCausalLM", {**DECODER, "num_local_experts": 4}),
        Spec("Qwen3MoeForCausalLM", {**DECODER, **EXPERTS, "head_dim": 16}),
        Spec("OlmoeForCausalLM", {**DECODER, **EXPERTS}),
        Spec("GptOssForCausalLM", {**DECODER, "num_local_experts": 4, "head_dim": 16}),
    ],
    "encoder and decoder": [
        Spec("T5ForConditionalGeneration", T5),
        Spec("BartForConditionalGeneration", {**BOTH_SIDES, "max_position_embeddings": 64}),
        Spec(
            "WhisperForConditionalGeneration",
            {**BOTH_SIDES, "num_mel_bins": 16, "max_source_positions": 50},
        ),
    ],
    "images": [
        Spec("ViTForImageClassification", IMAGES),
        Spec("Dinov2Model", IMAGES),
        Spec("SiglipVisionModel", IMAGES),
        Spec(
            "SwinForImageClassification",
            dict(
                image_size=32,
                patch_size=4,
                embed_dim=32,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
            ),
        ),
        Spec(
            "SegformerForSemanticSegmentation",
            dict(
                hidden_sizes=[16, 32, 32, 64],
                depths=[1] * 4,
                num_attention_heads=[1, 2, 2, 4],
                decoder_hidden_size=32,
                image_size=64,
            ),
        ),
        Spec(
            "ConvNextForImageClassification",
            dict(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2, image_size=32),
        ),
        Spec(
            "ResNetForImageClassification",
            dict(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1]),
        ),
    ],
    "audio": [
        Spec("ASTForAudioClassification", {**BLOCKS, "max_length": 64, "num_mel_bins": 32}),
        Spec(
            "Wav2Vec2BertForCTC", {**BLOCKS, "vocab_size": 32, "feature_projection_input_dim": 40}
        ),
    ],
    "two towers": [
        Spec("CLIPModel", {**TOWERS, "projection_dim": 32}),
        Spec("SiglipModel", TOWERS),
    ],
}


@dataclass(frozen=True)
class Outcome:
    """What became of one model. ternary: layers of all that could be; share: of their weights."""

    family: str
    model: str
    ternary: str = ""
    agree: str = ""
    problem: str = ""


def try_one(family: str, spec: Spec, directory: Path) -> Outcome:
    """Write, export and verify one model."""
    source = directory / spec.model
    spec.make().save_pretrained(source)
    options = be.ExportOptions(
        model=source, target="ort", output=directory / "out", bench=False, overwrite=True, threads=1
    )
    try:
        report = be.run_export(options)
    except BitnetExportError as error:
        return Outcome(family, spec.model, problem=str(error).splitlines()[0])
    layers = [row for row in report.layers if row.status == "ternary"]
    agreeing = sum(row.passed for row in report.parity)
    problem = "" if report.passed else "; ".join(g.detail for g in report.gates if not g.passed)
    agree = f"{agreeing} of {len(report.parity)}"
    return Outcome(family, spec.model, str(len(layers)), agree, problem)


def table(outcomes: list[Outcome]) -> str:
    """As markdown."""
    head = ["| kind | model | ternary layers | comparisons that agree | |", "|---|---|---|---|---|"]
    rows = [
        f"| {o.family} | `{o.model}` | {o.ternary} | {o.agree} | {o.problem} |" for o in outcomes
    ]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return "\n".join(
        [*head, *rows, "", f"Made by `python tools/architectures.py --write`: {versions}."]
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a model failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of class names; default: all")
    parser.add_argument("--write", action="store_true", help="update docs/models.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes = []
    for family, specs in FAMILIES.items():
        for spec in specs:
            if options.names and not any(name in spec.model for name in options.names):
                continue
            with tempfile.TemporaryDirectory() as directory:
                outcomes.append(try_one(family, spec, Path(directory)))
            print(*vars(outcomes[-1]).values(), sep=" | ", flush=True)
    text = table(outcomes)
    if options.write and not options.names:
        accuracy_table.write("architectures", text, DOC)
    elif not outcomes:
        parser.error(f"no model is called like {', '.join(options.names)}")
    return int(any(one.problem for one in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
