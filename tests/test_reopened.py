"""What stays of a report when its directory is verified or measured again."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from bitnet_export import env, reopened
from bitnet_export.options import GateOptions, SilentProgress
from bitnet_export.report.gates import judge
from bitnet_export.report.schema import Environment
from bitnet_export.report.write import write_report
from tests.report import sample


class Said(SilentProgress):
    """Keeps what it is told."""

    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


def opened(report, directory):
    """(the report as a later run finds it in its directory, what it was told)."""
    write_report(report, directory)
    said = Said()
    return reopened.previous_report(SimpleNamespace(directory=directory), said), said


def here(**changes):
    return Environment(**env.describe() | changes)


def test_speed_of_this_machine_stays(tmp_path):
    before = replace(sample.passing(), environment=here())
    report, said = opened(before, tmp_path)
    assert report.speed == before.speed
    assert not said.notes


@pytest.mark.parametrize("changes", [dict(cpu="another"), dict(cores=999), dict(gpu="a card")])
def test_speed_of_another_machine_is_taken_out(tmp_path, changes):
    report, said = opened(replace(sample.passing(), environment=here(**changes)), tmp_path)
    assert report.speed == []
    assert "another machine" in said.notes[0]
    assert report.parity == sample.passing().parity  # that is no matter of the machine


def test_only_the_limits_of_this_run_count():
    before = judge(sample.unjudged(), GateOptions(min_speedup=9.0, max_quality_loss=0.9))
    assert not before.passed
    said = Said()
    report = reopened.judge_again(before, GateOptions(), said, parity=True)
    assert report.passed
    assert [gate.name for gate in report.gates] == ["finite", "parity"]
    assert said.notes == [
        "not judged: --max-quality-loss 90%, which the run before passed; give it again to have "
        "it judged"
    ]
    assert said.warnings == [text for text in report.warnings if "--min-speedup 9x" in text]
    assert "which the run before failed" in said.warnings[0]


def test_a_limit_given_again_takes_the_place_of_the_old_one():
    before = judge(sample.unjudged(), GateOptions(min_speedup=9.0))
    said = Said()
    report = reopened.judge_again(before, GateOptions(min_speedup=1.0), said, parity=True)
    assert report.passed
    assert not said.notes + said.warnings


def test_the_warning_goes_when_the_limit_is_judged_again():
    before = judge(sample.unjudged(), GateOptions(min_speedup=9.0))
    dropped = reopened.judge_again(before, GateOptions(), Said(), parity=True)
    assert any("--min-speedup" in text for text in dropped.warnings)
    still = reopened.judge_again(dropped, GateOptions(min_compression=1.0), Said(), parity=True)
    assert still.warnings == dropped.warnings  # nothing judged it since
    given = reopened.judge_again(still, GateOptions(min_speedup=9.0), Said(), parity=True)
    assert not given.passed
    assert not any("--min-speedup" in text for text in given.warnings)
