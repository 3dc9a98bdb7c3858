"""Functions run by several ranks, each a process of one thread, over gloo on this machine."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import torch

from tdm_fast.ranks import joined

PRELOAD = [
    *("tdm_fast.train", "tdm_fast.sample", "tdm_fast.make_teacher"),
    *("torch.distributed.fsdp", "torch.distributed.tensor", "peft"),
]


def forkserver() -> ForkServerContext:
    """Processes that are forks of one which has imported PRELOAD.

    It imports what is installed, as pytest does, and not what lies in the working directory: Python 3.11's server has
    that first in its path.
    """
    context, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONSAFEPATH")
    context.set_forkserver_preload(PRELOAD)
    os.environ["PYTHONSAFEPATH"] = "1"
    ensure_running()
    os.environ.pop("PYTHONSAFEPATH") if before is None else os.environ.update(PYTHONSAFEPATH=before)
    return context


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
    """What `function(*arguments)` returns on each of `world` ranks; fails with the first error of any."""
    context = forkserver()
    # pytest's name for a test module is one that other processes cannot import; by its file's name they can.
    name = Path(function.__code__.co_filename).stem, function.__name__
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{rank}.pt" for rank in range(world)]
        started = [
            context.Process(target=_one, args=(environment(rank, world, port), name, arguments, str(path)))
            for rank, path in enumerate(paths)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(timeout)
        late = [rank for rank, process in enumerate(started) if process.is_alive()]
        for process in started:
            process.kill()
        errors = [path.with_suffix(".err").read_text() for path in paths if path.with_suffix(".err").exists()]
        assert not errors and not late, f"ranks {late} have not ended\n" + "\n".join(errors)
        return [torch.load(path, weights_only=False) for path in paths]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _one(variables: dict[str, str], name: tuple[str, str], arguments: Sequence[Any], path: str) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        module, function = name
        torch.save(getattr(importlib.import_module(module), function)(*arguments), path)
    except BaseException:
        Path(path).with_suffix(".err").write_text(f"rank {variables['RANK']}: {traceback.format_exc()}")
        sys.stderr.flush()
        os._exit(1)


def what_ranks_know() -> Any:
    """What four ranks, two to a copy of the weights and two to a sample, know of each other."""
    with joined(torch.device("cpu"), "hybrid", 2, 2) as ranks:
        mean = ranks.mean_(torch.tensor([float(ranks.data_rank)]))
        flags = ranks.any(ranks.rank == 3), ranks.any(False)
        ranks.barrier()
        assert ranks.context_group is not None
        peers = torch.distributed.get_process_group_ranks(ranks.context_group)
        return ranks.rank, ranks.data_rank, ranks.data_ranks, ranks.is_main, peers, mean.item(), flags, ranks.copies
