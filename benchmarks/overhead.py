"""What the pipeline costs when there is nothing to do, and what a stage costs besides its work.

    python benchmarks/overhead.py [--rounds 5]

Run it from the root of a project whose pipeline is up to date. Seconds, wall and CPU, median over the rounds; the
machine's load stands beside them because both engines start processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "dvc repro, nothing to do": ["-m", "dvc", "repro", "-q"],
    "dvc status": ["-m", "dvc", "status", "-q"],
    "snakemake -n, nothing to do": ["-m", "snakemake", "-n", "-q"],
    "validate params.yaml": ["-m", "pipeline", "check"],
    "start of a stage (--help)": ["-m", "pipeline.train", "--help"],
    "import mlflow": ["-c", "import mlflow"],
    "import torch": ["-c", "import torch"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """(wall, CPU) seconds of one run of this Python."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            taken[name].append(measure(arguments))
    rows = {
        name: {
            "wall_s": round(statistics.median(w for w, _ in t), 2),
            "cpu_s": round(statistics.median(c for _, c in t), 2),
        }
        for name, t in taken.items()
    }  # fmt: skip
    for name, row in rows.items():
        print(f"{name:32} {row['wall_s']:6.2f} s wall {row['cpu_s']:6.2f} s CPU")
    out = Path("benchmarks/results/overhead.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    conditions = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "rounds": rounds,
    }
    out.write_text(json.dumps({"conditions": conditions, "median": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
