"""Save and resume: checkpoints are folders of safetensors, written beside their place and renamed when whole."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

STATE_FILE = "state.json"


class SaveError(RuntimeError):
    """A checkpoint could not be written; whatever was saved before is untouched."""


def save_checkpoint(
    folder: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    *,
    keep: int | None = None,
) -> Path:
    """Write `folder/checkpoint-<step>` and return it; one of the same step is replaced.

    Of those up to this step the newest `keep` stay; later ones stay as well.

    Every group of tensors becomes one safetensors file, `meta` goes to `state.json`. The folder appears under its name
    only when it is whole and on the disk, so that a reader never sees a torn one.
    Raises SaveError when the disk is full or the folder cannot be written.
    """
    target = folder / f"checkpoint-{step}"
    try:
        with whole_folder(target) as partial:
            for name, tensors in groups.items():
                packed = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
                _write(partial / f"{name}.safetensors", packed)
            _write(partial / STATE_FILE, json.dumps({"step": step, **meta}, indent=2).encode())
    except SaveError as error:
        last = latest_checkpoint(folder)
        where = f"The last whole checkpoint is {last}." if last else "No checkpoint had been saved before."
        raise SaveError(f"{error}. {where}") from error
    if keep is not None:
        # Later ones are there when a run went back to an earlier one; they are not older for having a higher step.
        found = checkpoints(folder)
        for old in found[: found.index(target) + 1][:-keep]:
            shutil.rmtree(old)
    return target


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to fill; it takes `folder`'s name and place when the block ends, and not a moment before.

    Raises SaveError, `folder` as it was, when what the block writes does not fit the disk.
    """
    partial, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        # A folder cannot replace a full one in one step, and one that is being deleted must not be taken for whole.
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"could not write {folder}: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be, until the block or the process ends.

    Raises ValueError when another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is in use by another run; wait for its end or name another folder") from error
        yield
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a folder written by `save_checkpoint`: (groups of tensors, meta).

    Raises ValueError when the folder is no checkpoint or a file in it is damaged.
    """
    if not (path / STATE_FILE).is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())) if path.is_dir() else "no such folder"
        raise ValueError(f"{path} is not a checkpoint (no {STATE_FILE}; found: {found or 'an empty folder'})")
    try:
        meta = json.loads((path / STATE_FILE).read_text())
        groups = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error}); remove it to go on from the one before") from error
    return groups, meta


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest step first."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat tensors, `<parameter index>.<name>`; rates follow from the step and stay out."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, slots in state.items() for name, value in slots.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, for an optimiser over the same parameters in the same order."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content in one step; raises SaveError, the old content intact, when it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SaveError(f"could not write {path}: {error.strerror or error}") from error


def truncate_log(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows of a JSON-lines file that a resumed run will write again: those that `keep` says no to."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # a kill can leave a torn last line
            if keep(json.loads(line)):
                lines.append(line)
    write_atomically(path, "".join(line + "\n" for line in lines).encode())


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError when the file is damaged or the object lacks one of `keys`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object")
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return content


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Have a file's or a folder's content on the disk before what is done next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
