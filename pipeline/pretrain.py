"""Stage pretrain: train a standard classifier.

python -m pipeline.pretrain --row standard
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipeline.common import row_of, stage
from pipeline.train import train_row

if TYPE_CHECKING:
    from casemate.params import Params


def run(params: Params, options: argparse.Namespace) -> None:
    train_row(params, row_of(params, options.row, list(params.pretrain), "pretrain"), "pretrain")


if __name__ == "__main__":
    stage(run, doc=__doc__, arguments={"row": "a row under `pretrain` in params.yaml"})
