"""Signs of life between ranks: a thread of each tells the others that it is there, whatever else the rank waits for.

A rank that waits for its GPU, in a collective which a dead rank will never join, cannot look for itself: NCCL's own
time-out is as long as the slowest thing that ranks ever wait for. The threads need neither the GPU nor the main thread.
"""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from tdm_fast.checkpoint import first_words

BEAT = 2.0
"""Seconds between two signs."""
GRACE = 10.0
"""Seconds in which the main thread of a rank that has lost another may end it by itself, with its own message."""


class Heartbeat:
    """Ends this process, with a message and code 1, when another rank dies or is silent for `limit`.

    `group` is one that nothing else uses, and whose time-out is `limit`. All ranks start and stop it.
    """

    def __init__(self, group: dist.ProcessGroup, limit: timedelta) -> None:
        self._group, self._limit = group, limit
        self._leaving, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self, *, failed: bool) -> None:
        """Wait for all ranks to stop theirs; one that has failed waits for nobody, and ends without being told to."""
        self._leaving.set()
        if failed:
            self._over.set()
        else:
            self._thread.join()

    def _beat(self) -> None:
        while True:
            staying = torch.tensor([not self._leaving.is_set()], dtype=torch.int32)
            try:
                dist.all_reduce(staying, op=dist.ReduceOp.MAX, group=self._group)
            except RuntimeError as error:
                self._end(error)
                return
            if not staying.item():
                return
            self._leaving.wait(BEAT)

    def _end(self, error: RuntimeError) -> None:
        if self._over.wait(GRACE):
            return
        rank = f"rank {dist.get_rank()}: " if dist.get_rank() else ""
        print(f"tdm-fast: {rank}{lost(error, self._limit)}", file=sys.stderr, flush=True)
        os._exit(1)


def lost(error: RuntimeError, limit: timedelta) -> str:
    """What a rank says that has lost another."""
    return (
        f"another rank has died, or has not answered for {limit.total_seconds():g} s ({first_words(error)}); this one"
        " ends, too, and saves nothing: the same command goes on from the last whole checkpoint"
    )
