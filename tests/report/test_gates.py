"""Gates and the comparison of two reports: each can pass, and each can fail."""

from dataclasses import replace

import pytest

from bitnet_export.errors import InputError, UsageError
from bitnet_export.options import GateOptions
from bitnet_export.report.compare import compare_reports, describe, parse_percentage
from bitnet_export.report.gates import GateLimits, judge
from tests.report import sample


def failed(report):
    return [gate.name for gate in report.gates if not gate.passed]


def test_all_pass():
    report = sample.passing()
    assert report.verdict == "pass"
    names = ["finite", "parity", "min_speedup", "min_compression", "max_quality_loss"]
    assert [gate.name for gate in report.gates] == names
    assert failed(report) == []


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (GateLimits(min_speedup=2.05), []),
        (GateLimits(min_speedup=2.3), ["min_speedup"]),  # the first shape alone would pass
        (GateLimits(min_compression=6.1), []),
        (GateLimits(min_compression=8.2), ["min_compression"]),
        (GateLimits(max_quality_loss=0.138), []),
        (GateLimits(max_quality_loss=0.1), ["max_quality_loss"]),
        (GateOptions(min_speedup=9, min_compression=9), ["min_speedup", "min_compression"]),
    ],
)
def test_limits(limits, expected):
    report = judge(sample.unjudged(), limits)
    assert failed(report) == expected
    assert report.passed == (not expected)
    for gate in report.gates:
        assert gate.passed != ("; the limit is " in gate.detail)


def test_a_failed_gate_names_its_limit():
    limits = GateLimits(min_speedup=9, max_quality_loss=0.025)
    speed, quality = judge(sample.unjudged(), limits).gates[-2:]
    assert speed.detail.endswith("the slowest shape; the limit is 9x")
    assert quality.detail.endswith("full precision 1; the limit is 2.5%")
    assert "% lost: " in quality.detail


@pytest.mark.parametrize(
    ("without", "gate"),
    [
        (dict(speed=[]), "min_speedup"),
        (dict(size=None), "min_compression"),
        (dict(quality=None), "max_quality_loss"),
        (dict(parity=[]), "parity"),
    ],
)
def test_what_was_not_measured_fails(without, gate):
    report = judge(replace(sample.unjudged(), **without), sample.LIMITS)
    assert failed(report) == [gate]
    assert report.verdict == "fail"


def test_one_failed_comparison_fails():
    report = sample.failing()
    assert failed(report) == ["finite", "parity", "min_speedup"]
    assert "2 of 12 comparisons failed" in report.gates[1].detail


def test_quality_that_is_not_finite_fails_without_a_limit():
    quality = replace(sample.quality_block(), value=None, loss=None, rows=[])
    report = judge(replace(sample.unjudged(), quality=quality))
    assert failed(report) == ["finite"]
    gated = judge(report, GateLimits(max_quality_loss=1.0))
    assert failed(gated) == ["finite", "max_quality_loss"]


def test_a_benchmark_needs_no_parity_but_an_empty_run_never_passes():
    speed = replace(sample.unjudged(), parity=[])
    assert judge(speed, parity=False).passed
    unlooked = judge(replace(speed, quality=None), parity=False)
    assert unlooked.gates[0].detail == "no output was looked at"
    nothing = replace(speed, speed=[], size=None, quality=None)
    assert not judge(nothing, parity=False).passed


def regressions(old, new, limit=0.05):
    return [c.name for c in compare_reports(old, new, limit).changes if c.regressed]


def test_the_same_report_is_no_regression():
    comparison = compare_reports(sample.passing(), sample.passing(), 0.0)
    assert comparison.passed
    assert comparison.compared == 8  # size, three speedups, three latencies, quality
    assert "**no regression** beyond 0 % of" in describe(comparison)
    assert "| verdict | pass | pass |  | ok |" in describe(comparison)


def slower(report, factor, shape=0):
    rows = list(report.speed)
    row = rows[shape]
    rows[shape] = replace(row, ms=row.ms * factor, ratio=row.ratio / factor)
    return replace(report, speed=rows)


@pytest.mark.parametrize(
    ("worsen", "expected"),
    [
        (lambda r: slower(r, 1.04), []),
        (lambda r: slower(r, 1.07), ["speedup at", "latency at"]),
        (lambda r: slower(r, 0.5), []),
        (lambda r: replace(r, size=replace(r.size, bytes=r.size.bytes * 11 // 10)), ["size"]),
        (lambda r: replace(r, size=None), ["size"]),
        (lambda r: replace(r, speed=[]), ["speedup at"] * 3),
        (lambda r: replace(r, quality=replace(r.quality, loss=0.2)), ["quality loss"]),
        (lambda r: replace(r, quality=replace(r.quality, loss=0.16)), []),
        (lambda r: replace(r, quality=None), ["quality loss"]),
        (lambda r: replace(r, verdict="fail"), ["verdict"]),
    ],
)
def test_regressions(worsen, expected):
    old = sample.passing()
    found = regressions(old, worsen(old))
    assert len(found) == len(expected)
    assert all(name.startswith(start) for name, start in zip(found, expected, strict=True))
    comparison = compare_reports(old, worsen(old), 0.05)
    assert comparison.passed == (not expected)
    assert ("REGRESSION" in describe(comparison)) == bool(expected)


@pytest.mark.parametrize("key", ["name", "target", "dtype"])
def test_other_models_are_refused(key):
    old = sample.passing()
    other = replace(old, model=replace(old.model, **{key: "other"}))
    with pytest.raises(InputError, match="'other'"):
        compare_reports(old, other)


def test_another_machine_is_marked_not_judged():
    old = sample.passing()
    machine = replace(old.environment, cpu="another processor")
    new = slower(replace(old, environment=machine), 3.0)
    comparison = compare_reports(old, new)
    assert comparison.passed
    assert sum("other machine" in c.note for c in comparison.changes) == 3
    assert "another processor" in describe(comparison)
    bigger = replace(new, size=replace(new.size, bytes=new.size.bytes * 2))
    assert not compare_reports(old, bigger).passed


def test_nothing_comparable_is_no_pass():
    old = replace(sample.passing(), size=None, quality=None)
    rows = [replace(row, shape=f"other={i}") for i, row in enumerate(old.speed)]
    comparison = compare_reports(old, replace(old, speed=rows))
    assert not comparison.passed
    assert "nothing could be compared" in describe(comparison)


def test_percentages():
    assert parse_percentage("5%") == parse_percentage(" 0.05 ") == 0.05
    for text in ("", "%", "five", "-1%", "nan", "inf"):
        with pytest.raises(UsageError, match="5%"):
            parse_percentage(text)
