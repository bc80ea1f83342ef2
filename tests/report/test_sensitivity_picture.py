"""The picture of sensitive layers: a column up and one down for each, kept layers stand out."""

import xml.etree.ElementTree as ET

from bitnet_export.report.html_details import layers_section
from bitnet_export.report.schema import Environment, LayerRow, ModelBlock, Report
from bitnet_export.report.svg import sensitivity_columns

ROWS = [
    LayerRow(name="a", status="ternary", sensitivity=0.1, saved_bytes=1000),
    LayerRow(name="b", status="int8", sensitivity=0.4),
    LayerRow(name="c", status="ternary", sensitivity=0.0, saved_bytes=2000),
]


def columns(css):
    found = ET.fromstring(sensitivity_columns(ROWS)).iter("rect")
    return [float(r.get("height")) for r in found if r.get("class") == css]


def test_heights_are_in_proportion():
    low, none = columns("fill-error")
    (kept,) = columns("fill-kept")
    assert none == 0
    assert abs(kept / low - 4) < 1e-6
    assert columns("fill-saved") == [35.0, 0.0, 70.0]


def test_it_is_drawn_only_where_it_was_measured():
    environment = Environment(bitnet_export="0", python="3", platform="x")
    report = Report(
        model=ModelBlock(name="m", kind="onnx", target="ort"), environment=environment, layers=ROWS
    )
    assert "if this layer alone is ternary" in layers_section(report)
    report.layers = [LayerRow(name="a", status="ternary")]
    assert "if this layer alone" not in layers_section(report)
