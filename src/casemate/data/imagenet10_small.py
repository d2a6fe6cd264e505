"""Six of the ten ImageNet classes at 64x64: those of which the 64-pixel Tiny ImageNet has pictures too."""

from __future__ import annotations

from typing import ClassVar

from casemate.data.imagenet10 import ImageNet10
from casemate.data.subset import IMAGENET10
from casemate.fields import spec

ABSENT = ("n03743016", "n09468604", "n09472597", "n12985857")
"""Megalith, valley, volcano and coral fungus."""


@spec
class ImageNet10Small(ImageNet10):
    """At most 2,700 + 600 colour images, 450 and 100 a class: what a processor can train on. Not the paper's data.

    From CASEMATE_DATA, as `imagenet10`. Without a validation folder the test split is cut from the one there is.
    """

    wnids = {wnid: name for wnid, name in IMAGENET10.items() if wnid not in ABSENT}  # noqa: RUF012

    name = "imagenet10_small"
    input_shape = (3, 64, 64)
    classes = tuple(wnids.values())
    counts: ClassVar = {"train": 2_700, "test": 600}
    bring = f"folders of pictures named {', '.join(wnids)}"
    space = 100_000_000
