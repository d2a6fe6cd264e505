"""The ten ImageNet classes of the internal Wasserstein distance paper, at 224x224, from a copy that the user has."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from casemate.data import pictures
from casemate.data.files import Arrays, FileDataset
from casemate.data.ilsvrc import Source
from casemate.data.sources import Local, SourceFailed
from casemate.data.subset import IMAGENET10, Choice
from casemate.errors import UserError
from casemate.fields import spec

NAMES = {"train": "train", "val": "test"}
"""ImageNet's name of a split -> the name here."""

log = logging.getLogger(__name__)


@spec
class ImageNet10(FileDataset):
    """At most 13,000 + 500 colour images, 1,300 and 50 a class; the official validation pictures are the test split.

    ImageNet has no free source, so the pictures come from CASEMATE_DATA: a folder in its layout, its archives, or the
    output of `pipeline.subset`, whose missing classes are then accepted. Pictures are scaled until they just cover
    224x224 and cut at the centre. Nothing published says what the arrays must hash to: the manifest records it.
    """

    wnids: ClassVar[Mapping[str, str]] = IMAGENET10
    """WordNet id -> class name, in the order of the labels."""

    name = "imagenet10"
    input_shape = (3, 224, 224)
    classes = tuple(IMAGENET10.values())
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    flip = True
    counts: ClassVar = {"train": 13_000, "test": 500}
    whole = False
    sources = (Local(),)
    bring = "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit, or folders train/WNID and val/WNID,"
    space = 2_100_000_000

    def decode(self, folder: Path) -> Arrays:
        per_class = {split: self.counts[name] // len(self.wnids) for split, name in NAMES.items()}
        choice = Choice(tuple(self.wnids), per_class, allow_missing=_subset(folder))
        arrays = {
            f"{name}_{kind}": np.empty(self.shape(f"{name}_{kind}"), dtype=np.uint8 if kind == "images" else np.int64)
            for name in NAMES.values()
            for kind in ("images", "labels")
        }
        labels, at = {wnid: label for label, wnid in enumerate(self.wnids)}, dict.fromkeys(NAMES, 0)
        _, height, width = self.input_shape
        try:
            with Source(folder) as source:
                for chosen in choice.pictures(source):
                    shaped = pictures.fit(pictures.convert(chosen.picture, 3), height, width)
                    name = NAMES[chosen.split]
                    arrays[f"{name}_images"][at[chosen.split]] = np.asarray(shaped)
                    arrays[f"{name}_labels"][at[chosen.split]] = labels[chosen.wnid]
                    at[chosen.split] += 1
        except UserError as error:
            raise SourceFailed(str(error)) from None
        _report(self.name, choice)
        for split, name in NAMES.items():
            if not at[split]:
                raise SourceFailed(f"{folder} has no pictures for the {name} split")
        filled = {name: at[split] for split, name in NAMES.items()}
        return {name: array[: filled[name.partition("_")[0]]] for name, array in arrays.items()}

    def manifest(self, content: Arrays) -> dict[str, Any]:
        """With the images of each class."""
        n = len(self.wnids)
        counts = {
            split: dict(zip(self.wnids, np.bincount(content[f"{split}_labels"], minlength=n).tolist(), strict=True))
            for split in ("train", "test")
        }
        return {**super().manifest(content), "counts": counts}


def _subset(folder: Path) -> bool:
    """Whether the folder was made by `build_subset`: the classes it lacks were then allowed to be missing."""
    try:
        return "missing" in json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _report(dataset: str, choice: Choice) -> None:
    """Warn of everything that is not as the papers have it."""
    for wnid, splits in choice.short.items():
        told = ", ".join(f"{n['taken']:,} of {n['wanted']:,} {split}" for split, n in sorted(splits.items()))
        log.warning("%s: %s (%s) has %s pictures", dataset, IMAGENET10[wnid], wnid, told)
    for left_out, why in ((choice.unreadable, "unreadable"), (choice.duplicates, "copies of others")):
        if left_out:
            log.warning("%s: %d pictures left out as %s, such as %s", dataset, len(left_out), why, min(left_out))
