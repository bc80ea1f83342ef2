"""The record beside a fine-tuned file: where a chain of fine-tunings began."""

from bitnet_export import history
from bitnet_export.report.schema import FinetuneBlock


def test_a_chain_of_fine_tunings_goes_back_to_its_start(tmp_path):
    dense, once, twice = (tmp_path / name for name in ("dense.pt", "once.pt", "twice.pt"))
    for file in (dense, once, twice):
        file.write_bytes(file.name.encode())
    block = FinetuneBlock(steps=1, seconds=0.0)
    history.write_history(once, dense, 8, block)
    history.write_history(twice, once, 8, block)
    assert history.origin(dense) is None
    assert history.origin(once) == dense.resolve()
    assert history.origin(twice) == dense.resolve()
    once.write_bytes(b"somebody else's weights")
    assert history.origin(twice) == once.resolve()
    history.write_history(once, twice, 8, block)
    history.write_history(twice, once, 8, block)
    assert history.origin(once) == twice.resolve()  # a circle ends
