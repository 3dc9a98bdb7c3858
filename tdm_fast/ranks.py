"""The processes of one run: who this one is, which samples are its own, and with whom it shares weights and tokens."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tdm_fast.files import SaveError

Sharding = Literal["none", "full", "hybrid"]
T = TypeVar("T")

SECOND = 3.0
"""Seconds that a rank waits before it says that another one has died: the launcher shows what is said first."""
MPI = {
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
}
"""What torchrun tells a process, and the names that it has with Open MPI, Intel MPI and MVAPICH."""
_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "nccl", "connectfullmesh", "pair.cc")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run as one of them sees them; by default there is no other.

    They lie on a mesh replicate x shard x context, context varying fastest. The ranks that differ in context alone
    have the same samples, and split their tokens; all other ranks have samples of their own.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    """("replicate", "shard", "context"); None for one process, which makes no process group."""
    local_world: int = 1
    """How many processes of the run are on this one's machine."""
    weights: DeviceMesh | None = None
    """What weights lie on: ("weights",), the ranks that share one copy, or ("replicate", "weights")."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def context(self) -> int:
        """How many ranks share a sample."""
        return 1 if self.mesh is None else self.mesh.size(2)

    @property
    def data_ranks(self) -> int:
        """Into how many slices a batch is cut."""
        return self.world // self.context

    @property
    def data_rank(self) -> int:
        """Which of the slices is this process's."""
        return self.rank // self.context

    @property
    def copies(self) -> int:
        """How many whole copies of the weights there are."""
        return 1 if self.weights is None else self.world // self.weights.size(-1)

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this one's samples; None where there are no others."""
        return None if self.mesh is None or self.context == 1 else self.mesh.get_group("context")

    @torch.no_grad()
    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place; the same bits on all of them. Waits for no device."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Mean over the data ranks, in place, of what the ranks of a context have alike."""
        return self.sum_(tensor).div_(self.world)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: the same answer on all. Waits for the device."""
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)).item())

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, on all of them; where it raises there, the others see a rank lost."""
        if self.world == 1:
            return work()
        box: list[Any] = [work() if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index or 0] if self.device.type == "cuda" else None)


def mesh_shape(
    world: int, local_world: int, sharding: Sharding, shard_size: int | None, context_parallel: int
) -> tuple[int, int, int]:
    """Ranks per dimension: replicate, shard, context. Raises ValueError, with what would do, where they do not fit."""
    if sharding not in get_args(Sharding):
        raise ValueError(f"--sharding {sharding}: it takes {', '.join(get_args(Sharding))}")
    if context_parallel < 1 or world % context_parallel:
        raise ValueError(
            f"--context_parallel {context_parallel}: it must divide the number of ranks, {world}; {_fitting(world)} do"
        )
    if sharding == "none":
        return world // context_parallel, 1, context_parallel
    if sharding == "full":
        return 1, world // context_parallel, context_parallel
    size = local_world if shard_size is None else shard_size
    if size < 1 or world % size or size % context_parallel:
        fitting = _fitting(world, multiple_of=context_parallel)
        raise ValueError(
            f"--shard_size {size}: it must divide the number of ranks, {world}, and be a multiple of --context_parallel"
            f" {context_parallel}; {fitting} would do"
        )
    return world // size, size // context_parallel, context_parallel


def _fitting(world: int, multiple_of: int = 1) -> str:
    return ", ".join(str(n) for n in range(1, world + 1) if world % n == 0 and n % multiple_of == 0)


def check_batch(batch_size: int, accumulation: int, data_ranks: int) -> None:
    """Raise ValueError, with the nearest sizes that would do, for a batch that cannot be cut into equal slices."""
    unit = accumulation * data_ranks
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        raise ValueError(
            f"--train_batch_size {batch_size}: it is the number of samples of all ranks together, and must be a"
            f" multiple of {unit} ({data_ranks} ranks with samples of their own x --gradient_accumulation_steps"
            f" {accumulation}); {f'{below} or {above}' if below else above} would do"
        )


def planned(
    sharding: Sharding = "full", shard_size: int | None = None, context_parallel: int = 1
) -> tuple[int, tuple[int, int, int]]:
    """How many ranks `joined` would join, and the shape of their mesh. Raises its ValueErrors."""
    world, _, _, local_world = _environment()
    return world, mesh_shape(world, local_world, sharding, shard_size, context_parallel)


@contextmanager
def pretended(world: int, shape: tuple[int, int, int], device: torch.device, sharding: Sharding) -> Iterator[Ranks]:
    """The first of `world` ranks on a mesh of `mesh_shape`'s, the others of which do not exist.

    What it sends arrives nowhere, so it is for fake tensors only: to see what such a rank holds and communicates.
    """
    if world == 1:
        yield Ranks(device=device)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which makes the backend known, too

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield on_mesh(0, world, device, shape, sharding)
    finally:
        dist.destroy_process_group()


def _environment() -> tuple[int, int, int, int]:
    """What the launcher has set: the number of ranks, this one's, its number on its machine, and how many are there."""
    world, rank, local = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    return world, rank, local, int(os.environ.get("LOCAL_WORLD_SIZE", world))


@contextmanager
def joined(
    device: torch.device, sharding: Sharding = "full", shard_size: int | None = None, context_parallel: int = 1
) -> Iterator[Ranks]:
    """Join the other processes that torchrun or `accelerate launch` has started, if any, until the block ends.

    `device` is a CPU, or a GPU: without a number, the one of this process's number on its machine.
    Raises ValueError for ranks that the flags do not fit, and RankLost, in place of what torch says, where another rank
    has died.
    """
    _heed_mpi()
    world, rank, local, local_world = _environment()
    shape = mesh_shape(world, local_world, sharding, shard_size, context_parallel)
    if device.type == "cuda" and world > 1:
        if device.index is not None:
            raise ValueError(
                f"--device {device}: there are {world} ranks, each with a GPU of its own; --device cuda gives each one"
            )
        device = torch.device("cuda", local)
    if world == 1:
        yield Ranks(device=device)
        return
    from tdm_fast.checkpoint import PATIENCE
    from tdm_fast.preemption import RankLost
    from tdm_fast.rendezvous import fresh_store

    if device.type == "cuda":
        torch.cuda.set_device(device)
    bound: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    try:
        store, rank, world = fresh_store()
        backend = "nccl" if bound else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE, **bound)
        yield on_mesh(rank, world, device, shape, sharding, local_world)
    except RuntimeError as error:
        if isinstance(error, RankLost) or not _is_loss(error):
            if isinstance(error, RankLost):
                time.sleep(SECOND)
            raise
        time.sleep(SECOND)
        raise RankLost(
            f"another rank has died, or does not answer ({str(error).strip().splitlines()[0]}); this one ends, too, and"
            " saves nothing: the same command goes on from the last whole checkpoint"
        ) from error
    # After an error nothing is destroyed: that would wait for collectives that never end, and the process ends anyway.
    dist.destroy_process_group()


def _heed_mpi() -> None:
    """Say as torchrun does what MPI, by which `accelerate launch --cpu` starts processes, says of this one.

    Who starts several processes names where the main one is; without that a process of MPI is alone.
    """
    if "WORLD_SIZE" in os.environ or "MASTER_ADDR" not in os.environ:
        return
    said = {ours: next(filter(None, map(os.environ.get, theirs)), None) for ours, theirs in MPI.items()}
    if all(said.values()):
        os.environ.update({name: str(value) for name, value in said.items()})
    elif os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        print(
            "note: `accelerate launch --cpu` has started one process; with --mpirun_hostfile it starts several, by MPI,"
            " with --multi_gpu in place of --cpu without MPI, as torchrun does",
            file=sys.stderr,
        )


def on_mesh(
    rank: int, world: int, device: torch.device, shape: tuple[int, int, int], sharding: Sharding, local_world: int = 1
) -> Ranks:
    """One of the ranks of the process group that there is, which lie on a mesh of `mesh_shape`'s."""
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard", "context"))
    return Ranks(rank, world, device, mesh, local_world, _weights_mesh(device.type, shape, sharding))


def _weights_mesh(device_type: str, shape: Sequence[int], sharding: Sharding) -> DeviceMesh:
    replicate, shard, context = shape
    if sharding == "none":
        return init_device_mesh(device_type, (replicate * context, 1), mesh_dim_names=("replicate", "weights"))
    if replicate == 1:
        return init_device_mesh(device_type, (shard * context,), mesh_dim_names=("weights",))
    return init_device_mesh(device_type, (replicate, shard * context), mesh_dim_names=("replicate", "weights"))


def _is_loss(error: RuntimeError) -> bool:
    text = str(error).lower()
    if isinstance(error, SaveError | torch.AcceleratorError):  # a GPU's own failure, and a disk's
        return False
    return isinstance(error, dist.DistError) or any(word in text for word in _LOST)
