"""Encoding prompts before training. `tdm-fast encode` and `python -m tdm_fast.encode` are the same.

Under torchrun every rank encodes a part: `torchrun --nproc-per-node 8 -m tdm_fast.encode --prompts …`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from tdm_fast import cli

    sys.exit(cli.main(["encode", *sys.argv[1:]]))

import torch

from tdm_fast.checkpoint import read_json
from tdm_fast.encoders import Encoder, EncoderFiles, check_width, find_encoder
from tdm_fast.models.opensora_denoiser import say_unused
from tdm_fast.prompt_store import fill, identity
from tdm_fast.prompts import read_prompts
from tdm_fast.ranks import joined
from tdm_fast.step import resolve_device
from tdm_fast.text import PromptCache

TRANSFORMERS = ("transformer", "model", "any93x640x640", ".")
"""Where a teacher's folder may have its transformer."""


@dataclass(kw_only=True)
class EncodeConfig:
    """Encode prompts into a cache that `tdm-fast train --prompt_cache` takes.

    What is in the cache already is left as it is, so an encoding that was stopped goes on, and prompts can be added.
    """

    prompts: str
    """A UTF-8 text file with one prompt a line; .csv, .jsonl or .parquet; or a data set's name, owner/name:split."""
    output_dir: Path = Path("runs/prompts")
    """The cache's folder; ranks must share its file system."""
    model: Path | None = None
    """A teacher's folder, whose text encoders are taken where none is named, and whose width they must fit."""
    text_encoder_name_1: str | None = None
    """T5, mT5 or UMT5: a folder with model and tokenizer, or a name of the Hugging Face hub."""
    text_encoder_name_2: str | None = None
    """CLIP, for teachers that take a second encoder."""
    negative_prompt: str = ""
    """What guidance will lead away from; the empty prompt is encoded in any case."""
    prompt_column: str | None = None
    """The table's column of prompts; `prompt`, `caption`, `text`, or the only one with text if not given."""
    batch_size: int = 64
    """Prompts that are encoded together."""
    device: str = "auto"
    """`cuda`, `cuda:1`, `cpu`; `auto` takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the encoders compute in and the cache keeps; `auto` is bfloat16 on a GPU and float32 on a CPU."""


def encode(config: EncodeConfig) -> PromptCache:
    """Fill a cache; returns it. Raises ValueError for what cannot work, before any weights are read."""
    if config.batch_size < 1:
        raise ValueError(f"--batch_size {config.batch_size}: it takes a whole number from 1 up")
    with joined(resolve_device(config.device), "none") as ranks:
        prompts = ranks.from_main(lambda: read_prompts(config.prompts, config.prompt_column))
        files = ranks.from_main(lambda: find_encoders(config))
        if not all(part.model.is_dir() for part in files):  # another machine's hub cache
            files = find_encoders(config)
        dtype = config.dtype
        if dtype == "auto":
            dtype = "bfloat16" if ranks.device.type == "cuda" else "float32"

        def load() -> list[Encoder]:
            loaded = [part.load(getattr(torch, dtype)) for part in files]
            for encoder in loaded:
                encoder.model.to(ranks.device)
            return loaded

        cache = fill(
            config.output_dir,
            prompts,
            ranks.from_main(lambda: identity(files)),
            load,
            negative_prompt=config.negative_prompt,
            batch_size=config.batch_size,
            ranks=ranks,
        )
        if ranks.is_main:
            names = " and ".join(part.name for part in files)
            print(f"{config.output_dir}: {len(set(prompts))} prompts, {sum(cache.lengths)} tokens, encoded by {names}")
    return cache


def find_encoders(config: EncodeConfig) -> list[EncoderFiles]:
    """The one or two encoders that the flags name, and the teacher uses. Raises ValueError where they do not fit it."""
    if config.model is None and config.text_encoder_name_1 is None:
        raise ValueError("--text_encoder_name_1: name a text encoder, or with --model a teacher's folder that has one")
    folder = config.model
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--model {folder}: no such folder; it takes a teacher's")
    name = config.text_encoder_name_1
    flag = "--model" if name is None else "--text_encoder_name_1"
    found = [find_encoder(folder if name is None else name, flag=flag, kind="t5")]  # type: ignore[arg-type]
    if config.text_encoder_name_2 is not None:
        found.append(find_encoder(config.text_encoder_name_2, flag="--text_encoder_name_2", kind="clip"))
    elif folder is not None and (folder / "text_encoder_2").is_dir():
        found.append(find_encoder(folder, flag="--model", kind="clip"))
    channels = None if folder is None else _caption_channels(folder)
    if channels is None:
        return found
    if len(channels) > len(found):
        raise ValueError(f"--model {folder}: it takes two text encoders; --text_encoder_name_2 names the other")
    if len(channels) < len(found):
        say_unused(f"the model in {folder}")
    for part, width in zip(found, channels, strict=False):
        check_width(part, width, flag=part.flag)
    return found[: len(channels)]


def _caption_channels(folder: Path) -> list[int] | None:
    """The widths of text that a teacher's transformer takes, one for each of its encoders; None if it does not say."""
    for name in TRANSFORMERS:
        path = folder / name / "config.json"
        if path.is_file() and "caption_channels" in (config := read_json(path)):
            channels = config["caption_channels"]
            return channels if isinstance(channels, list) else [channels]
    return None
