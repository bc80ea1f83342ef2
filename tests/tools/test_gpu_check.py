"""gpu_check without a GPU: that it builds, what it says when it cannot run, how steps end, and
that its C signatures are those of the sources. Benchmarks: test_gpu_bench.py.
"""

import ctypes
import json
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.tools.gpu_support import REPOSITORY, CpuTorch

import gpu_check  # isort: skip
from gpu_tools import library, steps  # isort: skip

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="needs nvcc to compile the CUDA part")


C_TYPES = {
    "int": ctypes.c_int,
    "size_t": ctypes.c_size_t,
    "int*": ctypes.POINTER(ctypes.c_int),
    "const int*": ctypes.POINTER(ctypes.c_int),
    "void* const*": ctypes.POINTER(ctypes.c_void_p),
    "void*": ctypes.c_void_p,
    "const char*": ctypes.c_char_p,
}


def test_the_signatures_are_those_of_the_bridge():
    source = (REPOSITORY / "tools" / "gpu_tools" / "bridge.cu").read_text()
    exported = source[source.index('extern "C" {') :]
    found = re.findall(r"^([\w ]+?\*?) (bitnet_\w+)\(([^)]*)\)", exported, re.MULTILINE)
    declared = {
        name: (C_TYPES[result], tuple(C_TYPES[argument_type(a)] for a in arguments.split(",") if a))
        for result, name, arguments in found
    }
    assert declared == library.SIGNATURES


def argument_type(argument):
    """ " const int* shape" -> "const int*"."""
    return " ".join(argument.split()).rpartition(" ")[0]


@pytest.mark.slow
@needs_nvcc
def test_the_cuda_part_builds(tmp_path):
    built = library.build(NVCC, tmp_path, library.target_flag(NVCC, 75))
    assert all(path.is_file() for path in built)


@needs_nvcc
def test_the_target_is_the_cards_own_code_where_nvcc_knows_it():
    assert library.target_flag(NVCC, 75) == "-gencode=arch=compute_75,code=sm_75"
    newest = library.target_flag(NVCC, 999)  # a card of the future: PTX of the newest known
    found = re.fullmatch(r"-gencode=arch=compute_(\d+),code=compute_\1", newest)
    assert found
    assert int(found[1]) >= 90
    with pytest.raises(library.BuildError, match="the card is 30"):
        library.target_flag(NVCC, 30)


def test_a_compiler_error_is_shown():
    script = [sys.executable, "-c", "import sys; sys.exit('syntax error here')"]
    with pytest.raises(library.BuildError, match="syntax error here"):
        library.run_all([[sys.executable, "-c", "pass"], script])


def test_a_compiler_that_hangs_is_stopped():
    with pytest.raises(library.BuildError, match="not finished after"):
        library.run_all([[sys.executable, "-c", "import time; time.sleep(60)"]], 0.5)


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


class TestSteps:
    def make(self, seconds=60.0):
        self.said, self.kept = [], []
        return steps.Steps(steps.Budget(seconds), self.said.append, lambda r: self.kept.append(r))

    def raising(self, error):
        def action(seconds):
            raise error

        return action

    def test_a_pass_records_what_it_found_and_how_long_it_took(self):
        made = self.make()
        assert made.do("numbers", 10.0, lambda seconds: {"limit": seconds})
        entry = made.results["numbers"]
        assert (entry["status"], entry["limit"]) == ("passed", 10.0)
        assert entry["seconds"] >= 0
        assert made.exit_code() == gpu_check.EXIT_OK
        assert self.kept[-1]["steps"] is made.results

    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (steps.Failed("3 wrong", {"output": "x"}), "failed", gpu_check.EXIT_FAILED),
            (KeyError("a mistake of the tool"), "failed", gpu_check.EXIT_FAILED),
            (steps.NotRun("no such tool"), "not run", gpu_check.EXIT_MISSING),
            (steps.NotRun("not asked for", optional=True), "not run", gpu_check.EXIT_OK),
        ],
    )
    def test_other_ends(self, error, status, code):
        made = self.make()
        made.do("first", 10.0, lambda seconds: {})
        assert not made.do("second", 10.0, self.raising(error))
        assert made.do("third", 10.0, lambda seconds: {})  # goes on
        assert made.results["second"]["status"] == status
        assert made.exit_code() == code
        counts = made.summary()[-1]
        assert counts.startswith(f"2 passed, {int(status == 'failed')} failed, ")
        assert f"{int(status == 'not run')} not run" in counts

    def test_no_step_gets_more_than_is_left_and_none_starts_too_late(self):
        made = self.make(seconds=5.0)
        given = []
        made.do("long", 60.0, lambda seconds: given.append(seconds) or {})
        assert 4.0 < given[0] <= 5.0
        late = self.make(seconds=1.0)
        assert not late.do("late", 60.0, lambda seconds: {})
        assert "no time left of the 1 s" in late.results["late"]["why"]
        assert late.exit_code() == gpu_check.EXIT_MISSING

    def test_the_budgets_of_a_whole_run_stay_below_eight_minutes(self):
        assert gpu_check.TOTAL_SECONDS + steps.SHORTEST < 8 * 60


def test_a_program_that_hangs_is_ended_with_what_it_started(tmp_path):
    mark = tmp_path / "still-alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    status, _ = steps.run_program([sys.executable, "-c", script], 1.0)
    assert status is None
    time.sleep(3)
    assert not mark.exists()


class TestSanitizer:
    @pytest.fixture
    def tool(self, tmp_path, monkeypatch):
        """Stands for compute-sanitizer, by what it prints last and its exit status."""
        path = tmp_path / "compute-sanitizer"

        def make(text, status=0):
            path.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
            path.chmod(0o755)

        found = {"compute-sanitizer": str(path)}
        monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: found.get(name))
        return make

    def run(self, tool, tmp_path, seconds=30.0):
        return gpu_check.sanitize(tool, tmp_path / "program", tmp_path, 1, seconds)

    def test_only_its_own_summary_is_a_pass(self, tool, tmp_path):
        tool("========= ERROR SUMMARY: 0 errors")
        assert "0 errors" in self.run("memcheck", tmp_path)["output"]
        tool("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
        self.run("racecheck", tmp_path)

    @pytest.mark.parametrize(
        ("name", "text", "status"),
        [
            ("memcheck", "========= ERROR SUMMARY: 4 errors", 9),
            ("racecheck", "RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0),
            ("memcheck", "========= ERROR SUMMARY: 0 errors", 1),  # the program itself failed
        ],
    )
    def test_findings_fail(self, tool, tmp_path, name, text, status):
        tool(text, status)
        with pytest.raises(steps.Failed, match="SUMMARY"):
            self.run(name, tmp_path)

    def test_no_summary_is_no_pass(self, tool, tmp_path):
        tool("========= Error: device not supported")
        with pytest.raises(steps.NotRun, match="no summary: Error: device not supported"):
            self.run("memcheck", tmp_path)

    def test_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_check.shutil, "which", lambda *args, **kwargs: None)
        with pytest.raises(steps.NotRun, match="not installed"):
            self.run("memcheck", tmp_path)


class TestWholeRun:
    """run_steps over stand-ins for the card and what is built for it; the steps are real."""

    @pytest.fixture
    def card(self, monkeypatch, tmp_path):
        facts = {"name": "Stand-in", "sm": 75}
        monkeypatch.setattr(gpu_check, "find_nvcc", lambda: "nvcc")
        monkeypatch.setattr(gpu_check, "find_gpu", lambda: (CpuTorch(), facts))
        monkeypatch.setattr(gpu_check, "target_flag", lambda nvcc, sm: f"-arch=sm_{sm}")
        monkeypatch.setattr(gpu_check, "Library", lambda path: None)
        monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
        program = tmp_path / "golden_test"
        program.write_text('#!/bin/sh\ntest -s "$1" && echo "700 cases run, 0 failed"\n')
        program.chmod(0o755)
        monkeypatch.setattr(gpu_check, "build", lambda *args: (tmp_path / "lib.so", program))
        return program

    def run(self, tmp_path, *arguments):
        out = tmp_path / "out.json"
        code = gpu_check.main([*arguments, "--out", str(out), "--seed", "1"])
        found = json.loads(out.read_text())
        return code, {name: step["status"] for name, step in found["steps"].items()}, found

    @pytest.mark.usefixtures("card")
    def test_what_was_not_asked_for_is_listed_and_no_failure(self, tmp_path, capsys):
        code, status, found = self.run(tmp_path, "--skip-bench", "--skip-sanitizer")
        assert code == gpu_check.EXIT_OK
        assert status == {"build": "passed", "numbers": "passed", "memcheck": "not run",
                          "racecheck": "not run", "bench": "not run", "peer": "not run",
                          "tensorrt": "not run"}  # fmt: skip
        assert found["card"]["name"] == "Stand-in"
        assert found["steps"]["tensorrt"]["why"].startswith("not installed: tensorrt")
        said = capsys.readouterr().err
        assert "700 cases run, 0 failed" in said
        assert "2 passed, 0 failed, 5 not run" in said

    @pytest.mark.usefixtures("card")
    def test_a_missing_sanitizer_is_not_a_pass(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_check.shutil, "which", lambda *args, **kwargs: None)
        code, status, _ = self.run(tmp_path, "--skip-bench")
        assert (code, status["memcheck"]) == (gpu_check.EXIT_MISSING, "not run")

    def test_wrong_numbers_fail_and_the_rest_still_runs(self, tmp_path, card):
        card.write_text("#!/bin/sh\necho 'FAIL gemv_dp4a'\necho '700 cases run, 1 failed'\nexit 1")
        code, status, found = self.run(tmp_path, "--skip-bench", "--skip-sanitizer")
        assert (code, status["numbers"]) == (gpu_check.EXIT_FAILED, "failed")
        assert found["steps"]["numbers"]["why"] == "exit status 1: 700 cases run, 1 failed"
        assert "FAIL gemv_dp4a" in found["steps"]["numbers"]["output"]
        assert "tensorrt" in status

    @pytest.mark.usefixtures("card")
    def test_what_was_measured_survives_a_mistake_later(self, tmp_path, monkeypatch):
        def bench_all(torch, library, seconds, rows, say):
            rows.append({"m": 1})
            raise ZeroDivisionError("a mistake of the tool")

        monkeypatch.setattr(gpu_check, "copy_bandwidth", lambda torch: 300.0)
        monkeypatch.setattr(gpu_check.bench, "bench_all", bench_all)
        code, status, found = self.run(tmp_path, "--skip-sanitizer")
        assert (code, status["bench"]) == (gpu_check.EXIT_FAILED, "failed")
        assert found["steps"]["bench"]["rows"] == [{"m": 1}]
        assert "after 1 rows: ZeroDivisionError" in found["steps"]["bench"]["why"]

    @pytest.mark.usefixtures("card")
    def test_without_a_build_nothing_else_claims_to_have_run(self, tmp_path, monkeypatch):
        def fail(*args):
            raise library.BuildError("error: no such thing")

        monkeypatch.setattr(gpu_check, "build", fail)
        code, status, found = self.run(tmp_path)
        assert code == gpu_check.EXIT_FAILED
        assert set(status.values()) == {"failed", "not run"}
        assert found["steps"]["numbers"]["why"] == "the kernels were not built"
        assert "no such thing" in found["steps"]["build"]["why"]

    @pytest.mark.usefixtures("card")
    def test_a_peer_that_does_not_load(self, tmp_path):
        arguments = ("--skip-bench", "--skip-sanitizer", "--peer", str(tmp_path / "none.so"))
        code, status, found = self.run(tmp_path, *arguments)
        assert (code, status["peer"]) == (gpu_check.EXIT_MISSING, "not run")
        assert "none.so" in found["steps"]["peer"]["why"]


def test_golden_data_is_fresh_for_each_seed(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        gpu_check.write_golden(tmp_path / name, seed, "--small")
    a, b, c = (tmp_path / name for name in "abc")
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()


def test_golden_data_needs_numpy_and_nothing_else(tmp_path):
    """The machine with the card may have torch and numpy only."""
    script = f"""
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("onnx", "onnxruntime", "torch", "polygraphy", "click", "rich"):
            raise ImportError(f"{{name}} is not on that machine")
sys.meta_path.insert(0, Refuse())
sys.argv = ["make_golden.py", "--small", {str(tmp_path / "golden.bin")!r}]
runpy.run_path({str(REPOSITORY / "tools" / "make_golden.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (tmp_path / "golden.bin").is_file(), done.stderr
