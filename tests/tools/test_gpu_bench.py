"""gpu_check's benchmarks without a GPU: real operands through the emulated kernels, real checks.

Times come from the stand-in of gpu_support.py and mean nothing; no test looks at how long.
"""

import ctypes
import subprocess

import numpy as np
import pytest

from bitnet_export import op, packing
from tests.tools.gpu_support import CpuBlas, CpuTorch, Graph, build_emulated

from gpu_tools import bench, cublas, library, peer, table, timing  # isort: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return build_emulated(tmp_path_factory.mktemp("emulated"))


@pytest.mark.slow
def test_every_family_launches_through_ctypes(emulated):
    rng = np.random.default_rng(3)
    ran = set()
    for shape in (library.Shape(3, 128, 5), library.Shape(3, 128, 5, 64, 0)):
        x = rng.standard_normal((3, 128)).astype(np.float16)
        packed = packing.pack(rng.integers(-1, 2, (5, 128)))
        scale = rng.uniform(0.01, 0.1, shape.scale_count).astype(np.float32)
        at = op.TernaryAttributes(128, 5, shape.group_size, shape.activation_bits)
        scale_shape = at.scale_shapes()[-1]
        want = op.reference_ternary_matmul(x, packed, scale.reshape(scale_shape), attributes=at)
        size = emulated.workspace_bytes(shape)
        raw = np.empty(size + 256, np.uint8)
        workspace = raw.ctypes.data + -raw.ctypes.data % 256
        aligned = np.empty(packed.size + 16, np.uint8)
        start = -aligned.ctypes.data % 16
        aligned[start : start + packed.size] = packed.ravel()
        weights = aligned.ctypes.data + start
        for family in emulated.families(shape, library.FLOAT16):
            y = np.full((3, 5), np.nan, np.float16)
            pointers = (x.ctypes.data, weights, scale.ctypes.data, 0, y.ctypes.data, workspace)
            emulated.launch(family, shape, library.FLOAT16, pointers, size, 0)
            np.testing.assert_allclose(y, want, rtol=2e-3, atol=1e-3)
            ran.add(emulated.family_name(family))
    assert ran == {"gemv_dp4a", "tile_dp4a", "tile_imma", "gemv_float", "tile_float",
                   "tile_hmma", "naive"}  # fmt: skip


@pytest.mark.slow
def test_a_refused_launch_raises(emulated):
    shape = library.Shape(9, 64, 4)
    with pytest.raises(library.LaunchError, match="not supported"):
        emulated.launch(1, shape, library.FLOAT16, (16, 16, 16, 0, 16, 0), 0, 0)


@pytest.fixture
def small(monkeypatch):
    """Shapes and rotations that the emulation gets through."""
    monkeypatch.setattr(bench, "SHAPES", ((64, 6), (128, 3)))
    monkeypatch.setattr(bench, "ROWS", (1, 9))
    monkeypatch.setattr(timing, "MIN_ROTATION_BYTES", 1 << 8)
    monkeypatch.setattr(timing, "LAUNCHES", 3)
    monkeypatch.setattr(timing, "SAMPLES", 4)
    monkeypatch.setattr(timing, "FEW_SAMPLES", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_every_family_is_timed_and_checked_on_every_shape(emulated):
    said, rows = [], []
    left_out = bench.bench_all(CpuTorch(), emulated, 60.0, rows, said.append, CpuBlas())
    assert left_out == []
    assert [(r["m"], r["k"], r["activation_bits"]) for r in rows] == [
        (m, k, bits) for m in (1, 9) for k in (64, 128) for bits in (8, 0)
    ]
    assert table.wrong(rows) == []
    for row in rows:
        many, float_x = row["m"] > 8, row["activation_bits"] == 0
        kinds = {"tile_float", "tile_hmma"} if float_x else {"tile_dp4a", "tile_imma"}
        kinds |= set() if many else {"gemv_float" if float_x else "gemv_dp4a"}
        assert set(row["families"]) == kinds
        for entry in row["families"].values():
            assert len(entry["samples_us"]) == 4
            assert entry["gb_per_s"] > 0
        assert row["baselines"]["cublas_int8"] is None
        assert row["baselines"]["cublas_fp16"]["problem"] is None
    lines = table.bench_table(rows, 300.0)
    assert len(lines) == 1 + len(rows)
    assert said == ["  benchmarked M = 1", "  benchmarked M = 9"]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_group_scales_are_timed_and_checked(emulated, monkeypatch):
    monkeypatch.setattr(bench, "GROUPED_SHAPES", ((256, 3),))
    monkeypatch.setattr(bench, "GROUPED_ROWS", (1, 9))
    rows = []
    assert bench.bench_grouped(CpuTorch(), emulated, 60.0, rows) == []
    assert [(r["m"], r["k"], r["n"], r["group_size"]) for r in rows] == [
        (1, 256, 3, 128),
        (9, 256, 3, 128),
    ]
    assert table.wrong(rows) == []
    assert set(rows[0]["families"]) == {"gemv_dp4a", "tile_dp4a", "tile_imma"}
    assert len(table.bench_table(rows, 300.0)) == 3
    assert bench.bench_grouped(CpuTorch(), emulated, 0.0, []) == [(1, 256, 3), (9, 256, 3)]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_kernel_that_computes_wrongly_is_found(emulated, monkeypatch):
    launch = library.Library.launch

    def wrong(self, family, shape, dtype, pointers, *rest):
        launch(self, family, shape, dtype, pointers, *rest)
        if family == 1:  # gemv_dp4a: one output is off
            y = (ctypes.c_uint16 * (shape.m * shape.n)).from_address(pointers[4])
            y[0] ^= 1

    monkeypatch.setattr(library.Library, "launch", wrong)
    monkeypatch.setattr(bench, "ROWS", (1,))
    rows = []
    bench.bench_all(CpuTorch(), emulated, 60.0, rows, lambda text: None, CpuBlas())
    assert table.wrong(rows) == [
        "gemv_dp4a M=1 K=64 N=6: differs from the naive kernel",
        "gemv_dp4a M=1 K=128 N=3: differs from the naive kernel",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_launch_that_fails_costs_its_own_entry_alone(emulated, monkeypatch):
    launch = library.Library.launch

    def refuse(self, family, *rest):
        if family == 2:
            raise library.LaunchError("CUDA refused the launch")
        launch(self, family, *rest)

    monkeypatch.setattr(library.Library, "launch", refuse)
    found = bench.bench_shape(CpuTorch(), emulated, library.Shape(1, 64, 6, 0, 8), 1024)
    assert found["tile_dp4a"] == {"problem": "failed: CUDA refused the launch"}
    assert found["gemv_dp4a"]["us"] > 0
    row = {"m": 1, "k": 64, "n": 6, "activation_bits": 8, "families": found, "baselines": {}}
    assert table.fastest(row)[0] != "tile_dp4a"
    nothing = row | {"families": {"tile_dp4a": found["tile_dp4a"]}}
    assert "none ran" in table.bench_table([nothing], 300.0)[1]


@pytest.mark.usefixtures("small")
def test_what_time_does_not_allow_is_left_out_and_said():
    rows = []
    left_out = bench.bench_all(CpuTorch(), None, 0.0, rows, lambda text: None, CpuBlas())
    assert rows == []
    assert left_out == [(1, 64, 6), (1, 128, 3), (9, 64, 6), (9, 128, 3)]


ROW = {
    "m": 1, "k": 4096, "n": 14336, "activation_bits": 8,
    "families": {"gemv_dp4a": {"us": 50.0, "gb_per_s": 240.0, "problem": None},
                 "tile_dp4a": {"us": 80.0, "gb_per_s": 150.0, "problem": "left poison"},
                 "tile_imma": {"problem": "failed: refused"}},
    "baselines": {"cublas_fp16": {"us": 400.0, "problem": None}, "cublas_int8": None,
                  "cublas_fp32": {"problem": "failed: out of memory"}},
}  # fmt: skip


def test_table_gives_bandwidth_and_ratios():
    """Made-up numbers: the arithmetic of the table."""
    header, line = table.bench_table([ROW], 300.0)
    assert "cuBLAS" in header
    assert line.split() == ["(4096,", "14336)", "1", "8", "gemv_dp4a", "50.0", "240", "80",
                            "8.00,", "-,", "-"]  # fmt: skip
    assert table.wrong([ROW]) == [
        "tile_dp4a M=1 K=4096 N=14336: left poison",
        "tile_imma M=1 K=4096 N=14336: failed: refused",
        "cublas_fp32 M=1 K=4096 N=14336: failed: out of memory",
    ]


def test_goals_are_met_or_missed_by_the_worst_shape():
    slow = ROW | {"m": 64, "baselines": {"cublas_fp16": {"us": 45.0, "problem": None}}}
    floats = ROW | {"activation_bits": 0, "baselines": {}}
    assert table.goals([ROW, slow, floats], 300.0, 4 << 20) == [
        "goal met: 80 % of the copy bandwidth at M = 1 on (4096, 14336): 80 %",
        "goal met: 5x cuBLAS fp16 at M = 1 where fp16 weights exceed the L2 cache: least 8.00x, "
        "at M, K, N = 1, 4096, 14336",
        "goal MISSED: no slower than cuBLAS fp16 up to M = 64: least 0.90x, at M, K, N = 64, "
        "4096, 14336",
    ]
    assert table.goals([], 300.0, 4 << 20) == []


def test_a_capture_ends_even_where_a_launch_fails():
    calls = []

    def launch():
        calls.append(Graph.capturing)
        if Graph.capturing:
            raise library.LaunchError("refused")

    with pytest.raises(library.LaunchError):
        timing.time_graph(CpuTorch(), [launch])
    assert not Graph.capturing
    assert calls[:2] == [False, False]  # warmed up outside the capture
    assert len(timing.time_graph(CpuTorch(), [lambda: None] * 2)) == timing.SAMPLES


@pytest.mark.parametrize(
    ("launch_ms", "copies", "plan"),
    [
        (0.01, 2, (12, 11)),  # fast: a graph of 24 launches
        (0.01, 1000, (1, 11)),  # enough copies already
        (5.0, 2, (6, 11)),  # cut to about 60 ms a replay
        (40.0, 2, (1, 11)),
        (90.0, 2, (1, 5)),  # one rotation is long: fewer samples
    ],
)
def test_slow_launches_are_repeated_less(launch_ms, copies, plan):
    assert timing.plan_replays(launch_ms, copies) == plan


def test_weights_are_rotated_past_the_cache():
    l2 = 4 << 20
    for weight_bytes in (147_456, 4 << 20, 1 << 29):
        copies = timing.copies_past_cache(weight_bytes, l2)
        assert copies >= 2
        assert copies * weight_bytes >= 4 * l2
    assert bench.traffic(library.Shape(1, 4096, 14336)) == pytest.approx(14336 * 1024, rel=0.01)


def test_random_weights_are_legal_trits_and_differ_between_copies():
    case = bench.random_case(CpuTorch(), library.Shape(2, 128, 6), 3)
    assert case["x"].shape == (2, 128)
    trits = [packing.unpack(w.numpy(), 128) for w in case["w"]]  # refuses the illegal code 0
    assert set(np.unique(trits)) == {-1, 0, 1}
    assert (trits[0] != trits[1]).any()


def test_outputs_are_compared_exactly_for_int8():
    import torch

    shape8, shape0 = library.Shape(1, 64, 2), library.Shape(1, 64, 2, 0, 0)
    want = torch.tensor([[1.0, 2.0]], dtype=torch.float16)
    near = torch.tensor([[1.0, 2.001953125]], dtype=torch.float16)
    assert bench.check_family(torch, want, want, shape8) is None
    assert bench.check_family(torch, near, want, shape8) == "differs from the naive kernel"
    assert bench.check_family(torch, near, want, shape0) is None
    assert bench.check_family(torch, want + 1, want, shape0) == "is off the naive kernel"
    grouped = library.Shape(1, 64, 2, 32)  # its sums are floats
    assert bench.check_family(torch, near, want, grouped) is None
    poison = torch.full_like(want, float("nan"))
    assert bench.check_family(torch, poison, want, shape8) == "left poison in its output"


@pytest.mark.parametrize("baseline", cublas.BASELINES, ids=lambda b: b.name)
def test_baselines_that_compute_something_else_are_found(baseline):
    weights, x, y = bench.baseline_operands(CpuTorch(), baseline, 3, 64, 8, 2)
    assert (weights.shape, x.shape, y.shape) == ((2, 8, 64), (3, 64), (3, 8))
    y.copy_(x.float() @ weights[0].float().T)
    assert bench.check_baseline(x, weights[0], y) is None
    assert "is off by" in bench.check_baseline(x, weights[1], y)


def test_cublas_must_be_loaded():
    with pytest.raises(OSError, match="libcublas is not loaded"):
        cublas.loaded_library()


class TestPeer:
    """A library of the same signature, which writes 1.0 for the layers it knows: what is tested
    is the call and what becomes of it, not the other kernel."""

    SOURCE = """
    #include <cstdint>
    extern "C" void bitlinear_int8xint2(int8_t* x, int8_t* w, uint16_t* y, uint16_t* s,
                                        uint16_t* ws, int M, int N, int K, void* stream) {
      if (M != 1 || K != 128 || *s != 0x3f80 || ws[5] != 0x3f80 || stream) return;
      int read = 0;
      for (int i = 0; i < K; ++i) read += x[i];
      for (int i = 0; i < N * K / 4; ++i) read += w[i];
      for (int n = 0; n < N; ++n) y[n] = read == 1 << 30 ? 0 : 0x3f80;
    }
    """

    @pytest.fixture
    def other(self, tmp_path):
        (tmp_path / "peer.cpp").write_text(self.SOURCE)
        command = ["g++", "-shared", "-fPIC", "-O1", "-o", "libbitnet.so", "peer.cpp"]
        subprocess.run(command, cwd=tmp_path, check=True)
        return tmp_path / "libbitnet.so"

    @pytest.mark.slow
    @pytest.mark.usefixtures("small")
    def test_both_are_timed_on_its_layers(self, other, emulated, monkeypatch):
        monkeypatch.setattr(peer, "SHAPES", ((128, 6), (64, 6)))
        rows = peer.bench_all_shapes(CpuTorch(), peer.Peer(other), emulated, 60.0)
        known, unknown = rows
        assert known["peer"]["problem"] is None
        assert known["ratio"] == pytest.approx(known["peer"]["us"] / known["ours"]["us"])
        assert unknown["ratio"] is None  # it says nothing when it does nothing
        assert "wrote no output" in unknown["peer"]["problem"]
        head, first, second = table.peer_table(rows)
        assert "not checked" in head
        assert first.startswith("      (128, 6)")
        assert "wrote no output" in second

    def test_its_layers_are_legal_for_ours(self):
        for k, n in peer.SHAPES:
            assert k % 64 == 0
            assert n % 16 == 0

    def test_another_library_is_refused(self, tmp_path):
        with pytest.raises(OSError, match="cannot open"):
            peer.Peer(tmp_path / "missing.so")
        (tmp_path / "empty.cpp").write_text("")
        command = ["g++", "-shared", "-fPIC", "-o", "empty.so", "empty.cpp"]
        subprocess.run(command, cwd=tmp_path, check=True)
        with pytest.raises(AttributeError, match="bitlinear_int8xint2"):
            peer.Peer(tmp_path / "empty.so")
