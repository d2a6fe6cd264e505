"""Run one DVC stage, and only that one, as a Snakemake job: `python -m pipeline.run_stage STAGE [GPUS]`.

Pins the stage to free local GPUs if it asks for some and GPU_POOL (such as `0,1`) names them. Ends the stage if the
Snakemake process that asked for it (CASEMATE_ENGINE) is killed, so that nothing goes on behind the next run's back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

SLOTS = Path(".snakemake/gpu-slots")


def claim_gpus(count: int, pool: list[str]) -> tuple[list[str], list[IO[str]]]:
    """`count` ids of the pool that no other stage holds, waited for; they are held while the handles stay open."""
    SLOTS.mkdir(parents=True, exist_ok=True)
    while True:
        ids: list[str] = []
        handles: list[IO[str]] = []
        for gpu in pool:
            handle: IO[str] = open(SLOTS / gpu, "w")  # noqa: SIM115  held while the stage runs
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.close()
                continue
            ids.append(gpu)
            handles.append(handle)
            if len(ids) == count:
                return ids, handles
        for handle in handles:  # give all back: two stages that wait for each other's would wait for ever
            handle.close()
        time.sleep(1)


def alive(pid: int) -> bool:
    """Whether the engine still lives; 0 stands for no engine to follow."""
    return pid == 0 or Path(f"/proc/{pid}").exists() or not Path("/proc").exists()


def main() -> int:
    stage, gpus = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    engine = int(os.environ.get("CASEMATE_ENGINE", "0"))
    environment, pool = dict(os.environ), os.environ.get("GPU_POOL", "")
    handles: list[IO[str]] = []
    if gpus and pool and "SLURM_JOB_ID" not in environment:
        ids, handles = claim_gpus(gpus, pool.split(","))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(ids)
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    child = subprocess.Popen(command, env=environment, start_new_session=True)

    def stop(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while True:
        try:
            return child.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if not alive(engine):
                stop()
        finally:
            if child.poll() is not None:
                for handle in handles:
                    handle.close()


if __name__ == "__main__":
    sys.exit(main())
