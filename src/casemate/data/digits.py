"""The 8x8 digits that scikit-learn bundles (Alpaydin, Kaynak 1998, test part): no download."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from casemate.data.files import Arrays, FileDataset
from casemate.data.sources import Source
from casemate.data.splits import stratified_order
from casemate.fields import spec


class Bundled(Source):
    """Files that came with an installed package: nothing to fetch."""

    label = "scikit-learn (bundled)"

    def get(self, work: Path) -> Path:
        return work


@spec
class Digits(FileDataset):
    """1,297 + 500 handwritten digits, 8x8, 17 grey levels: a fixed stratified split of the 1,797."""

    name = "digits"
    input_shape = (1, 8, 8)
    classes = tuple("0123456789")
    mean = (0.3042,)
    std = (0.3755,)
    counts: ClassVar = {"train": 1_297, "test": 500}
    checksums: ClassVar = {
        "train_images": "296aa392d5493c78cd430e78cc38acb16a62838a7134bf1827c0c563439a54cb",
        "train_labels": "a05dc2fc409972047cbd4627d3a9bf734b5f79cae570da256f5800930a140b69",
        "test_images": "1984108d3346ab9d984abf1e34c98c2474561d1a4905c7b4dba580065cfc5747",
        "test_labels": "ae32c1576ef39e6d5bc62894f820b38e7c78f880d74dd1fdddbc820cc66e734c",
    }
    sources = (Bundled(),)
    bring = "another release of scikit-learn"
    space = 2_000_000

    def decode(self, folder: Path) -> Arrays:
        from sklearn.datasets import load_digits

        bundle = load_digits()
        # 0..16 to 0..255; rint sends the one half-way value, 127.5 for 8, to 128 on every machine
        images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[..., None]
        labels = bundle.target.astype(np.int64)
        order = stratified_order(labels, "digits")
        test, train = np.sort(order[: self.counts["test"]]), np.sort(order[self.counts["test"] :])
        return {
            "train_images": images[train],
            "train_labels": labels[train],
            "test_images": images[test],
            "test_labels": labels[test],
        }
