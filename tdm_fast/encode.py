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

from tdm_fast.config import ModelConfig
from tdm_fast.encoders import Encoder, EncoderFiles, check_encoders, find_encoder
from tdm_fast.models import sources
from tdm_fast.models.families import StockFamily, family_of
from tdm_fast.prompt_store import fill, identity
from tdm_fast.prompts import read_prompts
from tdm_fast.ranks import joined
from tdm_fast.step import resolve_device
from tdm_fast.text import PromptCache


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
    """The teacher as `tdm-fast train` takes it: a pipeline's or a transformer's folder, or a name. Its own text
    encoders are taken where none is named, and others must have the width that its transformer takes."""
    model_path: Path | None = None
    """Folder of the transformer's weights where `--model` is a name."""
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
        name = config.dtype
        if name == "auto":
            name = "bfloat16" if ranks.device.type == "cuda" else "float32"
        dtype = getattr(torch, name)

        def load() -> list[Encoder]:
            loaded = [part.load(dtype) for part in files]
            for encoder in loaded:
                encoder.model.to(ranks.device)
            return loaded

        cache = fill(
            config.output_dir,
            prompts,
            ranks.from_main(lambda: identity(files)),
            load,
            dtype=dtype,
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
    named, second = config.text_encoder_name_1, config.text_encoder_name_2
    folder = transformer = None
    has_teacher = config.model is not None or config.model_path is not None
    if has_teacher:
        flags = ModelConfig(
            model=config.model or ModelConfig.model,
            model_path=config.model_path,
            text_encoder_name_1=named,
            text_encoder_name_2=second,
        )
        folder = sources.find_folder(flags)
        if folder is not None and isinstance(family_of(folder), StockFamily):
            return sources.Sources.of_flags(flags).encoders
        transformer = None if folder is None else sources.find_transformer(folder)
    own = {part: folder is not None and (folder / part).is_dir() for part in ("text_encoder", "text_encoder_2")}
    if named is None and not own["text_encoder"]:
        raise ValueError("--text_encoder_name_1: name a text encoder, or with --model a teacher's folder that has one")
    if named is None:
        found = [find_encoder(str(folder), flag="--model", kind="t5")]
    else:
        found = [find_encoder(named, flag="--text_encoder_name_1", kind="t5")]
    wished = second is not None or own["text_encoder_2"]
    if wished and (not has_teacher or sources.takes_second(transformer, str(config.model))):
        flag = "--model" if second is None else "--text_encoder_name_2"
        found.append(find_encoder(second or str(folder), flag=flag, kind="clip"))
    if transformer is not None and (channels := sources.caption_channels(transformer)) is not None:
        check_encoders(str(transformer), found, channels)
    return found
