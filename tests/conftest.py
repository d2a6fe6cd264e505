"""Shared fixtures. One thread for everything: small tests are slower, and less repeatable, on more."""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported anywhere

from pathlib import Path

import pytest
import torch

from casemate.data import Loaded, fetch_dataset, load_dataset

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like data/raw that holds `digits`."""
    root = tmp_path_factory.mktemp("raw")
    fetch_dataset("digits", root)
    return root


@pytest.fixture(scope="session")
def digits(raw: Path) -> Loaded:
    """The bundled 8x8 digits: (dataset, train, test)."""
    return load_dataset("digits", raw)
