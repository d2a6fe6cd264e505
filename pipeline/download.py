"""Stage download: fetch a data set from the first source that serves it, verified by checksum.

python -m pipeline.download --dataset mnist
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.common import recording, stage

if TYPE_CHECKING:
    from casemate.params import Params

RAW = Path("data/raw")


def run(params: Params, options: argparse.Namespace) -> None:
    from casemate.data import fetch_dataset

    source = fetch_dataset(options.dataset, RAW)
    print(f"{options.dataset}: verified; from {source}")
    with recording(params, "download") as recorder:
        recorder.tags({"data.source": source})
        recorder.output(RAW / options.dataset / "manifest.json")


if __name__ == "__main__":
    stage(run, doc=__doc__, arguments={"dataset": "a registered data set ('casemate list datasets')"})
