"""A run's folder: what has its name there is whole, whatever was killed and whenever.

A checkpoint is a folder `checkpoint-<step>` of files and `state.json`, which has the step, what the caller says of its
run, and size and SHA-256 of every other file. It is filled under a hidden name and renamed when everything is on the
disk. Which one is the newest is told by the step's number, never by a clock. Files are replaced in the same way.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

STATE_FILE = "state.json"
LOCK_FILE = ".lock"
FORMAT = 2


class SaveError(RuntimeError):
    """A file or a checkpoint could not be written; whatever was saved before is untouched."""


# ---- checkpoints


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


def weight_files(folder: Path, pattern: str = "*.safetensors") -> list[Path]:
    """A network's files of weights, sorted: of a repository's several precisions (`model.fp16.safetensors`) the one
    without a name, which is what `from_pretrained` takes."""
    return sorted(path for path in folder.glob(pattern) if path.name.count(".") == 1)


def finish_checkpoint(partial: Path, target: Path, content: Mapping[str, Any]) -> None:
    """Give a filled folder its `state.json` and its name, in place of an older checkpoint if there is one.

    `content` is what `state.json` is to say; its `files` are `{name: {"bytes": …, "sha256": …}}`. Raises OSError when
    one of them is not there.
    """
    for name, of in content["files"].items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != of["bytes"]:
            raise OSError(f"{name} of another rank is not there; the folder must be one that all ranks share")
    content = {"format": FORMAT, **content}
    write(partial / STATE_FILE, json.dumps({"sha256": _digest(content), **content}, indent=2).encode())
    sync(partial)
    _put_in_place(partial, target)


def read_state(path: Path, digests: Callable[[int, str], bool]) -> dict[str, Any]:
    """What `state.json` of a checkpoint says, `files` left out, which are checked: their sizes, and the SHA-256 of
    those that `digests(number, name)` asks for.

    Raises ValueError when it is no checkpoint, or a file is missing, damaged or another checkpoint's.
    """
    if not (path / STATE_FILE).is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())) if path.is_dir() else "no such folder"
        raise ValueError(f"{path} is not a checkpoint (no {STATE_FILE}; found: {found or 'an empty folder'})")

    def damaged(file: str, what: str) -> ValueError:
        return ValueError(f"checkpoint {path} is damaged ({file} {what}); remove it to go on from the one before")

    try:
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
    except (json.JSONDecodeError, UnicodeDecodeError, AssertionError) as error:
        raise damaged(STATE_FILE, f"is no JSON object: {error}") from error
    if content.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path} is of another version of tdm-fast, which alone can go on from it")
    if content.pop("sha256", None) != _digest(content):
        raise damaged(STATE_FILE, "is not as it was saved: its SHA-256 differs")
    for number, (name, of) in enumerate(sorted(content.pop("files").items())):
        file = path / name
        if not file.is_file():
            raise damaged(name, "is missing")
        if (size := file.stat().st_size) != of["bytes"]:
            raise damaged(name, f"has {size} bytes, not {of['bytes']}: {'cut' if size < of['bytes'] else 'too long'}")
        if digests(number, name) and _sha256(file) != of["sha256"]:
            raise damaged(name, "is not as it was saved: its SHA-256 differs; bits are rotten or it is of elsewhere")
    del content["format"]
    return content


def remove_older(newest: Path, keep: int) -> None:
    """Of the checkpoints up to `newest` leave the last `keep`; later ones, of a run that went back, stay as well."""
    found = checkpoints(newest.parent)
    for old in found[: found.index(newest) + 1][:-keep]:
        # Under another name first: what is half deleted must not be taken for whole.
        os.replace(old, beside(old, "gone"))
        shutil.rmtree(beside(old, "gone"), ignore_errors=True)


def tidy(folder: Path) -> None:
    """Undo what killed runs have left half done in a folder that is locked."""
    for path in folder.glob(".checkpoint-*"):
        if match := re.fullmatch(r"\.(checkpoint-\d+)\.(partial|old|gone)", path.name):
            if match[2] == "old" and not (folder / match[1]).exists():  # killed while another took its place
                os.replace(path, folder / match[1])
            else:
                shutil.rmtree(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be, until the block or the process ends.

    A file in it is locked, and not the folder: file systems that several machines share pass on locks of files only.
    Raises ValueError when another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is in use by another run; wait for its end or name another folder") from error
        yield
    finally:
        os.close(descriptor)


# ---- any folder, any file


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to fill; it takes `folder`'s name and place when the block ends, and not a moment before.

    Raises SaveError, `folder` as it was, when what the block writes does not fit the disk.
    """
    partial = beside(folder, "partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        _put_in_place(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"could not write {folder}: {getattr(error, 'strerror', None) or error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content in one step; raises SaveError, the old content intact, when it cannot be written."""
    partial = beside(path, "partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial, data)
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


def beside(path: Path, suffix: str) -> Path:
    """The hidden name in the same folder under which something of that name is made or removed."""
    return path.with_name(f".{path.name}.{suffix}")


def write(path: Path, data: bytes) -> None:
    """Write a file, to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Have a file's or a folder's content on the disk before what is done next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename a folder that is whole, in place of another if there is one."""
    old = beside(folder, "old")
    # A folder cannot replace a full one in one step, and one that is being deleted must not be taken for whole.
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file's content, read once for as long as the file's size and time stay.

    The hub's cache names its large files by it, which saves reading 20 GB.
    """
    stored = path.resolve()
    if stored.parent.name == "blobs" and len(stored.name) == 64:
        return stored.name
    stat = stored.stat()
    return _sha256_once(stored, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256_once(path: Path, _size: int, _modified: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
