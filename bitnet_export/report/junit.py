"""A report as JUnit XML, which every CI system shows: one test case a gate, one a parity row.

Renders only; a case fails here exactly where its row says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from bitnet_export.report.schema import GateRow, ParityRow, Report

# XML 1.0 has no way to write the other control characters.
_UNWRITABLE = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


def render_junit(report: Report) -> str:
    """Report -> JUnit XML text."""
    root = ElementTree.Element("testsuites", name="bitnet-export")
    subject = f"{report.model.name}.{report.model.target}"
    _suite(root, report, "gates", [_gate_case(subject, gate) for gate in report.gates])
    _suite(root, report, "parity", [_parity_case(subject, row) for row in report.parity])
    _totals(root, list(root))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _suite(
    root: ElementTree.Element, report: Report, name: str, cases: list[ElementTree.Element]
) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=name, errors="0", skipped="0", time="0")
    if report.created:
        suite.set("timestamp", report.created.removesuffix("Z").split("+")[0])
    suite.extend(cases)
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))


def _totals(root: ElementTree.Element, suites: Sequence[ElementTree.Element]) -> None:
    for key in ("tests", "failures", "errors"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in suites)))


def _case(
    subject: str, name: str, passed: bool, kind: str, message: str, text: str
) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=_clean(subject), name=_clean(name), time="0")
    if not passed:
        failure = ElementTree.SubElement(case, "failure", type=kind, message=_clean(message))
        failure.text = _clean(text)
    return case


def _gate_case(subject: str, gate: GateRow) -> ElementTree.Element:
    text = f"measured {gate.value}, limit {gate.limit}: {gate.detail}"
    return _case(f"{subject}.gates", gate.name, gate.passed, "gate", gate.detail, text)


def _parity_case(subject: str, row: ParityRow) -> ElementTree.Element:
    name = " | ".join(filter(None, (row.pair, row.shape, row.output)))
    text = f"max_abs {row.max_abs}, tolerance {row.tolerance}, cosine {row.cosine}"
    text = f"{text}, min_cosine {row.min_cosine}\n{row.basis}"
    return _case(f"{subject}.parity", name, row.passed, "parity", row.reason, text)


def _clean(text: str) -> str:
    return _UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", text)
