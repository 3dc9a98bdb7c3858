"""Save and resume: the tensors of all ranks in torch.distributed.checkpoint's files, written in the background.

A checkpoint is a folder that appears when it is whole (files.py), with the shards of every rank (`__<rank>_0.distcp`)
and DCP's index of them (`.metadata`, a pickle: resume from folders that you trust).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from tdm_fast.files import (
    SaveError,
    beside,
    finish_checkpoint,
    latest_checkpoint,
    locked,
    read_state,
    remove_older,
    tidy,
)

INDEX_FILE = ".metadata"
PATIENCE = timedelta(hours=1)
"""How long ranks wait for what one of them does alone: its disk, samples, an estimate. A death is noticed at once."""
GRACE = 20.0
"""Seconds that a failing run of several ranks leaves to a save that is under way."""

Groups = Mapping[str, Mapping[str, Tensor]]
"""Named groups of named tensors: plain ones, equal on all ranks, or DTensors."""
T = TypeVar("T")


class Ranks(Protocol):
    """What is asked of the ranks of a run."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...


@dataclass(frozen=True)
class Alone:
    """One process, no process group."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, its tensors not read yet."""

    path: Path
    meta: dict[str, Any]
    """What was given to `save`, and `step`."""
    groups: dict[str, dict[str, Tensor]]
    """Its tensors on the meta device: shapes and types."""


class Checkpoints:
    """The checkpoints of a run's folder; entered by all of the run's ranks, which must share the file system.

    Inside, other runs are kept out of the folder. All methods are to be called by all ranks.

        with Checkpoints(folder, ranks, keep=2) as store:
            found = store.read(store.newest)            # shapes and meta, before networks exist
            store.load(found, groups)                   # in place, tensors plain or sharded in any way
            ...
            store.save(step, groups, meta)              # waits only for the copies
            if store.failed:                            # on any rank, at every step
                store.wait()                            # raises SaveError
    """

    def __init__(self, folder: Path, ranks: Ranks | None = None, *, keep: int | None = None) -> None:
        self.folder, self.keep, self.ranks = folder, keep, ranks or Alone()
        self.last: Path | None = None
        """The one saved last or being saved, or gone on from."""
        self._group: dist.ProcessGroup | None = None
        self._stack = ExitStack()
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None
        self._pinned: dict[str, Tensor] = {}

    def __enter__(self) -> Checkpoints:
        """Lock the folder, which is made if need be, and clear away what killed runs have left half done.

        Raises ValueError when another run is in it.
        """
        if self.ranks.world > 1:
            # The training's own collectives must not meet those of a save in the background.
            self._group = gloo_group(PATIENCE)

        def enter() -> None:
            self._stack.enter_context(locked(self.folder))
            tidy(self.folder)

        try:
            self.on_main(enter)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the save that is under way. Raises its SaveError, unless the run has failed for another reason."""
        try:
            if kind is None:
                self.wait()
            elif self._thread is not None:
                self._thread.join(GRACE if self.ranks.world > 1 else None)
                if self._error is not None:
                    print(f"note: {self._error}", file=sys.stderr)
        finally:
            self._close()

    def _close(self) -> None:
        self._stack.close()
        if self._group is not None and (self._thread is None or not self._thread.is_alive()):
            dist.destroy_process_group(self._group)
            self._group = None

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0; all ranks get what it returns, or raise what it raises."""
        if self._group is None:
            return work()
        outcome: list[Any] = [None]
        if self.ranks.rank == 0:
            outcome = [_outcome(work)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        return _result(outcome[0])

    def on_all(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank and return its own result; all ranks raise what the first one to fail raises."""
        if self._group is None:
            return work()
        mine = _outcome(work)
        errors: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(errors, mine if isinstance(mine, _Failure) else None, group=self._group)
        for error in errors:
            if error is not None:
                raise error.error
        return _result(mine)

    def newest(self) -> Path | None:
        """The whole checkpoint with the highest step, or None."""
        return self.on_main(lambda: latest_checkpoint(self.folder))

    def read(self, path: Path) -> Checkpoint:
        """Read all but the tensors, and check all files, each rank some of them. Raises ValueError as `inspect`."""
        return self.on_all(lambda: inspect(path, part=self.ranks.rank, parts=self.ranks.world))

    def load(self, checkpoint: Checkpoint, groups: Groups) -> None:
        """Copy a checkpoint's tensors into those of `groups`, in place, sharded however they are.

        Raises ValueError when names, shapes or types of a group are not the checkpoint's.
        """
        self.on_all(lambda: load_into(checkpoint, groups))
        self.last = checkpoint.path

    def save(self, step: int, groups: Groups, meta: Mapping[str, Any]) -> None:
        """Save `checkpoint-<step>` in the background; one of the same step is replaced.

        Returns when the tensors are copied and may change again. Of a tensor's replicas one is written: rank 0's of
        plain tensors, of DTensors each in turn. The folder appears under its name when all ranks have written and
        everything is on the disk. Then, of those up to this step, the newest `keep` stay; later ones stay as well.
        Raises SaveError as `wait`, for the save before, which is waited for.
        """
        self.wait()
        plan, data = self._stage(groups)
        content = {"step": step, **meta, "groups": {name: len(tensors) for name, tensors in groups.items()}}
        self.last = self.folder / f"checkpoint-{step}"
        # A daemon: a rank that is to end must not wait for one that does not answer.
        self._thread = threading.Thread(
            target=self._write, args=(self.last, plan, data, content), name=self.last.name, daemon=True
        )
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the save in the background has ended with an error, which `wait` raises; waits for nothing."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for the save in the background. Raises SaveError when it failed; the ones before are intact."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            self.last = latest_checkpoint(self.folder)
            raise error

    @torch.no_grad()
    def _stage(self, groups: Groups) -> tuple[SavePlan, dict[str, Tensor]]:
        """What this rank writes: the plan of it, and copies of its tensors on the CPU."""
        items: list[WriteItem] = []
        data: dict[str, Tensor] = {}
        for number, (key, tensor) in enumerate(flat(groups).items()):
            mine = _my_turn(tensor, number) if isinstance(tensor, DTensor) else self.ranks.rank == 0
            if not mine:
                continue
            local = tensor.detach()
            local = local.to_local() if isinstance(local, DTensor) else local
            if local.numel() or not tensor.numel():  # a small tensor has no rows for some of the ranks
                items += create_default_local_save_plan({key: tensor}, True).items
                data[key] = self._copy(key, local)
        for device in {tensor.device for tensor in flat(groups).values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return SavePlan(items), data

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        """A copy on the CPU. Those of a GPU's tensors have pinned memory, which is slow to get and so kept."""
        kept = self._pinned.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if tensor.is_cuda:
            self._pinned[key] = kept
        return kept.copy_(tensor, non_blocking=True)

    def _write(self, target: Path, plan: SavePlan, data: dict[str, Tensor], content: dict[str, Any]) -> None:
        """The save, in its thread."""
        partial = beside(target, "partial")
        writer = _Writer(partial)
        try:
            self.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be in one process
            dcp.save(
                {},
                storage_writer=writer,
                planner=_SavePlanner(plan, data),
                process_group=self._group,
                no_dist=self._group is None,
            )
            files = self._gathered(writer.files)
            self.on_main(lambda: self._finish(target, partial, {**content, "files": files}))
        except BaseException as error:
            if self.ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            last = latest_checkpoint(self.folder)
            where = f"The last whole checkpoint is {last}." if last else "No checkpoint had been saved before."
            self._error = SaveError(f"could not write {target}: {_reason(error)}. {where}")
            self._error.__cause__ = error

    def _gathered(self, files: dict[str, Any]) -> dict[str, Any]:
        """What all ranks have written, on rank 0."""
        if self._group is None:
            return files
        found: list[Any] | None = [None] * self.ranks.world if self.ranks.rank == 0 else None
        dist.gather_object(files, found, dst=0, group=self._group)
        return {name: of for part in found or () for name, of in part.items()}

    def _finish(self, target: Path, partial: Path, content: dict[str, Any]) -> None:
        """Give a folder that all ranks have filled its name, and remove the oldest."""
        finish_checkpoint(partial, target, content)
        if self.keep is not None:
            remove_older(target, self.keep)


def save_checkpoint(
    folder: Path, step: int, groups: Groups, meta: Mapping[str, Any], *, keep: int | None = None
) -> Path:
    """`Checkpoints.save` of one process, to its end, in a folder that the caller has locked; returns what it wrote.

    Raises SaveError when the disk is full or the folder cannot be written.
    """
    store = Checkpoints(folder, keep=keep)
    store.save(step, groups, meta)
    store.wait()
    return folder / f"checkpoint-{step}"


def inspect(path: Path, *, part: int = 0, parts: int = 1) -> Checkpoint:
    """Read all of a checkpoint but its tensors; check the sizes of all files, the content of every `parts`-th.

    Raises ValueError when it is no checkpoint, or a file is missing, damaged or another checkpoint's.
    """
    content = read_state(path, lambda number, name: name == INDEX_FILE or number % parts == part)
    index = dcp.FileSystemReader(path).read_metadata()
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in content.pop("groups")}
    for key, info in index.state_dict_metadata.items():
        assert isinstance(info, TensorStorageMetadata)
        group, name = key.split("/", 1)
        groups[group][name] = torch.empty(info.size, dtype=info.properties.dtype, device="meta")
    return Checkpoint(path, content, groups)


def load_into(checkpoint: Checkpoint, groups: Groups) -> None:
    """`Checkpoints.load` of this process alone."""
    for group, tensors in groups.items():
        saved = checkpoint.groups.get(group, {})
        if odd := sorted(saved.keys() ^ tensors.keys()):
            whose = "the checkpoint" if odd[0] in saved else "this run"
            raise ValueError(
                f"{checkpoint.path} does not fit this run: {len(odd)} tensors of {group} are in one of them alone,"
                f" {odd[0]} in {whose}"
            )
        for name, tensor in tensors.items():
            if (saved[name].shape, saved[name].dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"{checkpoint.path} does not fit this run: {group}/{name} is {_described(saved[name])} there and"
                    f" {_described(tensor)} here"
                )
    targets = {key: tensor.detach() for key, tensor in flat(groups).items()}
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # every rank reads by itself
    try:
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.load(targets, storage_reader=dcp.FileSystemReader(checkpoint.path), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"checkpoint {checkpoint.path} cannot be read: {_reason(error)}") from error


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a whole checkpoint into plain tensors on the CPU: (groups of tensors, meta). Raises ValueError as `inspect`.

    For small ones and for tools: every tensor is whole in this process's memory.
    """
    found = inspect(path)
    groups = {
        group: {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
        for group, tensors in found.groups.items()
    }
    load_into(found, groups)
    return groups, found.meta


def first_words(error: BaseException) -> str:
    """What gloo says went wrong, without where in its source and what it guesses."""
    return re.sub(r"^\[[^]]*\] *", "", str(error).strip()).split(". ", 1)[0]


def gloo_group(limit: timedelta) -> dist.ProcessGroup:
    """A group of all ranks of its own, on CPUs; made by all of them at the same point of the program."""
    group = dist.new_group(backend="gloo", timeout=limit)
    assert isinstance(group, dist.ProcessGroup)
    return group


def flat(groups: Groups) -> dict[str, Tensor]:
    """All tensors of groups, as `<group>/<name>`."""
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


class _SavePlanner(DefaultSavePlanner):
    """Writes what has been staged, as planned then."""

    def __init__(self, plan: SavePlan, data: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged, self.data = plan, data

    def create_local_plan(self) -> SavePlan:
        self.plan = self.staged
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.data[index.fqn]


class _Writer(dcp.FileSystemWriter):
    """Writes files, each on the disk when it is closed, and keeps their sizes and checksums."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=True, per_thread_copy_ahead=0)  # the tensors are on the CPU already
        self.files: dict[str, dict[str, Any]] = {}
        """`{"bytes": …, "sha256": …}` of every file that this rank has written."""
        self.fs = _HashedFiles(self.files)


class _HashedFiles(FileSystem):
    def __init__(self, files: dict[str, dict[str, Any]]) -> None:
        self.files = files

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        try:
            with _HashedFile(io.FileIO(path, mode)) as stream:
                yield stream
        except RuntimeError as error:
            # Where a disk is full torch.save says only that it cannot end its archive.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None
        self.files[Path(path).name] = {"bytes": stream.size, "sha256": stream.digest.hexdigest()}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class _HashedFile(io.BufferedWriter):
    """A file that is written from front to back."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return super().write(data)


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return _Failure(error)


def _result(outcome: Any) -> Any:
    if isinstance(outcome, _Failure):
        raise outcome.error
    return outcome


def _my_turn(tensor: DTensor, number: int) -> bool:
    """Whether of a DTensor's replicas this rank's is the one to write: they take turns, by the tensor's number."""
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    return coordinate is not None and all(
        coordinate[dim] == number % mesh.size(dim)
        for dim, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )


def _reason(error: BaseException) -> str:
    """One line about why a save or a load failed."""
    collective = isinstance(error, RuntimeError)  # what gloo raises; what a rank raises itself comes wrapped
    while isinstance(error, CheckpointException):
        error = error.failures[min(error.failures)][0]
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if collective:
        return f"a rank has died, or does not answer ({first_words(error)})"
    return str(error) or type(error).__name__


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
