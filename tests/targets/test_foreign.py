"""Ternary checkpoints of others on every target: each layer computes with the file's own trits."""

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from bitnet_export import onnx_io
from bitnet_export.export import export_module
from bitnet_export.load import load
from bitnet_export.options import TARGETS, ExportOptions
from bitnet_export.targets import target_for
from bitnet_export.ternary import TernaryConfig, convert, prepare
from bitnet_export.verify.exact import check_layers
from bitnet_export.verify.feeds import make_cases
from bitnet_export.verify.layers import layer_name
from tests.load.bitnet_files import write_bitnet
from tests.load.gguf_files import PATHS, write_llama

SIZES = {"batch": 2, "sequence": 5}


@pytest.fixture(scope="module", params=["gguf", "bitnet"])
def foreign(request, tmp_path_factory):
    """(loaded model, its ternary ONNX file, {layer: trits [N, K] in the order of the model})."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "gguf":
        from tests.load.test_gguf import stored_order

        stored = write_llama(directory / "m.gguf", scales="row", layers=1)
        loaded = load(directory / "m.gguf")
    else:
        layers = write_bitnet(directory, layers=1)
        loaded = load(directory)
    prepare(loaded.module, TernaryConfig(exclude=tuple(loaded.float_layers)))
    convert(loaded.module)
    model = export_module(
        loaded.module,
        loaded.example_inputs,
        loaded.dynamic_axes,
        axis_limits=loaded.axis_limits,
        output_names=loaded.output_names,
    )
    onnx_io.write_model(model, directory / "ternary.onnx")
    if request.param == "bitnet":
        return loaded, directory / "ternary.onnx", {f"model.{n}": t for n, (t, _) in layers.items()}
    # query and key are stored in another order of rows, which the expected trits undo
    trits = {}
    for name, path in PATHS.items():
        weight = np.sign(stored[f"blk.0.{name}.weight"])
        order = stored_order(name, np.arange(len(weight))[:, None])[:, 0]
        trits[f"model.model.layers.0.{path}"] = weight[np.argsort(order)]
    return loaded, directory / "ternary.onnx", trits


def test_the_graph_holds_the_files_trits(foreign):
    from onnx import numpy_helper

    from bitnet_export.packing import unpack

    _, path, trits = foreign
    model = onnx_io.read_model(path)
    constants = {t.name: t for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "TernaryMatMul":
            k = next(a.i for a in node.attribute if a.name == "K")
            packed = numpy_helper.to_array(constants[node.input[1]])
            found[layer_name(node)] = unpack(packed, k)
    assert found.keys() == trits.keys()
    for name, expected in trits.items():
        assert np.array_equal(found[name], expected), name


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_computes_with_them(foreign, tmp_path, target):
    loaded, path, trits = foreign
    options = ExportOptions(model=tmp_path / "m", target=target, engine=False, embeddings="int8")
    lowered = target_for(target).lower(onnx_io.read_model(path), options, SIZES)
    onnx_io.write_model(lowered.model, tmp_path / "model.onnx")
    cases = make_cases([SIZES], loaded.example_inputs, loaded.dynamic_axes)
    rows = check_layers(path, tmp_path / "model.onnx", cases, lowered.parity_kinds)
    assert [row.reason for row in rows if not row.passed] == []
    assert f"each of {len(trits)} layers" in rows[0].pair
