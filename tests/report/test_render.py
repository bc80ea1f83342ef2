"""The rendered files: well formed, self-contained, escaped, and saying what the report says."""

import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from bitnet_export.errors import StageError
from bitnet_export.report import text, write
from bitnet_export.report.html import render_html
from bitnet_export.report.json_io import load_report
from bitnet_export.report.junit import render_junit
from bitnet_export.report.markdown import MAX_LINES, render_markdown
from bitnet_export.report.schema import EngineSize
from bitnet_export.report.svg import nice_ticks
from tests.report import sample

REPORTS = {"passing": sample.passing, "failing": sample.failing, "minimal": sample.minimal}
EVERY = pytest.mark.parametrize("name", REPORTS)


class Checker(HTMLParser):
    """Collects tags and attributes; fails where tags do not nest."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.attributes, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@EVERY
def test_html_is_well_formed_and_self_contained(name):
    page = Checker(render_html(REPORTS[name]()))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [v for k, v in page.attributes if k in ("src", "href", "xlink:href")]
    assert not re.search(r"url\(|@import|https?://", render_html(REPORTS[name]()))
    labels = [v for k, v in page.attributes if k == "aria-label"]
    pictures = [v for k, v in page.attributes if (k, v) == ("role", "img")]
    assert len(labels) == len(pictures)
    assert all(labels)


def test_html_has_every_picture_and_number():
    report = sample.passing()
    page = render_html(report)
    words = " ".join(Checker(page).words)
    text_of_page = "".join(Checker(page).words)
    assert page.count('role="img"') == 1 + len(report.speed) + 2 + 1
    assert page.count('class="fill-sparsity"') == page.count('class="fill-error"') == 36
    for expected in ("PASS", "6.12x", "2.37x", "0.862", "12/12", "--min-speedup 1.5"):
        assert expected in words
    for row in report.layers:
        assert row.name in text_of_page
    assert "weights are not ternary" in words
    assert report.warnings[0] in words
    assert "FAIL" not in words


def test_html_shows_failures():
    words = " ".join(Checker(render_html(sample.failing())).words)
    assert "FAIL · 3 of 5 gates failed" in words
    assert "max_abs 0.3 exceeds 0.049" in words
    assert "10/12" in words
    assert "not finite" in words


@EVERY
def test_text_is_escaped(name):
    evil = '<script>alert("1")</script>'
    report = REPORTS[name]()
    model = replace(report.model, name=evil, source=evil)
    report = replace(report, model=model, command=evil, warnings=[evil])
    assert "<script" not in render_html(report)
    ElementTree.fromstring(render_junit(report))
    assert render_markdown(report).count("\n") <= MAX_LINES


@EVERY
def test_html_stays_small_with_many_samples_and_layers(name):
    report = REPORTS[name]()
    rows = [
        replace(
            row,
            samples_ms=[row.ms] * 1000,
            baseline_samples_ms=[row.baseline_ms] * 1000,
        )
        for row in report.speed
    ]
    assert len(render_html(replace(report, speed=rows, layers=report.layers * 6))) < 400_000


@EVERY
def test_markdown_is_short_and_says_the_verdict(name):
    report = REPORTS[name]()
    lines = render_markdown(report).splitlines()
    assert len(lines) <= MAX_LINES
    assert lines[0].startswith("## PASS" if report.passed else "## FAIL")
    tables = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in tables}) <= 1


def test_markdown_names_what_failed_even_with_many_rows():
    report = sample.failing()
    report = replace(report, speed=report.speed * 5)
    summary = render_markdown(report)
    assert "**parity**: 2 of 12 comparisons failed" in summary
    assert "**min_speedup**" in summary
    assert len(summary.splitlines()) <= MAX_LINES


def test_engines_stand_beside_the_onnx_file():
    report = sample.passing()
    assert "Engines built" not in render_html(report)
    engines = [
        EngineSize(
            file=f"model-sm{sm}.engine",
            bytes=size,
            ratio=report.size.baseline_bytes / size,
            runtime="TensorRT-RTX 1.7.1",
            built_for=f"compute capability {sm[0]}.{sm[1]}",
            weights=weights,
        )
        for sm, size, weights in (("75", 50_500_000, "float16"), ("86", 33_700_000, "int4"))
    ]
    report.size = replace(report.size, engines=engines)
    page, summary = render_html(report), render_markdown(report)
    for words in ("Engines built", "33.7 MB", "2.69x", "compute capability 8.6", "int4"):
        assert words in page
    assert "| engine model-sm86.engine, int4 weights |  | 33.7 MB | 2.69x |" in summary
    assert len(summary.splitlines()) <= MAX_LINES


@EVERY
def test_junit_counts(name):
    report = REPORTS[name]()
    root = ElementTree.fromstring(render_junit(report))
    cases = root.findall("./testsuite/testcase")
    failures = root.findall("./testsuite/testcase/failure")
    bad = [row for row in (*report.gates, *report.parity) if not row.passed]
    assert len(cases) == int(root.get("tests")) == len(report.gates) + len(report.parity)
    assert len(failures) == int(root.get("failures")) == len(bad)
    assert len({(c.get("classname"), c.get("name")) for c in cases}) == len(cases)
    for suite in root:
        assert int(suite.get("tests")) == len(suite.findall("testcase"))


def test_junit_survives_control_characters():
    report = sample.failing()
    gates = [replace(report.gates[0], detail="bad \x00\x1b[0m \ud800 <&>"), *report.gates[1:]]
    ElementTree.fromstring(render_junit(replace(report, gates=gates)).encode())


def test_write_all_four(tmp_path):
    report = sample.passing()
    paths = write.write_report(report, tmp_path / "out")
    names = {path.name for path in paths}
    assert names == {"report.json", "report.html", "report.md", "junit.xml"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert load_report(tmp_path / "out") == report
    write.write_report(sample.failing(), tmp_path / "out")
    assert load_report(tmp_path / "out").verdict == "fail"


def test_a_full_disk_leaves_the_old_report_whole(tmp_path, monkeypatch):
    write.write_report(sample.passing(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real, calls = write.Path.write_text, []

    def full(self, data, **options):
        calls.append(self)
        if len(calls) == 3:
            real(self, data[: len(data) // 2], **options)
            raise OSError(28, os.strerror(28))
        return real(self, data, **options)

    monkeypatch.setattr(write.Path, "write_text", full)
    with pytest.raises(StageError, match="No space left"):
        write.write_report(sample.failing(), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_numbers_as_text():
    assert text.megabytes(90_600_000) == "90.6 MB"
    assert text.megabytes(999_900_000) == "1000 MB"
    assert text.megabytes(12) == "12 B"
    assert text.times(6.123) == "6.12x"
    assert text.milliseconds(151.2) == "151"
    assert text.percent(None) == text.DASH
    assert nice_ticks(5.2) == [0, 2, 4]
    assert nice_ticks(0) == [0]
    assert nice_ticks(0.0117, 3) == [0, 0.005, 0.01]


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (5.9, "5.90x smaller"),
        (1.0, "1.00x smaller"),
        (0.77, "1.30x larger"),
        (0.05, "20.0x larger"),
    ],
)
def test_a_file_that_grew_is_not_called_smaller(ratio, words):
    assert text.smaller(ratio) == words
