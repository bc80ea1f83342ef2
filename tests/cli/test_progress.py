"""Progress lines for logs, a bar for terminals, warnings only when quiet."""

import pytest

from bitnet_export.cli import progress


def use(shown):
    shown.stage("export", "model.pt")
    shown.update(1, 4, "loss 0.5")
    shown.update(0, 0, "fold-constants")
    shown.update(4, 4, "loss 0.1")
    shown.note("chose 2bit")
    shown.warn("careful")
    shown.close()


def test_log(capsys):
    use(progress.LogProgress())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "export: model.pt",
        "  export 4/4 loss 0.1",
        "  chose 2bit",
        "warning: careful",
    ]


def test_bar(capsys):
    use(progress.BarProgress())
    out, err = capsys.readouterr()
    assert out == ""
    assert "loss 0.1" in err
    assert "careful" in err


def test_quiet(capsys):
    use(progress.make_progress(quiet=True))
    assert capsys.readouterr().err == "warning: careful\n"


@pytest.mark.parametrize(("tty", "kind"), [(True, "BarProgress"), (False, "LogProgress")])
def test_choice(monkeypatch, tty, kind):
    monkeypatch.setattr("sys.stderr.isatty", lambda: tty, raising=False)
    assert type(progress.make_progress(quiet=False)).__name__ == kind
