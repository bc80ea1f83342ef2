"""Between the stages of a large run memory is looked after."""

import gc
import weakref

import pytest

from bitnet_export import stages
from bitnet_export.options import SilentProgress


class Ring:
    """An object that refers to itself, as graphs and modules do."""

    def __init__(self):
        self.itself = self


@pytest.mark.parametrize(("limit", "freed"), [(0, True), (1 << 60, False)])
def test_what_a_stage_left_is_freed_before_the_next_of_a_large_run(monkeypatch, limit, freed):
    if stages.resident_memory() is None:
        pytest.skip("this system does not tell how much memory a process takes")
    monkeypatch.setattr(stages, "COLLECTED_BYTES", limit)
    stage = stages.Stages(SilentProgress())
    gc.disable()
    try:
        with stage("first"):
            left = weakref.ref(Ring())
        with stage("second"):
            assert (left() is None) == freed
    finally:
        gc.enable()
    assert [row.name for row in stage.rows] == ["first", "second"]
