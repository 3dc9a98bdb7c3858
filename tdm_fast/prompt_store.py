"""Encoded prompts on the disk: a folder of safetensors shards and an index, by content, filled by one rank or many.

A shard `shard-<digest>.safetensors` holds prompts' states end to end (`rows` `[sum of L, D]`), their `lengths` and
`keys`, digests of the prompts' text; with a second encoder also `rows_2` and `lengths_2`. A shard is written beside its
place and renamed when whole, so a fill that is killed has lost only what it had not yet written, and the next one goes
on. `index.json`, written last, says which encoders made them and names the prompts in order.

States are kept in the type that the encoder computed in: those of one that ran in bfloat16 have no more digits than
bfloat16 holds, and take half the room (a T5-XXL's of 512 tokens 4 MB instead of 8).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from tdm_fast.encoders import Encoder, EncoderFiles
from tdm_fast.files import locked, read_json, write_atomically
from tdm_fast.ranks import Ranks
from tdm_fast.text import MappedRows, PromptCache, batches, cut_note

INDEX_FILE = "index.json"
FORMAT = 1
KEY_BYTES = 16
SHARD_BYTES = 128 * 2**20
"""A shard is written when its states take this much,"""
SHARD_SECONDS = 60.0
"""or have taken this long: what a kill can cost."""
CHUNK = 4096
"""Prompts that are tokenized at a time, to know their lengths; their tokens are not kept."""
_NAMES = ("", "_2")
Load = Callable[[], Sequence[Encoder]]


def identity(encoders: Sequence[EncoderFiles]) -> str:
    """A short digest of what makes the states of a prompt what they are, but for the type that they are kept in."""
    said = [FORMAT, *((encoder.digest, encoder.kind) for encoder in encoders)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def key_of(prompt: str) -> bytes:
    """What a prompt is found by."""
    return hashlib.sha256(prompt.encode()).digest()[:KEY_BYTES]


@dataclass
class _Shards:
    """What a folder's whole shards hold."""

    files: list[Path]
    places: dict[bytes, tuple[int, ...]]
    """By key: the file, and the first line and length of the states of each encoder."""
    dtype: torch.dtype | None
    damaged: list[Path]

    def rows(self, prompts: Iterable[str], encoder: int) -> MappedRows:
        """The states of these prompts, all of which must be there."""
        found = [self.places[key_of(prompt)] for prompt in prompts]
        places = [(place[0], *place[1 + 2 * encoder : 3 + 2 * encoder]) for place in found]
        return MappedRows(self.files, "rows" + _NAMES[encoder], torch.tensor(places).view(-1, 3))

    def cache(self, prompts: Sequence[str], negative_prompt: str) -> PromptCache:
        """The cache of these prompts."""
        first, (negative,) = self.rows(prompts, 0), self.rows([negative_prompt], 0)
        if len(self.places[key_of(negative_prompt)]) == 3:
            return PromptCache(tuple(prompts), first, negative)
        second, (negative_2,) = self.rows(prompts, 1), self.rows([negative_prompt], 1)
        return PromptCache(tuple(prompts), first, negative, second, negative_2)


def fill(
    folder: Path,
    prompts: Sequence[str],
    encoders: str,
    load: Load,
    *,
    dtype: torch.dtype = torch.float32,
    negative_prompt: str = "",
    batch_size: int = 64,
    ranks: Ranks | None = None,
) -> PromptCache:
    """The cache of these prompts in `folder`; what is missing there is encoded first, a part by each of the ranks.

    `encoders` is their `identity`, and `load` gives them, one or two, computing in `dtype`; it is called only if
    something is missing. Every prompt is encoded once, whatever its number of occurrences, and so are the negative and
    the empty prompt. Ranks must share the file system. Whether it is done by one rank or many, at once or in several
    goes, the batches are the same and so are the states, on one kind of device. Raises ValueError when the folder holds
    other encoders' states, or lacks some and holds the others in another type, or when another run is filling it,
    SaveError when it cannot be written.
    """
    ranks = ranks or Ranks()
    wanted = list(dict.fromkeys([*prompts, negative_prompt, ""]))

    def complete() -> bool:
        shards = _scan(folder, encoders)
        return all(key_of(prompt) in shards.places for prompt in wanted) and set(prompts) <= set(_indexed(folder))

    if not ranks.from_main(complete):
        with locked(folder) if ranks.is_main else nullcontext():
            _encode_missing(folder, wanted, encoders, load, dtype, batch_size, ranks)
            if ranks.is_main:
                _write_index(folder, prompts, encoders)
        ranks.barrier()
    return _scan(folder, encoders).cache(prompts, negative_prompt)


def cached_prompts(folder: Path) -> list[str]:
    """The prompts that a cache was filled with, in order. Raises ValueError for a folder that holds no whole cache."""
    prompts = _indexed(folder)
    if not prompts:
        raise ValueError(
            f"{folder} holds no whole prompt cache (no {INDEX_FILE}); `tdm-fast encode` fills one, and goes on where an"
            " earlier one has stopped"
        )
    return prompts


def check_cache(folder: Path, encoders: str) -> int:
    """The number of prompts whose states are in a folder. Raises ValueError for states of other encoders."""
    return len(_scan(folder, encoders).places)


def _encode_missing(
    folder: Path,
    wanted: Sequence[str],
    encoders: str,
    load: Load,
    dtype: torch.dtype,
    batch_size: int,
    ranks: Ranks,
) -> None:
    def look() -> tuple[list[int], torch.dtype | None]:
        for name in ("shard-*", INDEX_FILE):  # what a killed fill has left, and nothing else that lies there
            for partial in folder.glob(f".{name}.partial"):
                partial.unlink()
        shards = _scan(folder, encoders)
        for path in shards.damaged:
            print(f"note: {path} is damaged; its prompts are encoded again", file=sys.stderr)
            path.unlink()
        return [i for i, prompt in enumerate(wanted) if key_of(prompt) not in shards.places], shards.dtype

    missing, kept = ranks.from_main(look)
    if not missing:
        return
    if kept not in (None, dtype):
        raise ValueError(
            f"{folder} holds states in {_plain(kept)}, and what is missing would be encoded in {_plain(dtype)};"
            f" `tdm-fast encode --dtype {_plain(kept)}` adds it there, or name another folder"
        )
    loaded, texts = load(), [wanted[i] for i in missing]
    units = batches(_lengths(texts, loaded, say=ranks.is_main), batch_size)
    mine = tqdm(units[ranks.rank :: ranks.world], desc="encode", delay=5, disable=not ranks.is_main)
    _encode(folder, texts, mine, loaded, encoders)
    ranks.barrier()


def _lengths(texts: Sequence[str], encoders: Sequence[Encoder], *, say: bool) -> list[int]:
    """The number of tokens of each text for the first encoder; says of each encoder what it has to cut."""
    found = []
    for encoder in encoders:
        chunks = (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
        found.append([len(row) for chunk in chunks for row in encoder.tokenize(chunk)])
        if say and (note := cut_note(texts, found[-1], encoder)):
            print(note, file=sys.stderr)
    return found[0]


def _encode(
    folder: Path, texts: Sequence[str], units: Iterable[list[int]], encoders: Sequence[Encoder], said: str
) -> None:
    """Encode these batches of texts and write them, whole batches to a shard.

    Whole, so that what is missing after a kill falls into the same batches as before, and comes out the same.
    """
    models = [{"name": e.name, "kind": e.kind, "width": e.width} for e in encoders]
    metadata = {"format": str(FORMAT), "encoders": said, "models": json.dumps(models)}
    keys: list[bytes] = []
    states: list[list[Tensor]] = [[] for _ in encoders]
    held, began = 0, time.monotonic()

    def write() -> None:
        nonlocal held, began
        tensors = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)}
        for name, rows in zip(_NAMES, states, strict=False):
            tensors["rows" + name] = torch.cat(rows)
            tensors["lengths" + name] = torch.tensor([len(row) for row in rows])
            rows.clear()
        digest = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        write_atomically(folder / f"shard-{digest}.safetensors", save(tensors, metadata))
        keys.clear()
        held, began = 0, time.monotonic()

    for unit in units:
        batch = [texts[i] for i in unit]
        keys += map(key_of, batch)
        for encoder, rows in zip(encoders, states, strict=True):
            made = encoder.encode(batch)
            held += sum(row.nbytes for row in made)
            rows += made
        if held >= SHARD_BYTES or time.monotonic() - began >= SHARD_SECONDS:
            write()
    if keys:
        write()


def _scan(folder: Path, encoders: str) -> _Shards:
    """What the whole shards of a folder hold. Raises ValueError for one of other encoders."""
    shards = _Shards([], {}, None, [])
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                keys, names = file.get_tensor("keys"), [n for n in _NAMES if f"lengths{n}" in file.keys()]  # noqa: SIM118
                lengths = torch.stack([file.get_tensor(f"lengths{name}") for name in names], dim=1)
                shards.dtype = file.get_tensor("rows").dtype
        except SafetensorError:
            shards.damaged.append(path)
            continue
        if metadata.get("encoders") != encoders:
            models = " and ".join(model["name"] for model in json.loads(metadata.get("models", "[]")))
            raise ValueError(
                f"{folder} holds prompts that another text encoder has encoded ({models or 'unknown'}); name another"
                " folder, or remove this one"
            )
        places = torch.stack((lengths.cumsum(0) - lengths, lengths), dim=2).flatten(1)
        for key, place in zip(keys.numpy(), places.tolist(), strict=True):
            shards.places[key.tobytes()] = (len(shards.files), *place)
        shards.files.append(path)
    return shards


def _indexed(folder: Path) -> list[str]:
    """The prompts that the index of a folder names; none where there is no whole index."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # a damaged one is written again
        return read_json(folder / INDEX_FILE, "prompts")["prompts"]
    return []


def _write_index(folder: Path, prompts: Sequence[str], encoders: str) -> None:
    said: dict[str, Any] = {"format": FORMAT, "encoders": encoders}
    said["prompts"] = list(dict.fromkeys([*_indexed(folder), *prompts]))
    write_atomically(folder / INDEX_FILE, json.dumps(said, ensure_ascii=False, indent=1).encode())


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
