"""Runs of `tdm-fast train` on a few ranks of this machine, and the accidents that they meet."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import checkpoint_jobs
import few_ranks
import torch
from few_ranks import Few
from rank_runs import environment, free_port
from torch import Tensor

from tdm_fast import checkpoint, cli, step, train
from tdm_fast.guards import Guard, local
from tdm_fast.metering import Cost
from tdm_fast.sizing import Costs

Accident = Callable[[Few], None]
"""What a rank does before its run begins: it replaces functions."""


def start(arguments: Sequence[object], world: int, folder: Path, *accidents: Accident) -> few_ranks.Job:
    """Start `tdm-fast train` with `arguments` on `world` ranks; `folder` is for what they say, new for each run."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(few_ranks.PRELOAD)
    port, words = free_port(), [str(word) for word in arguments]
    processes = [
        context.Process(target=_rank, args=(Few(rank, world), port, folder, words, accidents)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return few_ranks.Job(processes, folder)


def _rank(ranks: Few, port: int, folder: Path, words: Sequence[str], accidents: Sequence[Accident]) -> None:
    os.dup2(os.open(folder / f"{ranks.rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    (folder / f"{ranks.rank}.pid").write_text(str(os.getpid()))
    os.environ.update(environment(ranks.rank, ranks.world, port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    spare_what_no_fault_touches()
    for accident in accidents:
        accident(ranks)
    sys.exit(cli.main(["train", *words]))


def spare_what_no_fault_touches() -> None:
    """Leave out what a run computes of its memory and cost before it begins, its pictures and its comparison.

    These take the most of so small a run's time; the test under torchrun leaves nothing out.
    """
    one = Cost(forward=1, trained=1)
    train.refuse_what_cannot_fit = lambda *_: "not computed"
    train.measure_costs = lambda config, teacher, cache, shapes, ranks: [Costs(one, one, one) for _ in shapes]
    train.measured_matmul_rate = lambda *_: 1.0
    train.validate = lambda *_: None
    train.finish = lambda *_, **__: {}


class Kill(checkpoint_jobs.Kill):
    """kill -9 of one rank or of all, in the middle of an iteration or in a phase of the save after it."""

    def moments(self) -> dict[str, tuple[Any, str, Callable[..., bool]]]:
        # A rank's last call is the student's loss: weights are gathered, the fake score is updated, the student not.
        middle = (step, "student_loss", lambda *arguments, **_: arguments[6] == self.step)
        return {**super().moments(), "training": middle}


class Poison:
    """A gradient of one rank is not a number, at an iteration for each role.

    In the `backward` all that it computes is not, before the ranks' gradients are added up; in the `shard` one number
    of those that the rank has got when they have been.
    """

    def __init__(self, victim: int, where: str, at: Mapping[str, int]) -> None:
        self.victim, self.where, self.at = victim, where, at

    def __call__(self, ranks: Few) -> None:
        if ranks.rank != self.victim:
            return
        if self.where == "shard":
            self.poison_shards()
            return
        for role, iteration in self.at.items():
            self.poison_loss(f"{role}_loss", iteration)

    def poison_loss(self, name: str, at: int) -> None:
        original, place = getattr(step, name), {"fake_loss": 5, "student_loss": 6}[name]

        def loss(*arguments: Any, **names: Any) -> Tensor:
            value = original(*arguments, **names)
            if arguments[place] == at:
                value.register_hook(lambda gradient: gradient * float("nan"))
            return value

        setattr(step, name, loss)

    def poison_shards(self) -> None:
        original, calls = Guard.step, dict.fromkeys(self.at, 0)

        def guarded(guard: Guard, role: str, optimizer: torch.optim.Optimizer, *arguments: Any, **names: Any) -> Any:
            if calls[role] == self.at[role]:
                gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                next(mine for mine in map(local, gradients) if mine.numel()).view(-1)[0] = float("nan")
            calls[role] += 1
            return original(guard, role, optimizer, *arguments, **names)

        Guard.step = guarded  # type: ignore[method-assign,assignment]


class Witness:
    """Every rank leaves its own part of what it trains, as it is after each iteration, in `<rank>.pt` of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, ranks: Few) -> None:
        original = train.update

        def update(state: step.State, *arguments: Any) -> dict[str, Tensor]:
            values = original(state, *arguments)
            groups = checkpoint.flat(state.groups())
            torch.save(
                {name: local(tensor).clone() for name, tensor in groups.items()}, self.folder / f"{ranks.rank}.pt"
            )
            return values

        train.update = update


class Clock:
    """A clock that jumps back and forth, on each rank to other times."""

    def __init__(self, *moments: float) -> None:
        self.moments = moments

    def __call__(self, ranks: Few) -> None:
        times = cycle([moment + 1e6 * ranks.rank for moment in self.moments])
        time.time = lambda: next(times)


class Pause:
    """Before iteration `at` the ranks wait until a file is there."""

    def __init__(self, at: int, until: Path) -> None:
        self.at, self.until = at, until

    def __call__(self, ranks: Few) -> None:
        original = train.make_batch

        def make_batch(iteration: int, *arguments: Any) -> step.Batch:
            while iteration == self.at and not self.until.exists():
                time.sleep(0.01)
            return original(iteration, *arguments)

        train.make_batch = make_batch
