"""quantize-embeddings: both forms against NumPy, for every rank of indices."""

import numpy as np
import pytest

from bitnet_export.passes import QuantizeEmbeddings
from bitnet_export.passes.quantize_embeddings import quantize_blocks, zero_point
from tests.passes.graphs import (
    apply,
    initializers,
    model,
    node,
    ops,
    reasons,
    run,
    value,
    x_of,
)

V = 300


def gather(dim=128, shape=("batch", "sequence"), dtype="int64", table=None, axis=0):
    table = x_of(V, dim) if table is None else table
    element = table.dtype.name
    return model(
        [node("Gather", ["table", "ids"], ["y"], "embed", axis=axis)],
        [value("ids", shape, dtype)],
        [value("y", [*shape, table.shape[1]], element)],
        {"table": table},
    )


def expected(table, bits, block, ids):
    codes, scale = quantize_blocks(table.astype(np.float32), bits, block)
    whole = (codes.astype(np.float32) - zero_point(bits)) * np.repeat(scale, block, axis=1)
    return whole[ids]


@pytest.mark.parametrize("contrib", [True, False], ids=["contrib", "standard"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("shape", "dims"),
    [([], ()), (["n"], (7,)), (["b", "s"], (2, 5)), (["b", "s", "t"], (2, 3, 4)), (["n"], (0,))],
    ids=str,
)
def test_every_rank_of_indices(contrib, bits, shape, dims):
    made = gather(shape=shape)
    after, (result,) = apply(made, QuantizeEmbeddings(bits, contrib=contrib))
    assert result.rewritten == 1
    ids = np.random.default_rng(1).integers(0, V, dims)
    got = run(after, ids=np.asarray(ids))["y"]
    block = 128 if bits == 8 else 32
    want = expected(x_of(V, 128), bits, block, ids)
    assert got.shape == (*dims, 128)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("contrib", [True, False], ids=["contrib", "standard"])
@pytest.mark.parametrize(
    ("bits", "dim", "block"), [(8, 96, 32), (8, 320, 64), (8, 48, 16), (4, 48, 16)]
)
def test_the_largest_block_that_divides_a_row(contrib, bits, dim, block):
    after, _ = apply(gather(dim), QuantizeEmbeddings(bits, contrib=contrib))
    ids = np.array([[0, V - 1, 3]])
    want = expected(x_of(V, dim), bits, block, ids)
    np.testing.assert_allclose(run(after, ids=ids)["y"], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("contrib", [True, False], ids=["contrib", "standard"])
@pytest.mark.parametrize("bits", [8, 4])
def test_int32_and_negative_indices(contrib, bits):
    made = gather(dtype="int32", shape=("n",), axis=-2)
    after, _ = apply(made, QuantizeEmbeddings(bits, contrib=contrib))
    ids = np.array([-1, 0, -V], np.int32)
    want = expected(x_of(V, 128), bits, 128 if bits == 8 else 32, ids)
    np.testing.assert_allclose(run(after, ids=ids)["y"], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 4])
def test_float16_tables_stay_float16(bits):
    table = x_of(V, 128, dtype=np.float16)
    after, _ = apply(gather(table=table), QuantizeEmbeddings(bits, contrib=False))
    ids = np.array([[5, 6]])
    got = run(after, ids=ids)["y"]
    assert got.dtype == np.float16
    want = expected(table, bits, 128 if bits == 8 else 32, ids)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)  # float16 scales: 11 bits


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.5 / 127), (4, 0.5 / 7)])
def test_error_is_half_a_step_of_the_largest_weight(bits, limit):
    table = x_of(40, 128)
    table[3] = 0
    codes, scale = quantize_blocks(table, bits, 32)
    back = (codes.astype(np.float32) - zero_point(bits)) * np.repeat(scale, 32, axis=1)
    peak = np.abs(table.reshape(40, 4, 32)).max(-1)
    assert (np.abs(back - table).reshape(40, 4, 32).max(-1) <= peak * limit * 1.0001 + 1e-9).all()
    assert not back[3].any()


def test_two_gathers_share_the_codes():
    made = model(
        [node("Gather", ["table", "a"], ["p"]), node("Gather", ["table", "b"], ["q"])],
        [value("a", ["n"], "int64"), value("b", ["n"], "int64")],
        [value("p", ["n", 128]), value("q", ["n", 128])],
        {"table": x_of(V, 128)},
    )
    after, _ = apply(made, QuantizeEmbeddings(8))
    assert ops(after) == ["GatherBlockQuantized"] * 2
    assert len(initializers(after)) == 2


def test_reasons():
    def reason(made, contrib=True):
        after, (result,) = apply(made, QuantizeEmbeddings(8, contrib=contrib))
        assert "Gather" in ops(after)
        assert result.rewritten == 0
        return reasons(result)["table"]

    assert reason(gather(table=x_of(300, 20))) == "rows of 20 are not whole blocks of 16"
    assert reason(gather(table=x_of(10, 128))) == "5120 bytes are too few to matter"
    broken = x_of(V, 128)
    broken[0, 0] = np.nan
    assert reason(gather(table=broken)) == "holds NaN or Inf"
    columns = model(
        [node("Gather", ["table", "ids"], ["y"], axis=1)],
        [value("ids", ["n"], "int64")],
        [value("y", [V, "n"])],
        {"table": x_of(V, 128)},
    )
    assert reason(columns) == "gathers columns, not rows"
    tied = model(
        [
            node("Gather", ["table", "ids"], ["h"]),
            node("Transpose", ["table"], ["head"], perm=[1, 0]),
            node("MatMul", ["h", "head"], ["y"]),
        ],
        [value("ids", ["n"], "int64")],
        [value("y", ["n", V])],
        {"table": x_of(V, 128)},
    )
    assert reason(tied) == "also read by Transpose Transpose_head"


def test_indices_of_unknown_rank():
    made = gather(shape=("n",))
    made.graph.input[0].type.tensor_type.ClearField("shape")
    made.graph.output[0].type.tensor_type.ClearField("shape")
    from bitnet_export.passes import run_passes

    after, (result,) = run_passes(made, [QuantizeEmbeddings(8, contrib=False)])
    assert ops(after) == ["Gather"]
    assert reasons(result) == {"table": "the rank of the indices is not known"}
    after, _ = run_passes(made, [QuantizeEmbeddings(8, contrib=True)])
    ids = np.array([4, 2])
    np.testing.assert_allclose(
        run(after, ids=ids)["y"], expected(x_of(V, 128), 8, 128, ids), rtol=1e-6, atol=1e-7
    )
