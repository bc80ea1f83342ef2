"""Below the size table of report.html: ratios over both float types, compression, and what
quantizing embeddings and heads changed. Only renders."""

from __future__ import annotations

from html import escape

from bitnet_export.report.html_parts import breakable, table
from bitnet_export.report.schema import EmbeddingRow, SizeBlock
from bitnet_export.report.text import megabytes, percent, scientific, times


def size_facts(size: SizeBlock) -> str:
    """The whole file against the same model in fp32 and in fp16, and what compression did."""
    rows = [
        (escape(f"the model in {name}"), megabytes(count), times(ratio))
        for name, count, ratio in (
            ("fp32", size.fp32_bytes, size.ratio_fp32),
            ("fp16", size.fp16_bytes, size.ratio_fp16),
        )
        if count is not None and ratio is not None
    ]
    facts = []
    if size.unpacked_bytes is not None:
        facts.append(
            f"Kept compressed ({size.compression}): {megabytes(size.bytes)}, "
            f"unpacked {megabytes(size.unpacked_bytes)}."
        )
    if size.code_bits_per_weight is not None:
        bits = f"{size.code_bits_per_weight:.3f}"
        facts.append(f"Packed ternary codes alone: {bits} bits a weight.")
    note = f'<p class="note">{escape(" ".join(facts))}</p>' if facts else ""
    return (table(("whole file against", "#bytes", "#smaller"), rows) if rows else "") + note


def embedding_table(rows: list[EmbeddingRow]) -> str:
    """The quantized tables with their errors; nothing where there are none."""
    if not rows:
        return ""
    cells = [
        (
            breakable(r.name),
            str(r.bits),
            f"{r.rows} x {r.columns}",
            str(r.block),
            percent(r.relative_error, 2),
            scientific(r.max_abs),
        )
        for r in rows
    ]
    heads = ("table", "#bits", "#shape", "#weights a scale", "#RMS error / RMS", "#largest error")
    return "<h3>Embeddings and heads</h3>" + table(heads, cells)
