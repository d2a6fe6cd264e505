"""What the operating system refuses is the user's to mend: one line. A bug keeps its traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from casemate.errors import MENDS, UserError, check_file, check_folder, one_line_errors


@pytest.mark.parametrize("number", MENDS)
def test_a_file_that_cannot_be_had_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors("interrupted"):
        raise OSError(number, os.strerror(number), "some/file")
    assert ended.value.code == 2
    expected = f"error: cannot read or write some/file ({os.strerror(number)}): {MENDS[number]}\n"
    assert capsys.readouterr().err == expected


def test_of_a_renamed_file_the_users_name_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".x.tmp").touch()
    (tmp_path / "x").mkdir()
    with pytest.raises(SystemExit), one_line_errors("interrupted"):
        (tmp_path / ".x.tmp").replace(tmp_path / "x")
    assert capsys.readouterr().err.startswith(f"error: cannot read or write {tmp_path / 'x'} (")


@pytest.mark.parametrize("bug", [OSError(errno.ENOENT, "no file is named"), OSError(errno.EBADF, "other", "file")])
def test_a_bug_keeps_its_traceback(bug: OSError) -> None:
    with pytest.raises(OSError) as kept, one_line_errors("interrupted"):
        raise bug
    assert kept.value is bug


def test_a_place_is_checked_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    check_file("--out", tmp_path / "new.json")
    check_file("--out", file)
    check_folder("--ledger", tmp_path / "new" / "deeper")
    for where, wrong in ((tmp_path, "is a folder"), (Path(), "is a folder"), (tmp_path / "no/x", "does not exist")):
        with pytest.raises(UserError, match=wrong):
            check_file("--out", where)
    for where in (file, file / "below"):
        with pytest.raises(UserError, match=f"{file} is a file; give a folder"):
            check_folder("--ledger", where)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="give a place you may write to"):
        check_file("--out", tmp_path / "new.json")
    with pytest.raises(UserError, match="give a place you may write to"):
        check_folder("--ledger", tmp_path / "new")
    tmp_path.chmod(0o700)
