"""Exported attention: what serves nothing is gone, what serves something stays, numbers hold."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from bitnet_export.export import export_module
from bitnet_export.export_attention import simplify_attention


class Attention(torch.nn.Module):
    """Scaled dot product attention over [batch, heads, sequence, 8] with a mask of the keys."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        batch, sequence, _ = x.shape
        x = x.reshape(batch, sequence, 2, 8).transpose(1, 2)
        mask = valid[:, None, None].expand(batch, 1, sequence, sequence)
        if self.mask == "float":
            mask = torch.where(mask, 0.0, -1e9)
        return torch.nn.functional.scaled_dot_product_attention(
            x, x, 2 * x, attn_mask=None if self.mask == "none" else mask
        )


@pytest.mark.parametrize(
    ("mask", "dynamic"), [("bool", True), ("bool", False), ("float", True), ("none", True)]
)
def test_keys_are_transposed_once_and_nothing_looks_for_nan(mask: str, dynamic: bool) -> None:
    module = Attention(mask).eval()
    inputs = {"x": torch.randn(2, 5, 16), "valid": torch.ones(2, 5, dtype=torch.bool)}
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs} if dynamic else {}
    model = export_module(module, inputs, axes)

    count = Counter(node.op_type for node in model.graph.node)
    assert count["IsNaN"] == 0
    assert count["Transpose"] == 2, count  # of x, which is all three, and of the keys
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read

    session = ort.InferenceSession(model.SerializeToString())
    for batch, sequence in ((2, 5), (3, 9)) if dynamic else ((2, 5),):
        x, valid = torch.randn(batch, sequence, 16), torch.ones(batch, sequence, dtype=torch.bool)
        valid[0, 3:] = False
        feeds = {"x": x.numpy(), "valid": valid.numpy()}
        names = {value.name for value in session.get_inputs()}
        got = session.run(None, {k: v for k, v in feeds.items() if k in names})[0]
        np.testing.assert_allclose(got, module(x, valid).numpy(), atol=1e-5)


class AnyAttention(torch.nn.Module):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            x, x[..., :], value=2 * x, attn_mask=valid
        )


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((5, 8), (5, 5)),
        ((2, 5, 8), (2, 5, 5)),
        ((2, 3, 4, 5, 8), (4, 5, 5)),
    ],
)
def test_attention_of_any_number_of_axes(shape: tuple[int, ...], mask: tuple[int, ...]) -> None:
    module = AnyAttention().eval()
    inputs = {"x": torch.randn(shape), "valid": torch.rand(mask) < 0.8}
    inputs["valid"][..., 0] = True
    axes = {"x": {0: "batch"}} if shape[0] != mask[0] else {}
    model = export_module(module, inputs, axes)
    got = ort.InferenceSession(model.SerializeToString()).run(
        None, {name: value.numpy() for name, value in inputs.items()}
    )[0]
    np.testing.assert_allclose(got, module(**inputs).numpy(), atol=1e-5)


def graph_of(nodes: list[onnx.NodeProto], lowest: float, **shapes: list[int]) -> onnx.ModelProto:
    """x [1, 2, 4] -> y, with the constants that the tests use."""
    constants = [
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("lowest", TensorProto.FLOAT, [], [lowest]),
        helper.make_tensor("flat", TensorProto.INT64, [3], [-1, 2, 4]),
        *(helper.make_tensor(k, TensorProto.INT64, [len(v)], v) for k, v in shapes.items()),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4])
    valid = helper.make_tensor_value_info("valid", TensorProto.BOOL, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x, valid], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def guarded(where: list[str]) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Where", ["valid", "zero", "lowest"], ["mask"]),
        helper.make_node("Add", ["x", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["p"], axis=-1),
        helper.make_node("IsNaN", ["p"], ["nan"]),
        helper.make_node("Where", where, ["safe"]),
        helper.make_node("Relu", ["safe"], ["y"]),
    ]


def test_a_guard_that_may_be_needed_stays() -> None:
    infinite = graph_of(guarded(["nan", "zero", "p"]), -np.inf)
    other_value = graph_of(guarded(["nan", "lowest", "p"]), -1e30)
    other_tensor = graph_of(guarded(["nan", "zero", "x"]), -1e30)
    for model in (infinite, other_value, other_tensor):
        before = model.SerializeToString()
        assert not simplify_attention(model)
        assert model.SerializeToString() == before
    finite = graph_of(guarded(["nan", "zero", "p"]), -1e30)
    assert simplify_attention(finite) == {"guards": 1}
    assert [node.op_type for node in finite.graph.node] == ["Where", "Add", "Softmax", "Relu"]
    assert finite.graph.node[-1].input[0] == "p"


def test_reshaping_that_is_no_transposition_of_the_keys_stays() -> None:
    def model(after: list[int]) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Reshape", ["x", "flat"], ["a"]),
            helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
            helper.make_node("Reshape", ["b", "after"], ["y"]),
        ]
        return graph_of(nodes, 0.0, after=after)

    assert not simplify_attention(model([1, 2, 4]))
    assert not simplify_attention(model([2, 2, 2]))
    simple = model([1, 4, 2])
    assert simplify_attention(simple) == {"transposes": 1}
    (node,) = simple.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Transpose", ["x"], ["y"])
    assert list(node.attribute[0].ints) == [0, 2, 1]


def test_what_a_branch_reads_stays() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["nan"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.BOOL, None)],
    )
    model = graph_of(guarded(["nan", "zero", "p"]), -1e30)
    choice = helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch)
    model.graph.node.append(choice)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.BOOL, None))
    assert simplify_attention(model) == {"guards": 1}
    assert "IsNaN" in {node.op_type for node in model.graph.node}
