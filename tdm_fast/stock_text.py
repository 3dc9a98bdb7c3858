"""The text encoders of a stock diffusers pipeline, run by the pipeline's own `encode_prompt`.

A network may take two tensors of text, the states of tokens and a pooled embedding. Each has a `StockEncoder`, so that
prompts are cached as other encoders' are; they share the models, and what these have last been asked for.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import diffusers
import torch
import transformers
from torch import Tensor, nn

from tdm_fast.encoders import Encoder, EncoderFiles, check_files, first_line, quiet, refuse_missing
from tdm_fast.files import content_digest, read_json, weight_files
from tdm_fast.models.families import INDEX_FILE, StockFamily, class_name

TOKENIZER_SUFFIXES = (".json", ".model", ".txt")


class Texts:
    """A pipeline that holds text encoders and tokenizers alone."""

    def __init__(self, pipeline: Any, family: StockFamily, config: Mapping[str, Any]) -> None:
        self.pipeline, self.family, self.config = pipeline, family, config
        models = [getattr(pipeline, name) for name in family.encoders]
        self.models = nn.ModuleList([model for model in models if model is not None])
        self._last: tuple[list[str], tuple[list[Tensor], ...]] = ([], ())

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> tuple[list[Tensor], ...]:
        """The states of these prompts on the CPU, of tokens and, where there is one, of the pooled embedding."""
        if self._last[0] != list(prompts):
            made = self.family.states(self.pipeline, self.config, list(prompts))
            self._last = (list(prompts), tuple([row.cpu().clone() for row in rows] for rows in made))
        return self._last[1]


_LOADED: WeakValueDictionary[tuple[Path, torch.dtype], Texts] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class StockEncoder(Encoder):
    """One of the tensors that a pipeline makes of prompts; `model` is all of its encoders."""

    texts: Texts
    slot: int

    @property
    def limit(self) -> int:
        return self.texts.family.limit(self.texts.pipeline, self.texts.config)

    def tokenize(self, prompts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """As many tokens of each prompt as it has states."""
        if self.slot == 1:
            return [[0]] * len(prompts)
        if not self.texts.family.unpadded:
            return [[0] * self.texts.family.tokens(self.texts.pipeline, self.texts.config)] * len(prompts)
        return self.tokenizer(list(prompts), truncation=True, max_length=self.limit, verbose=False).input_ids

    def encode(self, prompts: Sequence[str], max_length: int | None = None) -> list[Tensor]:
        return self.texts.states(prompts)[self.slot]


@dataclass(frozen=True, eq=False)
class StockText(EncoderFiles):
    """The same in a pipeline's folder; nothing of it is loaded."""

    folder: Path
    family: StockFamily
    part: str
    """The network's."""
    slot: int

    @classmethod
    def find(cls, folder: Path, family: StockFamily) -> list[StockText]:
        """What a family's network takes of the text encoders in a folder.

        Raises ValueError for encoders that are not whole, or not as wide as the network takes.
        """
        config = read_json(folder / family.part / "config.json")
        flag, model = "--model", folder / family.encoders[0]
        tokenizer = folder / family.encoders[0].replace("text_encoder", "tokenizer")
        kinds = zip(("t5", "clip"), family.widths(config), strict=False)
        found = [
            cls(str(folder), flag, model, tokenizer, kind, folder, family, family.part, slot)
            for slot, (kind, _) in enumerate(kinds)
        ]
        found[0].check_tensors()
        given = family.encoded_widths(list(found[0].configs.values()), config)
        if given != family.widths(config):
            raise ValueError(
                f"{folder}: its text encoders are {' and '.join(map(str, given))} wide, but its {family.part} takes"
                f" {' and '.join(map(str, family.widths(config)))}; the two are not of one model"
            )
        return found

    @cached_property
    def index(self) -> dict[str, Any]:
        return read_json(self.folder / INDEX_FILE)

    @cached_property
    def configs(self) -> dict[str, Any]:
        """The config of each encoder; None for one that the pipeline does without."""
        parts = {part: class_name(self.index, part) for part in self.family.encoders}
        return {
            part: name and getattr(transformers, name).config_class.from_pretrained(self.folder / part)
            for part, name in parts.items()
        }

    @cached_property
    def width(self) -> int:
        return self.family.widths(read_json(self.folder / self.part / "config.json"))[self.slot]

    @cached_property
    def digest(self) -> str:
        total = hashlib.sha256(f"{type(self.family).__name__} {self.slot}\n".encode())
        for part in self.family.encoders:
            for folder in (self.folder / part, self.folder / part.replace("text_encoder", "tokenizer")):
                weights = weight_files(folder) or weight_files(folder, "*.bin")
                for path in sorted({*weights, *(p for p in folder.glob("*") if p.suffix in TOKENIZER_SUFFIXES)}):
                    total.update(f"{folder.name}/{path.name} {content_digest(path)}\n".encode())
        return total.hexdigest()[:16]

    def check_tensors(self) -> None:
        """Raise ValueError for files of weights that are not all there and whole; `load` looks at what is in them."""
        for part in self.family.encoders:
            if class_name(self.index, part) is not None:
                check_files(self.folder / part, f"{self.flag} {self.name}")

    def empty(self) -> Encoder:
        return self._encoder(self._texts(None))

    def load(self, dtype: torch.dtype = torch.float32) -> Encoder:
        key = (self.folder.absolute(), dtype)
        texts = _LOADED.get(key)
        if texts is None:
            texts = _LOADED[key] = self._texts(dtype)
        return self._encoder(texts)

    def _encoder(self, texts: Texts) -> StockEncoder:
        tokenizer = self.family.tokenizer(texts.pipeline)
        return StockEncoder(tokenizer, texts.models, self.kind, self.width, self.name, texts, self.slot)

    def _texts(self, dtype: torch.dtype | None) -> Texts:
        """With the encoders in `dtype`, frozen, or without any. Raises ValueError for what cannot be loaded."""
        parts: dict[str, Any] = {}
        for part in self.family.encoders:
            if (name := class_name(self.index, part)) is None:
                continue
            tokenizer = part.replace("text_encoder", "tokenizer")
            try:
                with quiet():
                    parts[tokenizer] = transformers.AutoTokenizer.from_pretrained(self.folder / tokenizer)
                    if dtype is not None:
                        model, info = getattr(transformers, name).from_pretrained(
                            self.folder / part, dtype=dtype, output_loading_info=True
                        )
                        parts[part] = model.requires_grad_(False).eval()
            except (RuntimeError, ValueError, OSError, KeyError, ImportError, AttributeError) as error:
                raise ValueError(
                    f"{self.flag} {self.name}: its {part} or {tokenizer} cannot be loaded ({first_line(error)}); copy"
                    " or download the folder again"
                ) from error
            if part in parts:
                refuse_missing(f"{self.flag} {self.name}: {part}", type(parts[part]), info)
        config = read_json(self.folder / self.part / "config.json")
        return Texts(bare_pipeline(self.index, parts), self.family, config)


def bare_pipeline(index: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    """The diffusers pipeline that an index names, of these parts alone; the index's settings are its own."""
    cls = getattr(diffusers, index["_class_name"])
    names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    settings = {name: index[name] for name in names if isinstance(index.get(name), bool | int | float)}
    with quiet():
        given = {name: None for name in names if name not in settings} | settings | {"requires_safety_checker": False}
        return cls(**{name: value for name, value in (given | dict(parts)).items() if name in names})
