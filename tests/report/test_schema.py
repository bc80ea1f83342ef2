"""report.json: the round trip, what reading refuses, and the page that documents it."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from bitnet_export.errors import InputError
from bitnet_export.report import document, schema
from bitnet_export.report.json_io import encode, from_json, load_report, to_json
from tests.report import sample

REPORTS = {"passing": sample.passing, "failing": sample.failing, "minimal": sample.minimal}


@pytest.mark.parametrize("name", REPORTS)
def test_round_trip(name):
    report = REPORTS[name]()
    assert from_json(to_json(report)) == report


def test_keys_of_the_design():
    data = json.loads(to_json(sample.passing()))
    assert data["schema_version"] == 1
    assert data["verdict"] == "pass"
    assert {"baseline_dtype", "baseline_bytes", "bytes", "ratio", "by_part"} <= set(data["size"])
    assert {"shape", "threads", "baseline", "baseline_ms", "ms", "ratio"} <= set(data["speed"][0])
    parity = {"pair", "shape", "output", "max_abs", "cosine", "tolerance", "pass"}
    assert parity <= set(data["parity"][0])
    assert {"metric", "baseline", "value", "loss"} <= set(data["quality"])
    assert {"name", "status", "reason"} <= set(data["layers"][0])
    assert "passed" not in data["parity"][0]


def mutated(change):
    data = json.loads(to_json(sample.passing()))
    change(data)
    return json.dumps(data)


def set_at(*path, value):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("speed", 1, "ms", value="fast"), r'speed\[1\]\.ms: expected a number, got "fast"'),
        (set_at("speed", 0, "threads", value=1.5), r"speed\[0\]\.threads: expected a whole"),
        (set_at("speed", 0, "threads", value=True), "expected a whole number, got true"),
        (set_at("parity", 2, "pass", value=1), r"parity\[2\]\.pass: expected true or false"),
        (set_at("size", "by_part", value=[]), r"size\.by_part: expected an object"),
        (set_at("size", "by_part", "rest", value=3), r"size\.by_part\.rest: expected an object"),
        (set_at("layers", value={}), "layers: expected a list"),
        (set_at("verdict", value="maybe"), "verdict"),
        (set_at("schema_version", value=2), "newer"),
        (set_at("schema_version", value="1"), "not known"),
        (lambda data: data.pop("model"), "model is missing"),
        (lambda data: data["gates"][0].pop("pass"), r"gates\[0\]\.pass is missing"),
        (lambda data: data.pop("schema_version"), "no bitnet-export report"),
    ],
)
def test_reading_refuses(change, message):
    with pytest.raises(InputError, match=message) as caught:
        from_json(mutated(change), "old.json")
    assert "old.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"report"', "\x00"])
def test_reading_refuses_what_is_no_report(text):
    with pytest.raises(InputError):
        from_json(text)


def test_optional_keys_may_be_absent_and_unknown_ones_are_ignored():
    def change(data):
        data["later"] = {"key": 1}
        del data["size"], data["speed"][0]["memory_bytes"]

    report = from_json(mutated(change))
    assert report.size is None
    assert report.speed[0].memory_bytes is None


def test_load_report_takes_a_file_or_a_directory(tmp_path):
    report = sample.minimal()
    (tmp_path / "report.json").write_text(to_json(report), encoding="utf-8")
    assert load_report(tmp_path) == load_report(tmp_path / "report.json") == report
    with pytest.raises(InputError, match="cannot read"):
        load_report(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.json"):
        load_report(tmp_path / "binary.json")


def test_nan_is_never_written():
    report = sample.minimal()
    broken = replace(report, parity=[replace(report.parity[0], max_abs=float("nan"))])
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json(broken)


def test_every_key_is_documented():
    for name in schema.__all__:
        kind = getattr(schema, name)
        if is_dataclass(kind):
            assert all(f.metadata.get("doc") for f in fields(kind)), name


def test_page_agrees_with_the_schema():
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    made = "python -m bitnet_export.report.document docs/report.md"
    assert document.with_tables(page) == page, f"the schema changed; run {made}"
    for key in encode(sample.passing()):
        assert f"| `{key}` |" in page


def test_reading_a_report_imports_nothing_heavy():
    code = "import sys, bitnet_export.report.json_io as j; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "polygraphy"} & set(loaded)
