"""gpu_check without a GPU: that it builds, what it says when it cannot run, and its Python parts.

The calls from Python into the kernels are tested against the host emulation, whose library has
the same C functions as the one for a card.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bitnet_export import op, packing

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

import gpu_check  # noqa: E402
from gpu_tools import bench, cublas, library  # noqa: E402

PLUGINS = REPOSITORY / "plugins"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """bridge.cu and the kernels as a shared library for the host."""
    if not shutil.which("g++"):
        pytest.skip("needs g++ to compile the emulated kernels")
    path = tmp_path_factory.mktemp("emulated") / "libbridge.so"
    sources = [*sorted(library.KERNELS.glob("*.cu")), Path(library.__file__).with_name("bridge.cu")]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w"]
    includes = [f"-I{library.KERNELS}", f"-I{PLUGINS / 'emulation'}"]
    command = ["g++", *flags, "-DBITNET_EMULATION", *includes, "-o", str(path), "-x", "c++"]
    command += [*map(str, sources), str(PLUGINS / "emulation" / "scheduler.cpp")]
    subprocess.run(command, check=True)
    return library.Library(path)


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
        size = emulated.workspace_bytes(shape, library.FLOAT16)
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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc to compile the CUDA part")
def test_the_cuda_part_builds(tmp_path):
    built = library.build(shutil.which("nvcc"), tmp_path, 75)
    assert all(path.is_file() for path in built)


def test_a_compiler_error_is_shown(tmp_path):
    script = [sys.executable, "-c", "import sys; sys.exit('syntax error here')"]
    with pytest.raises(library.BuildError, match="syntax error here"):
        library.run_all([script])


def test_without_nvcc_it_exits_3_and_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    out = tmp_path / "out.json"
    assert gpu_check.main(["--out", str(out)]) == gpu_check.EXIT_MISSING
    assert "install the CUDA toolkit" in capsys.readouterr().err
    assert not out.exists()


def test_without_a_gpu_it_exits_3_and_says_so(monkeypatch, capsys):
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), __version__="2.0")
    monkeypatch.setattr(gpu_check, "find_nvcc", lambda: "nvcc")
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert gpu_check.main([]) == gpu_check.EXIT_MISSING
    assert "no GPU that torch 2.0 can use" in capsys.readouterr().err


def test_an_old_card_is_refused(monkeypatch):
    card = SimpleNamespace(name="GTX 1080", major=6, minor=1)
    cuda = SimpleNamespace(is_available=lambda: True, get_device_properties=lambda _: card)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with pytest.raises(gpu_check.Missing, match=r"GTX 1080.*it has 61"):
        gpu_check.find_gpu()


ROW = {
    "m": 1, "k": 4096, "n": 14336, "activation_bits": 8,
    "families": {"gemv_dp4a": {"us": 50.0, "gb_per_s": 240.0, "problem": None},
                 "tile_dp4a": {"us": 80.0, "gb_per_s": 150.0, "problem": "left poison"}},
    "baselines": {"cublas_fp16": {"us": 400.0}, "cublas_int8": None},
}  # fmt: skip


def test_table_gives_bandwidth_and_ratios():
    header, line = gpu_check.table([ROW], 300.0)
    assert "cuBLAS" in header
    assert line.split() == ["(4096,", "14336)", "1", "8", "gemv_dp4a", "50.0", "240", "80",
                            "8.00,", "-"]  # fmt: skip


def test_a_wrong_output_fails_the_check(tmp_path, monkeypatch, capsys):
    results = {"rows": [ROW], "wrong": gpu_check.wrong([ROW]), "numbers": {"passed": True}}
    monkeypatch.setattr(gpu_check, "check", lambda options, folder: results)
    out = tmp_path / "out.json"
    assert gpu_check.main(["--out", str(out)]) == gpu_check.EXIT_FAILED
    assert "WRONG: tile_dp4a M=1 K=4096 N=14336: left poison" in capsys.readouterr().err
    assert json.loads(out.read_text())["numbers"] == {"passed": True}


@pytest.mark.parametrize(
    ("result", "good"),
    [
        ({"numbers": {"passed": True}, "sanitizer": {"skipped": "not installed"}}, True),
        ({"numbers": {"passed": True}, "sanitizer": {"memcheck": {"passed": False}}}, False),
        ({"numbers": {"passed": False}}, False),
    ],
)
def test_steps_that_fail_fail_the_whole(result, good):
    assert gpu_check.passed(result) is good


def test_a_step_that_fails_or_hangs_is_reported():
    failing = gpu_check.run_step([sys.executable, "-c", "print('broken'); exit(1)"], 60)
    assert not failing["passed"]
    assert "broken" in failing["output"]
    hanging = gpu_check.run_step([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert not hanging["passed"]
    assert "not finished" in hanging["output"]


def test_golden_data_is_fresh_for_each_seed(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        gpu_check.write_golden(tmp_path / name, seed, "--small")
    a, b, c = (tmp_path / name for name in "abc")
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()


def test_weights_are_rotated_past_the_cache():
    l2 = 4 << 20
    for weight_bytes in (147_456, 4 << 20, 1 << 29):
        copies = bench.copies_past_cache(weight_bytes, l2)
        assert copies >= 2
        assert copies * weight_bytes >= 4 * l2
    assert bench.traffic(library.Shape(1, 4096, 14336)) == pytest.approx(14336 * 1024, rel=0.01)


def test_random_weights_are_legal_trits_and_differ_between_copies():
    import torch

    case = bench.random_case(torch, library.Shape(2, 128, 6), 3, device="cpu")
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
    poison = torch.full_like(want, float("nan"))
    assert bench.check_family(torch, poison, want, shape8) == "left poison in its output"


def test_cublas_must_be_loaded():
    with pytest.raises(OSError, match="libcublas is not loaded"):
        cublas.loaded_library()
