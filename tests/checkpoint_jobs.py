"""What the ranks of the checkpoints' tests do: a small training whose every number can be told, and its accidents."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from few_ranks import Few
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from tdm_fast import checkpoint, files
from tdm_fast.checkpoint import Checkpoints
from tdm_fast.optimizer_state import make_optimizer_state, optimizer_tensors
from tdm_fast.preemption import Preempted, Preemption

SHAPES = {"even": (6, 3), "odd": (5, 2), "flat": (1, 4), "bias": (7,), "lonely": (4,)}
"""`lonely` gets no gradient, so the optimiser knows no state of it; `flat` has a row for one rank alone."""


class Training:
    """Parameters drawn to targets by AdamW, an average, a counter; each element for itself, so sharding is exact."""

    def __init__(self, ranks: Few, *, sharded: bool) -> None:
        mesh = init_device_mesh("cpu", (ranks.world,)) if sharded else None

        def placed(tensor: Tensor) -> Tensor:
            return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

        self.placed, generator = placed, torch.Generator().manual_seed(0)
        starts = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        self.parameters = {name: nn.Parameter(placed(start)) for name, start in starts.items()}
        self.average = {name: placed(start.bfloat16()) for name, start in starts.items()}
        self.optimizer = torch.optim.AdamW(list(self.parameters.values()), lr=0.1, betas=(0.0, 0.95), foreach=False)
        self.counter, self.step = torch.zeros((), dtype=torch.int64), 0

    def groups(self) -> dict[str, dict[str, Tensor]]:
        return {
            "parameters": dict(self.parameters),
            "average": self.average,
            "optimizer": optimizer_tensors(self.optimizer),
            "counter": {"value": self.counter},
            "empty": {},
        }

    @torch.no_grad()
    def update(self) -> None:
        generator = torch.Generator().manual_seed(self.step)
        for name, parameter in self.parameters.items():
            target = self.placed(torch.randn(SHAPES[name], generator=generator))
            parameter.grad = None if name == "lonely" else parameter.detach() - target
        self.optimizer.step()
        for name, average in self.average.items():
            average.lerp_(self.parameters[name].detach().bfloat16(), 0.25)
        self.counter += 3
        self.step += 1

    def resume(self, store: Checkpoints) -> None:
        if (path := store.newest()) is not None:
            found = store.read(path)
            make_optimizer_state(self.optimizer, found.groups["optimizer"])
            store.load(found, self.groups())
            self.step = found.meta["step"]
            print(f"going on from {self.step}", file=sys.stderr)


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def train(
    ranks: Few,
    folder: Path,
    total: int,
    *,
    sharded: bool = True,
    accident: Callable[[Few], None] = lambda _: None,
    every: float = 0.0,
    limit: Any = None,
    pause: Path | None = None,
) -> None:
    """Go on to step `total` and leave everything in `result.pt`; a checkpoint at each step, of which two are kept.

    `pause` is a checkpoint 3 that is put back once the run goes on from 2.
    """
    accident(ranks)
    preemption = Preemption(ranks) if limit is None else Preemption(ranks, limit=limit)
    with Checkpoints(folder, ranks, keep=2) as store, preemption:
        training = Training(ranks, sharded=sharded)
        training.resume(store)
        if pause is not None and ranks.rank == 0:
            pause.rename(folder / "checkpoint-3")
        while training.step < total:
            training.update()
            at_step(training.step)
            stop, failing = preemption.agreed(failing=store.failed)
            if failing:
                store.wait()
            store.save(training.step, training.groups(), {"note": "x"})
            if stop is not None:
                store.wait()
                raise Preempted(stop, training.step, store.last)
            time.sleep(every)
        store.wait()
        result = {key: whole(tensor) for key, tensor in checkpoint.flat(training.groups()).items()}
        if ranks.rank == 0:
            torch.save(result, folder / "result.pt")


def at_step(step: int) -> None:
    """What an accident replaces."""


def impatient(_: Few) -> None:
    """Leave a save little time when a run fails."""
    checkpoint.GRACE = 1.0


class Kill:
    """kill -9 of one rank (`victim`) or of all (None), in a phase of step 3, with the files of `pids`."""

    def __init__(self, phase: str, victim: int | None, pids: Path, step: int = 3) -> None:
        self.phase, self.victim, self.pids, self.step = phase, victim, pids, step

    def __call__(self, ranks: Few) -> None:
        if ranks.rank != (self.victim or 0):
            return
        owner, attribute, due = self.moments()[self.phase]
        original = getattr(owner, attribute)

        def patched(*arguments: Any, **names: Any) -> Any:
            if due(*arguments, **names):
                if self.phase == "writing":
                    original(arguments[0], bytes(arguments[1])[:100])
                    arguments[0].flush()
                self.kill()
            return original(*arguments, **names)

        setattr(owner, attribute, patched)

    def moments(self) -> dict[str, tuple[Any, str, Callable[..., bool]]]:
        """Of each phase a function, where it is, and which of its calls is the victim's last."""
        name = f"checkpoint-{self.step}"
        return {
            "training": (globals_of_this_module(), "at_step", lambda step: step == self.step),
            "staging": (Checkpoints, "_copy", lambda store, *_: str(store.last).endswith(f"-{self.step - 1}")),
            "writing": (checkpoint._HashedFile, "write", lambda file, _: f".{name}.partial/__" in str(file.name)),
            "index": (checkpoint._HashedFile, "write", lambda file, _: f".{name}.partial/.meta" in str(file.name)),
            "state": (files, "write", lambda path, _: f".{name}.partial" in str(path)),
            "renaming": (os, "replace", lambda _, new: str(new).endswith(f"/{name}")),
            "renamed": (files, "sync", lambda path: (path / name).exists()),
            "removing": (files.shutil, "rmtree", lambda path, **_: str(path).endswith(".gone")),
        }

    def kill(self) -> None:
        if self.victim is None:
            for path in self.pids.glob("*.pid"):
                if (pid := int(path.read_text())) != os.getpid():
                    os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


class DiskFull:
    """No space for one rank's shard of step 3."""

    def __init__(self, victim: int) -> None:
        self.victim = victim

    def __call__(self, ranks: Few) -> None:
        if ranks.rank != self.victim:
            return
        write = checkpoint._HashedFile.write

        def patched(file: Any, data: Any) -> int:
            if ".checkpoint-3.partial" in str(file.name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(file, data)

        checkpoint._HashedFile.write = patched  # type: ignore[method-assign]


def globals_of_this_module() -> Any:
    import checkpoint_jobs

    return checkpoint_jobs


def save_replicas(ranks: Few, folder: Path) -> None:
    """Four tensors, sharded over two ranks and replicated over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = {
        f"{i}": distribute_tensor(torch.full((8, 1000), float(i)), mesh, [Replicate(), Shard(0)]) for i in range(4)
    }
    with Checkpoints(folder, ranks) as store:
        store.save(1, {"a": group}, {})


class Eighth(Tensor):
    """A state of 8 bits as torchao has them: codes, a scale per 4 elements, of which a row has 8, a table."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, qmap: Tensor) -> Eighth:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor, qmap: Tensor) -> None:
        self.codes, self.scale, self.qmap = codes, scale, qmap

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale", "qmap"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default or func is torch.ops.aten.view.default:
            return cls(args[0].codes, args[0].scale, args[0].qmap)
        raise NotImplementedError(func)

    @property
    def value(self) -> Tensor:
        return (self.qmap[self.codes.long()].view(-1, 4) * self.scale[:, None]).view_as(self.codes)

    def set(self, value: Tensor) -> None:
        self.scale.copy_(value.view(-1, 4).abs().amax(1) + 1e-6)
        self.codes.copy_(
            (value.view(-1, 4) / self.scale[:, None] * 127 + 128).round().clamp(0, 255).view_as(self.codes)
        )


class Eighths(torch.optim.Optimizer):
    """Momentum with states as torchao's; its rate must stay a tensor, and its states those of this rank's shard."""

    def __init__(self, parameters: Any, lr: Tensor) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert isinstance(group["lr"], Tensor)
            for parameter in group["params"]:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                grad = parameter.grad.to_local() if isinstance(parameter, DTensor) else parameter.grad
                state = self.state[parameter]
                if not state:
                    table = (torch.arange(256) - 128) / 127
                    inner = Eighth(
                        torch.full_like(local, 128, dtype=torch.uint8), torch.ones(local.numel() // 4), table
                    )
                    state["step"], state["moment"] = torch.tensor(0.0), inner
                    if isinstance(parameter, DTensor):
                        mesh, placements = parameter.device_mesh, parameter.placements
                        state["moment"] = DTensor.from_local(
                            inner, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
                        )
                moment = state["moment"]
                moment = moment.to_local() if isinstance(moment, DTensor) else moment
                moment.set(0.5 * moment.value + grad)
                state["step"] += 1
                local -= group["lr"] * moment.value


def save_eighths(ranks: Few, folder: Path) -> None:
    """Sharded states of 8 bits, saved, loaded, and loaded whole."""
    mesh = init_device_mesh("cpu", (ranks.world,))

    def make(*, sharded: bool) -> tuple[nn.Parameter, Eighths]:
        start = torch.linspace(-1, 1, 40).view(5, 8)
        parameter = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]) if sharded else start)
        return parameter, Eighths([parameter], lr=torch.tensor(0.5))

    def step(parameter: nn.Parameter, optimizer: Eighths, number: int) -> None:
        grad = torch.arange(40.0).view(5, 8) * number - 3
        parameter.grad = distribute_tensor(grad, mesh, [Shard(0)]) if isinstance(parameter, DTensor) else grad
        optimizer.step()

    ours = make(sharded=True)
    for number in (1, 2):
        step(*ours, number)
    with Checkpoints(folder, ranks) as store:
        store.save(2, {"p": {"p": ours[0]}, "o": optimizer_tensors(ours[1])}, {})
        step(*ours, 3)
        store.wait()
        found = store.read(folder / "checkpoint-2")
        shapes = [tuple(found.groups["o"][f"0.moment.{part}"].shape) for part in ("codes", "scale")]
        assert shapes == [(5, 8), (5, 2)]
        for sharded in (True, False):
            theirs = make(sharded=sharded)
            make_optimizer_state(theirs[1], found.groups["o"])
            store.load(found, {"p": {"p": theirs[0]}, "o": optimizer_tensors(theirs[1])})
            step(*theirs, 3)
            assert torch.equal(whole(theirs[0]), whole(ours[0])), sharded
