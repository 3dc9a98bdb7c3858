"""Jobs on a few gloo ranks of this machine: processes forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["tdm_fast.train", "tdm_fast.sample", "tdm_fast.make_teacher"]  # as conftest.py does: one server serves all


@dataclass(frozen=True)
class Few:
    """A rank of a job."""

    rank: int
    world: int


@dataclass
class Job:
    """Running ranks; what they say goes to files."""

    processes: list[ForkServerProcess]
    folder: Path

    def wait(self, timeout: float = 60) -> list[int]:
        """Wait for their ends; returns the exit codes, minus the signal's number where a signal ended a rank."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in codes, f"after {timeout} s some still run: {codes}: {self.errors()}"
        return [code for code in codes if code is not None]

    def errors(self, rank: int | None = None) -> str:
        ranks = range(len(self.processes)) if rank is None else [rank]
        return "\n".join((self.folder / f"{r}.err").read_text() for r in ranks if (self.folder / f"{r}.err").exists())


def start(job: Callable[..., Any], world: int, folder: Path, *arguments: object) -> Job:
    """Start `job(ranks, *arguments)` on `world` ranks; `folder` is for what they say, new for each job."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    processes = [
        context.Process(target=_rank, args=(job, rank, world, folder, arguments), daemon=True) for rank in range(world)
    ]
    for process in processes:
        process.start()
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    return Job(processes, folder)


def _rank(job: Callable[..., Any], rank: int, world: int, folder: Path, arguments: tuple[object, ...]) -> None:
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    from tdm_fast import cli

    def run() -> int:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        job(Few(rank, world), *arguments)
        if world > 1:
            dist.destroy_process_group()
        return 0

    sys.exit(cli.guarded(run))
