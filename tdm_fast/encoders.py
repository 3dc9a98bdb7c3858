"""Text encoders by name: T5, mT5 and UMT5, and CLIP, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    CLIPTextModelWithProjection,
    MT5EncoderModel,
    T5EncoderModel,
    T5Tokenizer,
    UMT5EncoderModel,
)
from transformers.utils import logging

from tdm_fast.files import content_digest, read_json, weight_files
from tdm_fast.models.networks import check_tensors, empty_network

Kind = Literal["t5", "clip"]

CLASSES: dict[str, Any] = {
    "t5": T5EncoderModel,
    "mt5": MT5EncoderModel,
    "umt5": UMT5EncoderModel,
    "clip": CLIPTextModelWithProjection,
    "clip_text_model": CLIPTextModelWithProjection,
}
"""By the `model_type` of a model's config.json."""
LIMITS: dict[Kind, int] = {"t5": 512, "clip": 77}
"""The most tokens of a prompt that Open-Sora Plan's pipeline gives to each kind."""
WIDTHS: dict[Kind, dict[str, int]] = {
    "t5": {
        "google/mt5-xxl": 4096, "google/umt5-xxl": 4096, "DeepFloyd/t5-v1_1-xxl": 4096, "google/t5-v1_1-xxl": 4096,
        "google/mt5-xl": 2048, "google/umt5-xl": 2048, "google/t5-v1_1-xl": 2048,
        "google/mt5-large": 1024, "google/t5-v1_1-large": 1024,
        "google/mt5-base": 768, "google/umt5-base": 768, "google/t5-v1_1-base": 768,
        "google/mt5-small": 512, "google/umt5-small": 512, "google/t5-v1_1-small": 512,
    },
    "clip": {
        "openai/clip-vit-large-patch14": 768, "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": 1280,
    },
}  # fmt: skip
"""Encoders that people have, with the width of their states."""
FAMILIES: dict[Kind, str] = {"t5": "T5, mT5 or UMT5", "clip": "CLIP"}
VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json")
"""What a tokenizer's folder has one of: the file with its tokens."""
LAYOUTS = ((".", "."), ("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
"""Where a folder may have model and tokenizer."""
CONNECT_SECONDS = 10.0
"""How long the hub may take to answer at all before this machine counts as offline."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """A text encoder with its tokenizer, ready to run."""

    tokenizer: Any
    model: Any
    kind: Kind
    width: int
    """Features of a state, D."""
    name: str

    @classmethod
    def of(cls, tokenizer: Any, model: Any, name: str = "text_encoder") -> Encoder:
        """Of parts that have been loaded already. Raises ValueError for a model of another family."""
        config = model.config
        if config.model_type not in CLASSES:
            raise ValueError(
                f"{name}: it is a {type(model).__name__}; it takes a {FAMILIES['t5']} encoder or CLIP's text model with"
                " its projection"
            )
        return cls(tokenizer, model, _kind(config.model_type), _width(config), name)

    @property
    def limit(self) -> int:
        """The most tokens of a prompt that it is given."""
        known = getattr(self.model.config, "max_position_embeddings", None) or LIMITS[self.kind]
        return min(LIMITS[self.kind], known)

    @property
    def dtype(self) -> torch.dtype:
        """What its states are computed in."""
        return next(self.model.parameters()).dtype

    def tokenize(self, prompts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """The tokens of each prompt, with the special ones, cut to `max_length` (`limit` if None), not padded.

        Raises ValueError for a prompt without tokens, or with one that the model does not know.
        """
        limit, known = max_length or self.limit, self.model.get_input_embeddings().num_embeddings
        rows = self.tokenizer(list(prompts), truncation=True, max_length=limit, verbose=False).input_ids
        for prompt, row in zip(prompts, rows, strict=True):
            if not row or max(row) >= known:
                what = f"token {max(row)} of a model that knows {known}" if row else "no token"
                raise ValueError(
                    f"{self.name}: its tokenizer makes {what} of the prompt {prompt[:60]!r}; it is not this model's own"
                )
        return rows

    def encode(self, prompts: Sequence[str], max_length: int | None = None) -> list[Tensor]:
        """The states `[L, D]` of one batch of prompts, cut to `max_length` tokens (`limit` if None); see `states`."""
        return self.states(self.tokenize(prompts, max_length))

    @torch.no_grad()
    def states(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """States `[L, D]` of one batch of tokenized prompts, on the CPU, in the encoder's dtype, without padding.

        T5's are the last hidden state. CLIP gives one token, L = 1: its projected pooled embedding, which is what
        Open-Sora Plan's pipeline takes of it (`encode_prompt` in opensora/sample/pipeline_opensora.py).
        """
        device, pad = next(self.model.parameters()).device, self.tokenizer.pad_token_id or 0
        lengths = [len(row) for row in tokens]
        ids = pad_sequence([torch.tensor(row) for row in tokens], batch_first=True, padding_value=pad)
        mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        if self.kind == "clip":
            return list(output.text_embeds.cpu()[:, None])
        return [row[:n].clone() for row, n in zip(output.last_hidden_state.cpu(), lengths, strict=True)]


@dataclass(frozen=True)
class EncoderFiles:
    """An encoder found whole on the disk, nothing of it loaded."""

    name: str
    flag: str
    model: Path
    tokenizer: Path
    model_type: str

    @property
    def kind(self) -> Kind:
        return _kind(self.model_type)

    @cached_property
    def width(self) -> int:
        """Features of a state, D."""
        return _width(CLASSES[self.model_type].config_class.from_pretrained(self.model))

    @cached_property
    def digest(self) -> str:
        """A short digest of the files that decide what it computes; the same wherever they lie."""
        total = hashlib.sha256()
        parts = [("model", path) for path in (self.model / "config.json", *_weights(self.model))]
        names = {*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
        parts += [("tokenizer", path) for path in sorted(self.tokenizer.iterdir()) if path.name in names]
        for part, path in parts:
            total.update(f"{part}/{path.name} {content_digest(path)}\n".encode())
        return total.hexdigest()[:16]

    def check_tensors(self) -> None:
        """Raise ValueError for weights that are not all of the model, by the headers of their files."""
        check_tensors(self.model, CLASSES[self.model_type], others=True)  # a T5's decoder, a CLIP's image encoder

    def empty(self) -> Encoder:
        """The encoder with its model on the meta device: good for tokens. Raises ValueError as `load` does."""
        model = empty_network(self.model, CLASSES[self.model_type])
        return Encoder(self._load_tokenizer(), model, self.kind, self.width, self.name)

    def load(self, dtype: torch.dtype = torch.float32) -> Encoder:
        """Load it onto the CPU, frozen. Raises ValueError for weights or a tokenizer that cannot be its."""
        cls, safe = CLASSES[self.model_type], _weights(self.model)[0].suffix == ".safetensors"
        try:
            with quiet():  # a whole T5's decoder is too much, and is told of weight by weight
                model, info = cls.from_pretrained(
                    self.model, use_safetensors=safe, output_loading_info=True, dtype=dtype
                )
        except (RuntimeError, TypeError, OSError, UnpicklingError) as error:  # code in a .bin is never run
            raise ValueError(
                f"{self.flag} {self.name}: the weights and config.json in {self.model} are not of one {cls.__name__}:"
                f" {first_line(error)}"
            ) from error
        refuse_missing(f"{self.flag} {self.name}: {self.model}", cls, info)
        return Encoder(self._load_tokenizer(), model.requires_grad_(False).eval(), self.kind, self.width, self.name)

    def _load_tokenizer(self) -> Any:
        # A spiece.model alone is T5's for all of the family; transformers 5 no longer knows mT5's and UMT5's by name.
        whole, pieces = (self.tokenizer / name for name in ("tokenizer.json", "spiece.model"))
        bare = pieces.is_file() and not whole.is_file()
        try:
            with quiet():
                return (T5Tokenizer if bare else AutoTokenizer).from_pretrained(self.tokenizer)
        except (ValueError, OSError, ImportError, KeyError) as error:
            raise ValueError(
                f"{self.flag} {self.name}: the tokenizer in {self.tokenizer} cannot be read ({first_line(error)});"
                " copy or download it again"
            ) from error


def load_encoder(
    name: str | Path,
    *,
    flag: str,
    kind: Kind | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load what `find_encoder` finds onto the CPU, frozen and in evaluation mode.

    Raises ValueError, naming `flag`, for what cannot be found or loaded.
    """
    return find_encoder(name, flag=flag, kind=kind, tokenizer=tokenizer).load(dtype)


def find_encoder(
    name: str | Path, *, flag: str, kind: Kind | None = None, tokenizer: Path | None = None
) -> EncoderFiles:
    """Find a text encoder and its tokenizer, without loading either: a folder, or a name on the Hugging Face hub.

    A folder has both in it, or `text_encoder/` and `tokenizer/` (or both with `_2`), as pipelines' folders do;
    `tokenizer` names the tokenizer's folder if it lies elsewhere. A name of the hub is looked for in its cache first
    and downloaded only if the hub answers within seconds. Raises ValueError, naming `flag`, when nothing is found, or
    a tokenizer without its model, a model without its tokenizer, weights cut short, or another family than `kind`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _in_folder(folder, str(name), flag, kind, tokenizer)
    if folder.exists() or not is_hub_name(str(name)):
        raise ValueError(f"{flag} {name}: no such folder; it takes a folder with model and tokenizer, or a hub name")
    return _cached_encoder(str(name), flag, kind, tokenizer) or _in_folder(
        _download(str(name), flag), str(name), flag, kind, tokenizer
    )


def needs_download(name: str | Path) -> bool:
    """Whether `find_encoder` would ask the hub for it: no folder, nor whole in the cache on this machine."""
    if Path(name).expanduser().exists() or not is_hub_name(str(name)):
        return False
    return _cached_encoder(str(name), "", None, None) is None


def refuse_missing(what: str, cls: Any, info: dict[str, Any]) -> None:
    """Raise ValueError, which begins with `what`, where transformers' loading info names missing weights."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{what} lacks {len(missing)} weights of {cls.__name__}, {missing[0]} first; copy or download it again"
        )


def check_width(encoder: Encoder | EncoderFiles, caption_channels: int, *, flag: str = "--text_encoder_name_1") -> None:
    """Raise ValueError, with the names of encoders that fit, for states of another width than a teacher's."""
    if encoder.width == caption_channels:
        return
    fitting = [name for name, width in WIDTHS[encoder.kind].items() if width == caption_channels]
    would = f"{', '.join(fitting)} would fit" if fitting else "none of the published ones fits; use the teacher's own"
    raise ValueError(
        f"{flag} {encoder.name}: it is {encoder.width} wide but the teacher takes caption_channels={caption_channels};"
        f" {would}"
    )


def check_encoders(model: str, encoders: Sequence[EncoderFiles], caption_channels: Any) -> None:
    """Raise ValueError where these encoders are not those that the transformer `model` takes.

    `caption_channels` is its config's: a width, or one for each of its encoders.
    """
    widths = caption_channels if isinstance(caption_channels, list | tuple) else [caption_channels]
    if len(widths) > len(encoders):
        raise ValueError(
            f"--text_encoder_name_2 is needed: {model} takes two text encoders, caption_channels={list(widths)}"
        )
    for encoder, width in zip(encoders, widths, strict=False):
        check_width(encoder, width, flag=encoder.flag)


def _kind(model_type: str) -> Kind:
    return "clip" if model_type.startswith("clip") else "t5"


def _width(config: Any) -> int:
    return config.projection_dim if _kind(config.model_type) == "clip" else config.d_model


def _in_folder(folder: Path, name: str, flag: str, kind: Kind | None, tokenizer: Path | None) -> EncoderFiles:
    """The encoder in a folder, in whichever of the layouts has one of the wanted kind."""
    here = f"{flag} {name}"
    models = [(folder / m, tokenizer or folder / t, _model_type(folder / m)) for m, t in LAYOUTS]
    found = [(m, t, model_type) for m, t, model_type in models if model_type is not None]
    if not found:
        listing = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        if any(_has_tokenizer(folder / t) for _, t in LAYOUTS):
            raise ValueError(
                f"{here}: it holds a tokenizer without its model (found: {listing}); config.json and weights are needed"
                " beside it, or in text_encoder/"
            )
        raise ValueError(f"{here}: no config.json in it or in its text_encoder/ (found: {listing})")
    known = [each for each in found if each[2] in CLASSES]
    if not known:
        types = " and ".join(repr(model_type) for *_, model_type in found)
        raise ValueError(f"{here}: its model is of type {types}; it takes {', '.join(CLASSES)}")
    fitting = [each for each in known if kind in (None, _kind(each[2]))]
    if not fitting:
        other = _kind(known[0][2])
        raise ValueError(f"{here}: it is a {FAMILIES[other]} encoder; this flag takes {FAMILIES[kind or other]}")
    model, tokens, model_type = fitting[0]
    # A text_encoder/ that is named itself has its tokenizer beside it.
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    if tokenizer is None and not _has_tokenizer(tokens) and folder.name.startswith("text_encoder"):
        tokens = beside
    if not _has_tokenizer(tokens):
        raise ValueError(
            f"{here}: {tokens} holds no tokenizer; a model needs its own, which is {', '.join(VOCABULARIES)} with what"
            " goes with it"
        )
    check_files(model, here)
    return EncoderFiles(name, flag, model, tokens, model_type)


def _model_type(folder: Path) -> str | None:
    """What the config.json of a folder says it is of, or None without one."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    return str(read_json(path).get("model_type", ""))


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARIES)


def _weights(folder: Path) -> list[Path]:
    """A model's files of weights: safetensors, or where there are none torch's."""
    return weight_files(folder, "model*.safetensors") or weight_files(folder, "pytorch_model*.bin")


def check_files(folder: Path, here: str) -> None:
    """Refuse a text encoder whose files of weights are not all there and whole; reads headers only.

    `here` is what the message begins with.
    """
    files = _weights(folder)
    if not files:
        raise ValueError(f"{here}: {folder} holds no weights; it takes model*.safetensors or pytorch_model*.bin")
    for index in folder.glob(f"*{files[0].suffix}.index.json"):
        named = set(read_json(index, "weight_map")["weight_map"].values())
        if absent := sorted(named - {file.name for file in files}):
            raise ValueError(
                f"{here}: {folder} lacks {', '.join(absent)} of {len(named)} files; copy or download it again"
            )
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{here}: {file} is cut short or damaged ({error}); copy it again") from error


def is_hub_name(name: str) -> bool:
    """Whether it could be a name on the hub, `owner/name` or `name`, rather than a path."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part and part[0].isalnum() for part in parts)


def _cached_encoder(name: str, flag: str, kind: Kind | None, tokenizer: Path | None) -> EncoderFiles | None:
    """The encoder in the hub's cache on this machine; None where it is not whole, and is to be completed."""
    with suppress(ValueError):
        if cached := _cached(name):
            return _in_folder(cached, name, flag, kind, tokenizer)
    return None


def _cached(name: str) -> Path | None:
    """Where the hub's cache on this machine has a model, or None; asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, HFValidationError):
        return None


def offline_reason(kind: Literal["model", "dataset"], name: str) -> str | None:
    """Why the hub cannot give what it calls `name`, or None if it can; known within CONNECT_SECONDS.

    Asked in a thread of its own, as looking up a host's name takes as long as it likes.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    answers: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=CONNECT_SECONDS)
            answers.append(None)
        except Exception as error:  # whatever the hub's client raises, it is told in one line
            answers.append(first_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return answers[0] if answers else f"no answer in {CONNECT_SECONDS:.0f} s"


def _download(name: str, flag: str) -> Path:
    """Bring a model and its tokenizer from the hub into its cache. Raises ValueError when that cannot be."""
    from huggingface_hub import HfApi, snapshot_download

    reason = offline_reason("model", name)
    if reason is None:
        try:
            files = HfApi().list_repo_files(name)
            weights = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "*.bin"
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.model", "*.txt", weights]))
        except Exception as error:
            reason = first_line(error)
    raise ValueError(
        f"{flag} {name}: no such folder, not whole in this machine's Hugging Face cache, and the hub does not give it"
        f" ({reason}); where there is a network, `hf download {name} --local-dir FOLDER`, copy FOLDER here and name it:"
        f" {flag} FOLDER"
    )


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings back: what matters of them is checked here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
