"""Ask a dataset's official site, by torchvision's own class; runs as a process of its own (see `sources.Official`).

`python -m casemate.data.official '{"name": "MNIST", "base_url": null, "overrides": {}}'` leaves the files in the
current folder: unpacked idx files for the MNIST family, plain .npy arrays for CIFAR-10 (whose official files are
pickles, read by torchvision after its md5 check), and the files themselves for all others.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

CONNECT = 10.0  # seconds
SPLITS = {"SVHN": ("train", "test"), "STL10": ("train",)}
"""Of the classes that fetch by split; STL-10's archive holds them all."""


def download(job: Mapping[str, Any], folder: Path) -> None:
    """Fetch `job["name"]` into `folder`. Raises what torchvision raises: URLError, OSError, RuntimeError."""
    import torchvision

    socket.setdefaulttimeout(CONNECT)
    base = job["base_url"] and job["base_url"].rstrip("/") + "/"
    if job.get("url"):
        torchvision.datasets.utils.download_url((base or job["url"]) + job["name"], folder, md5=job["md5"])
        return
    attributes = dict(job["overrides"])
    original = getattr(torchvision.datasets, job["name"])
    if base and hasattr(original, "split_list"):
        asked = attributes.get("split_list", original.split_list)
        attributes["split_list"] = {split: [base + file, file, md5] for split, (_, file, md5) in asked.items()}
    elif base:
        attributes |= {"mirrors": [base]} if hasattr(original, "mirrors") else {"url": base + original.filename}
    dataset = type(job["name"], (original,), attributes)  # the name is part of torchvision's path
    if job["name"] in SPLITS:
        for split in SPLITS[job["name"]]:
            dataset(folder, split=split, download=True)
        return
    train = dataset(folder, train=True, download=True)
    if job["name"] != "CIFAR10":
        return
    test = dataset(folder, train=False)
    for split, part in (("train", train), ("test", test)):
        np.save(folder / f"{split}_images.npy", np.ascontiguousarray(part.data))
        np.save(folder / f"{split}_labels.npy", np.asarray(part.targets, dtype=np.int64))


def main() -> int:
    """Download into the current folder; a failure is one line, `failed: why`, and status 1."""
    try:
        import torchvision  # noqa: F401  (slow: the parent's clock starts when it is done)

        print("started", flush=True)
        download(json.loads(sys.argv[1]), Path.cwd())
    except Exception as error:  # whatever it is, the parent goes on to the next source and shows this line
        print(f"failed: {plain(error)}", flush=True)
        return 1
    return 0


def plain(error: Exception) -> str:
    """An error of torchvision or urllib in one short line; its list of addresses tried becomes their reasons."""
    words = " ".join(str(error).split()) or type(error).__name__
    reasons = re.findall(r"got: (.+?)(?= Tried |$)", words) or [words]
    told = dict.fromkeys(re.sub(r"<urlopen error (.+?)>", r"\1", reason) for reason in reasons)
    corrupted = "File not found or corrupted."
    return ", ".join("a file is truncated or altered" if reason == corrupted else reason for reason in told)


if __name__ == "__main__":
    sys.exit(main())
