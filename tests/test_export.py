"""torch -> ONNX: one node a layer, module paths, dynamic axes, names, and clear errors."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bitnet_export import onnx_io, op
from bitnet_export.errors import StageError, UsageError
from bitnet_export.export import export_module
from bitnet_export.ternary import TernaryConfig, convert, prepare
from tests.passes.graphs import run


class Net(nn.Module):
    """[B, S, 32] -> ([B, S, 48], [B, S]); two layers, one with no bias, one used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 48, bias=False)
        self.block = nn.Sequential(nn.Linear(48, 48), nn.GELU())

    def forward(self, x, gain):
        h = self.block(self.block(self.first(x)))
        return h * gain, h.sum(-1)


AXES = {"x": {0: "batch", 1: "sequence"}, "gain": {}}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def inputs():
    return {"x": torch.randn(2, 5, 32), "gain": torch.tensor([1.5])}


def to_ternary(module):
    prepare(module, TernaryConfig(keep_head=False))
    convert(module)
    return module


def feeds(inputs):
    return {k: v.numpy() for k, v in inputs.items()}


def test_dense_models_match_torch(net, inputs):
    made = export_module(net, inputs, AXES)
    want = net(**inputs)
    got = list(run(made, **feeds(inputs)).values())
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [None, 18, 20, 21])
def test_one_node_a_layer_with_its_path(net, inputs, opset):
    made = export_module(to_ternary(net), inputs, AXES, opset=opset)
    nodes = [n for n in made.graph.node if n.op_type == op.OP_TYPE]
    assert [onnx_io.node_layer(n) for n in nodes] == ["first", "block.0", "block.0"]
    assert nodes[1].input[1:] == nodes[2].input[1:]  # the shared layer is in the file once
    assert all(len(n.input) == 4 for n in nodes)  # the function body cannot do without a bias
    assert [f.name for f in made.functions] == [op.OP_TYPE]
    assert onnx_io.model_opset(made) == (opset or 20)
    assert made.ir_version == 10
    want = net(**inputs)
    got = list(run(made, **feeds(inputs)).values())
    for one, other in zip(got, want, strict=True):
        # Where an activation rounds the other way, one step of 1/127 of one of 48 products.
        np.testing.assert_allclose(one, other.detach().numpy(), atol=2e-2)


def test_axes_are_dynamic_and_names_stay(net, inputs):
    made = export_module(net, inputs, AXES)
    assert [v.name for v in made.graph.input] == ["x", "gain"]
    assert [v.name for v in made.graph.output] == ["output_0", "output_1"]
    dims = made.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", "sequence", 32]
    assert run(made, x=np.zeros((1, 9, 32), np.float32), gain=np.ones(1, np.float32))[
        "output_1"
    ].shape == (1, 9)


def test_asked_names(net, inputs):
    made = export_module(net, inputs, AXES, output_names=["h", "total"])
    assert [v.name for v in made.graph.output] == ["h", "total"]


def test_an_example_of_size_one_still_exports_dynamic(net):
    made = export_module(net, {"x": torch.randn(1, 1, 32), "gain": torch.ones(1)}, AXES)
    y = run(made, x=np.zeros((3, 4, 32), np.float32), gain=np.ones(1, np.float32))
    assert y["output_0"].shape == (3, 4, 48)


def test_a_static_model(net, inputs):
    made = export_module(net, inputs, {})
    dims = made.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [2, 5, 32]


def test_nothing_of_the_machine_is_in_the_file(net, inputs):
    made = export_module(to_ternary(net), inputs, AXES)
    text = made.SerializeToString()
    assert b".py" not in text
    assert b"site-packages" not in text
    keys = {p.key for n in made.graph.node for p in n.metadata_props}
    assert keys <= {onnx_io.LAYER_KEY}
    assert made.producer_name == "bitnet-export"


def test_half_precision_layers(inputs):
    net = to_ternary(nn.Sequential(nn.Linear(32, 48)).eval()).half()
    for module in net.modules():  # scale and bias are float32 whatever the activations are
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype == torch.float16:
                setattr(module, name, buffer.float())
    made = export_module(net, {"input": inputs["x"].half()}, {"input": {0: "batch"}})
    assert made.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    y = run(made, input=inputs["x"].half().numpy())["output"]
    np.testing.assert_allclose(y, net(inputs["x"].half()).detach().numpy(), atol=1e-2)


class Branches(nn.Module):
    """Control flow on data, which cannot be exported."""

    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_what_torch_cannot_export(capsys):
    with pytest.raises(StageError, match="torch could not export the model") as caught:
        export_module(Branches(), {"x": torch.randn(3)}, {})
    assert caught.value.where == "Branches"
    assert "\n" not in caught.value.what
    assert capsys.readouterr().out == ""


def test_an_opset_without_the_operators_of_the_function(net, inputs):
    with pytest.raises(UsageError, match=r"--opset 17: .* needs opset 18"):
        export_module(net, inputs, AXES, opset=17)
