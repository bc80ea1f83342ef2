"""Graph passes on onnx-graphsurgeon, one a file; base.py says what a pass is."""

from bitnet_export.passes.base import Pass, PassResult, Skip, run_passes
from bitnet_export.passes.canonicalize import Canonicalize
from bitnet_export.passes.conv_sites import is_ternary_conv
from bitnet_export.passes.fold_batchnorm import FoldBatchNorm
from bitnet_export.passes.fold_constants import FoldConstants
from bitnet_export.passes.lower_2bit import LowerTwoBit
from bitnet_export.passes.lower_int8 import LowerInt8
from bitnet_export.passes.merge_siblings import MergeSiblings
from bitnet_export.passes.opset import raise_opset
from bitnet_export.passes.pack_convolutions import PackConvolutions
from bitnet_export.passes.quantize_embeddings import QuantizeEmbeddings
from bitnet_export.passes.recognise import RecogniseTernary
from bitnet_export.passes.retarget_trt import RetargetTensorRT
from bitnet_export.passes.ternarize_dense import TernarizeDense

ALL_PASSES: tuple[type[Pass], ...] = (
    FoldConstants,
    Canonicalize,
    RecogniseTernary,
    TernarizeDense,
    FoldBatchNorm,
    MergeSiblings,
    PackConvolutions,
    QuantizeEmbeddings,
    LowerInt8,
    LowerTwoBit,
    RetargetTensorRT,
)
OPTIONAL_PASSES: tuple[str, ...] = tuple(p.name for p in ALL_PASSES if p.optional)

__all__ = [
    "ALL_PASSES",
    "OPTIONAL_PASSES",
    "Canonicalize",
    "FoldBatchNorm",
    "FoldConstants",
    "LowerInt8",
    "LowerTwoBit",
    "MergeSiblings",
    "PackConvolutions",
    "Pass",
    "PassResult",
    "QuantizeEmbeddings",
    "RecogniseTernary",
    "RetargetTensorRT",
    "Skip",
    "TernarizeDense",
    "is_ternary_conv",
    "raise_opset",
    "run_passes",
]
