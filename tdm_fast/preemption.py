"""Leaving when told to: SIGTERM and SIGUSR1 ask a run to save at the end of its iteration and to end.

Schedulers send one of them some time before they kill. Any rank may get it, at any moment; so it only sets a flag, and
the ranks agree at the end of every iteration. The exit code is 143, which is what a process ended by SIGTERM has: 0
would tell a scheduler (Slurm, Kubernetes, torchrun) that the run is finished and needs no second start.

Under torchrun: the agent hands SIGTERM on to its ranks, but SIGUSR1 only if it is told to: with the environment's
`TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1`, or, where torchrun has that flag and overwrites
the variable, `--signals-to-handle` with the same list. It kills what has not ended after 30 seconds: the iteration and
the save have to fit in there; samples that are due are left out. An agent that dies, of a signal that it does not hand
on or by kill -9, tells its ranks nothing. They notice that they have another parent, and save and leave as if told to:
nobody would start them again, and they would keep the folder from a run that somebody does start.

When a rank has died torchrun sends SIGTERM to the others, too. They cannot agree any more, so nobody tries to save.
"""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tdm_fast.checkpoint import PATIENCE, Alone, Ranks, gloo_group
from tdm_fast.heartbeat import Heartbeat, lost

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 128 + signal.SIGTERM
ORPHANED = signal.SIGHUP
"""What stands for the death of torchrun's agent, of which there is no signal."""


class Preempted(Exception):
    """A run has ended because it was told to; what it had done is saved."""

    def __init__(self, by: signal.Signals, iteration: int, checkpoint: Path | None) -> None:
        why = "because torchrun has died" if by == ORPHANED else f"by {by.name}"
        super().__init__(
            f"stopped {why} after iteration {iteration}, which is saved in {checkpoint}; the same command goes"
            " on from there"
        )


class RankLost(RuntimeError):
    """A rank has died or does not answer; this one must end, too, and save nothing."""


class Agreed(NamedTuple):
    """What the ranks have agreed on at the end of an iteration."""

    stop: signal.Signals | None
    """The signal by which one of them has been told to leave, or ORPHANED."""
    failing: bool
    """Whether one of them is failing, so that all must."""


class Preemption:
    """Hears SIGTERM and SIGUSR1 inside its `with` block, which all ranks enter; only the main thread can.

    A rank that dies is noticed at once, as its sockets close; `limit` is for a machine that vanishes. It is no limit
    for what a rank does alone (compiling, decoding samples): threads tell of the ranks' lives (tdm_fast/heartbeat.py).
    """

    def __init__(self, ranks: Ranks | None = None, *, limit: timedelta = timedelta(seconds=45)) -> None:
        self.ranks, self.limit = ranks or Alone(), limit
        self.heard = 0
        """The signal that this rank has got, or 0."""
        self._group: dist.ProcessGroup | None = None
        self._heartbeat: Heartbeat | None = None
        self._before: dict[signal.Signals, Any] = {}
        # It is alive now: when the block is entered the ranks meet in the store that it keeps. Whom a shell alone has
        # started may well outlive that.
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> Preemption:
        if self.ranks.world > 1:
            self._group = gloo_group(PATIENCE)
            self._heartbeat = Heartbeat(gloo_group(self.limit), self.limit)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop(failed=not (kind is None or issubclass(kind, Preempted)))
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.heard = number

    def agreed(self, *, failing: bool = False) -> Agreed:
        """What any of the ranks has heard, or says of itself, until now; the same on all of them. Waits for no device.

        A rank whose torchrun has died has heard that. Raises RankLost when a rank has died.
        """
        heard: int = self.heard
        if not heard and self._agent not in (None, os.getppid()):
            heard = ORPHANED
        if self._group is not None:
            told = torch.tensor([heard, failing], dtype=torch.int32)
            try:
                dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
            except RuntimeError as error:
                raise RankLost(lost(error, self.limit)) from error
            heard, failing = int(told[0]), bool(told[1])
        return Agreed(signal.Signals(heard) if heard else None, failing)
