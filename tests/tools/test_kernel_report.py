"""The kernel report: reading compiler and disassembler output, the checks, the predictions."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

import kernel_model  # noqa: E402
import kernel_report  # noqa: E402

GEMV = (
    "_ZN6bitnet45_GLOBAL__N__40ec7156_12_gemv_dp4a_cu_c56610c9"
    "14GemvDp4aKernelI6__halfLi2ELi0EEEvNS_6ParamsE"
)
IMMA = (
    "_ZN6bitnet45_GLOBAL__N__1_12_tile_imma_cu_f9"
    "14TileImmaKernelIfNS0_6ConfigILi64ELi2ELi2EEELb1EEEvNS_6ParamsE"
)
SPLITS = (
    "_ZN6bitnet43_GLOBAL__N__6a5cb2d0_10_split_k_cu_6ba3800815SumSplitsKernelIffLb1EEEvNS_6ParamsE"
)
PTXAS = f"""
ptxas info    : Compiling entry function '{GEMV}' for 'sm_75'
ptxas info    : Function properties for {GEMV}
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 480 bytes cmem[0]
"""
SASS = f"""
.text.{GEMV}:
.L_x_0:
        /*0000*/                   MUFU.RCP R0, R1 ;
        /*0010*/                   FFMA R0, R1, R2, R3 ;
        /*0020*/                   FFMA R0, R1, R2, R3 ;
        /*0030*/                   FFMA R0, R1, R2, R3 ;
        /*0040*/              @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0048*/                   LDG.E.SYS R0, [R4] ;
        /*0050*/                   STG.E.SYS [R2], R0 ;
.L_x_2:
        /*0060*/                   LDG.E.NA.128.CONSTANT.SYS R4, [R2] ;
        /*0070*/              @!P1 IDP.4A.U8.S8 R0, R4, R5, R0 ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
        /*0090*/              @!P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
"""


def test_names_are_readable():
    assert kernel_report.readable(GEMV) == "GemvDp4aKernel<fp16,2,0>"
    assert kernel_report.readable(IMMA) == "TileImmaKernel<fp32,64,2,2,1>"
    assert kernel_report.readable(SPLITS) == "SumSplitsKernel<fp32,fp32,1>"
    assert kernel_report.readable(SPLITS.replace("IffL", "I6__halfiL").replace("b1", "b0")) == (
        "SumSplitsKernel<fp16,int32,0>"
    )


def test_resources_and_main_loop_are_read():
    (kernel,) = kernel_report.parse_ptxas(PTXAS, "gemv_dp4a.cu")
    assert (kernel.registers, kernel.spill_bytes) == (72, 32)
    ((name, loop, factor_loads),) = kernel_report.parse_sass(SASS)
    assert (name, factor_loads) == (kernel.name, 1)
    # The innermost loop that multiplies, and not the one that divides.
    assert loop == {"LDG.E.NA.128.CONSTANT.SYS": 1, "IDP.4A.U8.S8": 1, "BRA": 1}


def test_check_names_each_problem():
    imma = Counter({"IMMA.8816.U8.S8": 8})
    spilling = kernel_report.Kernel("TileImmaKernel<fp32,64,2,2,1>", "tile_imma.cu", 90, 8, imma)
    dp4a = Counter({"IDP.4A.U8.S8": 64, "LDG.E.NA.128.CONSTANT.SYS": 2})
    wide = kernel_report.Kernel("GemvDp4aKernel<fp16,2,0>", "gemv_dp4a.cu", 65, 0, dp4a)
    narrow_loads = Counter({"IDP.4A.U8.S8": 64, "LDG.E.64": 4, "I2F": 2})
    lost = kernel_report.Kernel("GemvDp4aKernel<fp16,1,0>", "gemv_dp4a.cu", 64, 0, narrow_loads)
    assert problems_of(spilling) == ["TileImmaKernel<fp32,64,2,2,1>: spills 8 bytes of registers"]
    assert problems_of(wide) == ["GemvDp4aKernel<fp16,2,0>: 65 registers, more than 64"]
    assert problems_of(lost) == [
        "GemvDp4aKernel<fp16,1,0>: main loop reads weights by no 16-byte load",
        "GemvDp4aKernel<fp16,1,0>: main loop has I2F",
    ]


def test_a_tile_reads_its_scales_once():
    imma = Counter({"IMMA.8816.U8.S8": 64})
    name = "TileImmaKernel<fp16,64,2,2,1>"
    kernel = kernel_report.Kernel(name, "tile_imma.cu", 168, 0, imma, factor_loads=36)
    assert problems_of(kernel) == []
    kernel.factor_loads = 224
    assert problems_of(kernel) == [
        f"{name}: 224 loads of scales and sums, more than 48: read for every output anew"
    ]


def problems_of(kernel):
    """Without the complaint that the other kernels are absent."""
    return [p for p in kernel_report.problems([kernel]) if p.startswith(kernel.name)]


def test_check_passes_nothing_that_it_did_not_see():
    unseen = kernel_report.Kernel("TileDp4aKernel<fp16,64,1>", "tile_dp4a.cu", 64)
    assert problems_of(unseen) == [
        "TileDp4aKernel<fp16,64,1>: main loop was not found by nvdisasm",
    ]
    assert kernel_report.problems([]) == [
        f"no {name} kernel was found in what nvcc said" for name in kernel_report.PRODUCTS
    ]


def test_check_without_nvdisasm_has_not_passed(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: "/usr/bin/nvcc")
    monkeypatch.setattr(kernel_report, "find_nvdisasm", lambda: None)
    assert kernel_report.main(["--check"]) == kernel_report.EXIT_MISSING
    assert "no check of main loops" in capsys.readouterr().err


def test_float_kernels_decode_to_fp16_beside_the_multiplying_pipe():
    name = "GemvFloatKernel<fp16,1,0>"
    good = Counter({"FFMA": 128, "HFMA2": 64, "HADD2.F32": 128, "LDG.E.NA.128.CONSTANT.SYS": 2})
    assert problems_of(kernel_report.Kernel(name, "gemv_float.cu", 64, 0, good)) == []
    to_fp32 = Counter({"FFMA": 128, "FADD": 128, "LDG.E.NA.128.CONSTANT.SYS": 2})
    assert problems_of(kernel_report.Kernel(name, "gemv_float.cu", 64, 0, to_fp32)) == [
        f"{name}: main loop decodes no weights to fp16",
        f"{name}: main loop has FADD",
    ]


def test_memory_bound_matches_the_arithmetic():
    """facts: at 2 bits a 2560 x 6912 layer takes 23.1 us on a GTX 1660, weights alone."""
    light = Counter({"IDP.4A.U8.S8": 32, "LOP3.LUT": 34})
    card = kernel_model.CARDS[0]
    prediction = kernel_model.predict("GemvDp4aKernel<fp16,1,0>", light, 1, 2560, 6912, card)
    assert prediction.limit == "memory"
    assert prediction.microseconds == pytest.approx(23.1, rel=0.02)


def test_instruction_bound_counts_the_slowest_pipe():
    """A GTX 1660's dp4a peak, 20 TOPS: 64 lanes of 4 on each of 22 multiprocessors."""
    only_dp4a = Counter({"IDP.4A.U8.S8": 256})
    name, card = "TileDp4aKernel<fp16,256,64,4,4,0>", kernel_model.CARDS[0]
    prediction = kernel_model.predict(name, only_dp4a, 256, 4096, 4096, card)
    assert prediction.limit == "dp4a"
    macs = 256 * 4096 * 4096
    assert prediction.microseconds == pytest.approx(macs / (22 * 64 * 4 * 1.785e3), rel=1e-6)


def test_tensor_cores_only_where_they_are_real():
    gtx, t4, _ = kernel_model.CARDS
    assert "TileImmaKernel<fp16,64,2,2,0>" in kernel_model.candidates(64, t4, 8)
    assert not [n for n in kernel_model.candidates(64, gtx, 8) if "Imma" in n]
    assert kernel_model.candidates(3, gtx, 8)[0] == "GemvDp4aKernel<fp16,4,0>"


def test_markdown_replaces_only_its_part(tmp_path):
    document = tmp_path / "performance.md"
    begin, end = kernel_report.MARKS
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    kernel_report.write_markdown(["new"], document)
    assert document.read_text() == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    document.write_text("no marks")
    with pytest.raises(ValueError, match="missing"):
        kernel_report.write_markdown(["new"], document)


def test_without_nvcc_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    assert kernel_report.main(["--check"]) == kernel_report.EXIT_MISSING
    assert "install the CUDA toolkit" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("nvcc") and kernel_report.find_nvdisasm()),
    reason="needs nvcc to compile the kernels and nvdisasm to read them",
)
def test_the_kernels_pass(capsys):
    """No spill, GEMVs within 64 registers, main loops as designed: the machine code gate."""
    assert kernel_report.main(["--check"]) == kernel_report.EXIT_OK, capsys.readouterr().out
    assert "no spills" in capsys.readouterr().out
