"""Fills of a prompt cache that tests run in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tdm_fast import prompt_store
from tdm_fast.encoders import Encoder, find_encoder
from tdm_fast.prompt_store import fill, identity
from tdm_fast.ranks import Ranks, joined

COLOURS, THINGS = ("red", "blue", "small brown", "quick"), ("circle", "dog", "fox moving left", "café")
PROMPTS = [f"a {colour} {thing}" for colour in COLOURS for thing in THINGS]


def fill_folder(
    folder: Path,
    encoder: Path,
    prompts: Sequence[str] | None = None,
    negative_prompt: str = "",
    shard_bytes: int = 1 << 20,
    ranks: Ranks | bool | None = None,
) -> Any:
    """Fill a cache in batches of 3; as one of several ranks (True), what it holds is returned as plain tensors."""
    if ranks is True:
        with joined(torch.device("cpu"), "none") as found:
            cache = fill_folder(folder, encoder, prompts, negative_prompt, shard_bytes, found)
        return tuple(cache.prompts), [row.clone() for row in cache.embeddings], cache.negative.clone()
    files, before = [find_encoder(encoder, flag="--text_encoder_name_1")], prompt_store.SHARD_BYTES
    prompt_store.SHARD_BYTES = shard_bytes
    try:
        return fill(
            folder,
            PROMPTS if prompts is None else prompts,
            identity(files),
            lambda: [part.load() for part in files],
            negative_prompt=negative_prompt,
            batch_size=3,
            ranks=ranks or None,
        )
    finally:
        prompt_store.SHARD_BYTES = before


def slow_fill(folder: Path, encoder: Path) -> None:
    """A fill that takes its time after the second shard."""
    torch.set_num_threads(1)
    real = Encoder.states

    def states(self: Encoder, tokens: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        time.sleep(60 if len(list(folder.glob("shard-*"))) >= 2 else 0)
        return real(self, tokens)

    Encoder.states = states  # type: ignore[method-assign]
    fill_folder(folder, encoder, shard_bytes=1)
