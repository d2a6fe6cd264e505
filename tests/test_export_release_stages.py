"""The stages export and release without what the stages before them make: one line, and nothing is removed."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from casemate.errors import UserError
from casemate.params import Params, check_params
from pipeline import export, release
from pipeline.profile import resolved

ROW = argparse.Namespace(row="atld")


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Of a project whose folder is empty."""
    found = check_params(resolved("smoke"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return found


@pytest.mark.parametrize("made", [False, True])
def test_a_row_without_exported_files_keeps_what_was_released(params: Params, made: bool) -> None:
    if made:
        (params.models_dir / "exported" / ROW.row).mkdir(parents=True)
    kept = params.models_dir / "released" / ROW.row / "plain" / "model.onnx"
    kept.parent.mkdir(parents=True)
    kept.touch()
    with pytest.raises(UserError, match=rf"{params.profile}/exported/{ROW.row} holds no .onnx file.*export stage"):
        release.run(params, ROW)
    assert kept.exists() and not params.reports_dir.exists()


def test_a_row_that_was_not_evaluated_is_said(params: Params) -> None:
    missing = rf"{params.profile}/evaluated/{ROW.row}/\S+ does not exist.*pipeline.evaluate --row {ROW.row}"
    with pytest.raises(UserError, match=missing):
        export.export_modes(params, ROW.row, None, Path("making"))  # type: ignore[arg-type]
    exported = params.models_dir / "exported" / ROW.row / "plain.onnx"
    exported.parent.mkdir(parents=True)
    exported.touch()
    with pytest.raises(UserError, match=missing):
        release.run(params, ROW)
