"""Where a command may write, said before its work begins."""

import os

import pytest

from bitnet_export.cli.output import check_output_file
from bitnet_export.errors import UsageError


def test_a_new_file_may_be_written_and_an_old_one_with_force(tmp_path):
    check_output_file(tmp_path / "new" / "deeper" / "m.pt", overwrite=False)
    (tmp_path / "m.pt").write_text("")
    with pytest.raises(UsageError, match="--force"):
        check_output_file(tmp_path / "m.pt", overwrite=False)
    check_output_file(tmp_path / "m.pt", overwrite=True)


def test_places_where_nothing_can_be_written(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="it is a directory"):
        check_output_file(tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file"):
        check_output_file(tmp_path / "file" / "m.pt", overwrite=False)
    # root, whom tests may run as, can write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UsageError, match="nothing can be written"):
        check_output_file(tmp_path / "new" / "m.pt", overwrite=False)
