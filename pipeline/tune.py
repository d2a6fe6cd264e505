"""Stage tune: train one defense from another row's weights.

python -m pipeline.tune --row trades
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipeline.common import row_of, stage
from pipeline.train import train_row

if TYPE_CHECKING:
    from casemate.params import Params


def run(params: Params, options: argparse.Namespace) -> None:
    row = row_of(params, options.row, list(params.tuned), "tuned")
    train_row(params, row, "tune", params.tuned[row].start)


if __name__ == "__main__":
    stage(run, doc=__doc__, arguments={"row": "a row under `tuned` in params.yaml"})
