"""Stage subset: build a class subset of ImageNet, from a folder in its layout or its archives, with a manifest.

python -m pipeline.subset --name imagenet10
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.common import row_of, stage

if TYPE_CHECKING:
    from casemate.params import Params


def run(params: Params, options: argparse.Namespace) -> None:
    from casemate.data.subset import build_subset, summary

    name = row_of(params, options.name, list(params.subset), "subset")
    wanted = params.subset[name]
    manifest = build_subset(
        Path(wanted.source), Path("data/subset") / name, tuple(wanted.classes), wanted.train_per_class,
        wanted.test_per_class, allow_missing=wanted.allow_missing,
    )  # fmt: skip
    for line in summary(manifest):
        print(line)


if __name__ == "__main__":
    stage(run, doc=__doc__, arguments={"name": "an entry under `subset` in params.yaml"})
