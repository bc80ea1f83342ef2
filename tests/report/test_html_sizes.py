"""The facts below the size table: both ratios, compression, the errors of embeddings."""

from dataclasses import replace

from bitnet_export.report.html_sizes import embedding_table, size_facts
from bitnet_export.report.schema import EmbeddingRow
from tests.report import sample


def test_both_ratios_and_compression():
    plain = sample.size_block()
    assert size_facts(plain) == ""  # a report of an earlier version
    size = replace(
        plain,
        fp32_bytes=80_000_000,
        fp16_bytes=40_000_000,
        ratio_fp32=10.0,
        ratio_fp16=5.0,
        compression="zstd",
        unpacked_bytes=9_500_000,
        code_bits_per_weight=1.568,
    )
    page = size_facts(size)
    for text in (
        "fp32",
        "80 MB",
        "10.0x",
        "fp16",
        "40 MB",
        "5.00x",
        "zstd",
        "9.5 MB",
        "1.568 bits",
    ):
        assert text in page


def test_embedding_errors():
    assert embedding_table([]) == ""
    row = EmbeddingRow(
        name="words.<weight>",
        bits=4,
        rows=30522,
        columns=384,
        block=32,
        relative_error=0.0969,
        max_abs=0.33,
    )
    page = embedding_table([row])
    for text in ("words.<wbr>&lt;weight&gt;", "30522 x 384", "9.69 %", "0.33"):
        assert text in page
