"""Where a model's parts come from: one pipeline's folder, or part by part, as Open-Sora Plan's users name them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from huggingface_hub import try_to_load_from_cache

from tdm_fast.checkpoint import read_json
from tdm_fast.models import registry
from tdm_fast.models.networks import check_weights
from tdm_fast.models.opensora import OpenSoraT2V_v1_3

if TYPE_CHECKING:
    from tdm_fast.config import ModelConfig

INDEX_FILE = "model_index.json"
SAMPLER_FILE = "few_step.json"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND_PARTS = ("text_encoder_2", "tokenizer_2")
# What a part may be, and where the class comes from.
CLASSES = {
    "transformer": ("OpenSoraT2V_v1_3",),
    "vae": ("WFVAEModel", "CausalVAEModel"),
    "text_encoder": ("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel"),
}
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}
ENCODERS |= {"clip_text_model": "CLIPTextModel"}
LIBRARIES = {"transformer": "tdm_fast.models", "vae": "tdm_fast.models", "scheduler": "diffusers"}
WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Sources:
    """Where each part of a pipeline is. Made by `of_folder` or `of_flags`, which see that it is there.

    An encoder or a tokenizer that is a string is the name of a model on the hub, any other a folder.
    """

    folder: Path
    """What names the model; its measured quality, its evaluator and a student's trajectory are there if it has them."""
    transformer: Path | None
    """None for random weights, which the registry makes by `name`."""
    vae: Path
    text_encoder: Path | str
    tokenizer: Path | str
    scheduler: Path | None
    """None for Open-Sora Plan v1.3's recipe."""
    text_encoder_2: Path | str | None = None
    tokenizer_2: Path | str | None = None
    name: str | None = None
    """The transformer's name in the registry, if that is how it was named; a preset's size is part of it."""
    ae: str | None = None
    """The VAE's name in the registry, likewise."""
    size: tuple[int | None, int | None, int | None] = (None, None, None)
    """Frames, height and width that outrank what the transformer's config and name say."""
    upstream: bool = False
    """Whether the transformer runs the package `opensora`'s code."""

    @classmethod
    def of_folder(cls, folder: Path) -> Sources:
        """The parts of one pipeline's folder. Raises ValueError when it is missing, half-written or another model's."""
        return cls._of_pipeline(folder)

    @classmethod
    def of_flags(cls, flags: ModelConfig) -> Sources:
        """The parts that the flags name. Those that no flag names are those of the pipeline's folder `--model`.

        A transformer is taken from an existing folder of the name `--model`, else from `--model_path`, else made by the
        registry. Raises ValueError, naming the flag, for what is missing, damaged or of another model.
        """
        folder, name = flags.folder, str(flags.model)
        known = registry.is_known(name)
        if folder is None and not known:
            names = ", ".join(registry.Diffusion_models_class)
            raise ValueError(f"--model {name}: no such folder, nor a name that is known ({names}, …93x640x640)")
        if folder is not None and not folder.is_dir():
            flag = "--model_path" if folder == flags.model_path else "--model"
            raise ValueError(f"{flag} {folder}: no such folder; it takes a pipeline's or a transformer's folder")
        if folder is not None and flags.model_path not in (None, folder):
            raise ValueError(
                f"--model_path {flags.model_path}: --model {folder} is a folder that holds weights already; leave one out"
            )
        named = {
            "vae": flags.ae_path,
            "text_encoder": _place(flags.text_encoder_name_1, "text_encoder"),
            "tokenizer": _place(flags.text_encoder_name_1, "tokenizer"),
            "text_encoder_2": _place(flags.text_encoder_name_2, "text_encoder"),
            "tokenizer_2": _place(flags.text_encoder_name_2, "tokenizer"),
        }
        named = {part: place for part, place in named.items() if place is not None}
        if folder is not None and ((folder / INDEX_FILE).is_file() or not named):
            found = replace(cls._of_pipeline(folder, named), **named)  # type: ignore[arg-type]
        else:
            found = cls._of_transformer(folder, name, named)
        if flags.ae_path is not None:
            if not flags.ae_path.is_dir():
                raise ValueError(f"--ae_path {flags.ae_path}: no such folder; it takes a VAE's, with its config.json")
            check_weights(flags.ae_path)
        return replace(
            found,
            name=name if known else None,
            ae=flags.ae,
            size=(flags.num_frames, flags.max_height, flags.max_width),
            upstream=flags.opensora_source == "upstream",
        )

    @classmethod
    def _of_pipeline(cls, folder: Path, named: Collection[str] = ()) -> Sources:
        """The parts of a pipeline's folder; those that are `named` otherwise need not be there."""
        index = check_folder(folder, [part for part in PARTS if part not in named])
        second = {part: folder / part for part in SECOND_PARTS if _class_name(index, part)}
        return cls(folder, **{part: folder / part for part in PARTS}, **second)

    @classmethod
    def _of_transformer(cls, folder: Path | None, name: str, named: dict[str, Any]) -> Sources:
        """A transformer's folder, or none, and the parts that the flags name beside it."""
        for part, flag in (("vae", "--ae_path"), ("text_encoder", "--text_encoder_name_1")):
            if part not in named:
                brings = "is a name, which brings" if folder is None else f"has no {INDEX_FILE} and so brings"
                raise ValueError(f"{flag} is needed: {folder or name} {brings} no {part} of its own")
        transformer = scheduler = None
        if folder is not None:
            transformer = registry.find_folder(folder, OpenSoraT2V_v1_3)
            check_weights(transformer)
            scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else None
        return cls(folder or Path(name), transformer=transformer, scheduler=scheduler, **named)

    @property
    def knows_null_prompt(self) -> bool:
        """Whether guidance makes sense: not for a few-step student, nor where diffusers' `is_distilled` says so."""
        index = self.folder / INDEX_FILE
        distilled = index.is_file() and read_json(index).get("is_distilled") is True
        return not distilled and not (self.folder / SAMPLER_FILE).exists()

    def folder_of(self, part: str) -> Path | None:
        """The folder that holds a part, of a hub's model the one in its cache; None if there is none.

        Raises ValueError for a hub's model that is not in the cache.
        """
        place: Path | str | None = getattr(self, part)
        if not isinstance(place, str):
            return place
        for file in ("config.json", "tokenizer_config.json"):
            if isinstance(path := try_to_load_from_cache(place, file), str):
                return Path(path).parent
        raise ValueError(f"{place}: not in the hub's cache; load it once while online, or name a folder")

    def files_of(self, part: str) -> list[Path]:
        """A part's own files, sorted by name, also where one folder holds an encoder and its tokenizer."""
        folder = self.folder_of(part)
        if folder is None:
            return []
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if part.startswith("tokenizer"):
            return [path for path in files if path.suffix in (".json", ".model", ".txt") and ".index." not in path.name]
        if part == "scheduler":
            return files
        weights = [path for path in files if path.suffix == ".safetensors"]
        weights = weights or [path for path in files if path.suffix in WEIGHTS]
        kind = weights[0].suffix if weights else ""
        about = [path for path in files if path.name == "config.json" or path.name.endswith(f"{kind}.index.json")]
        return sorted({*weights, *about})

    def digest(self, *parts: str) -> str:
        """A short digest of what some parts contain; the same wherever they lie."""
        total = hashlib.sha256()
        for part in sorted(parts):
            files = self.files_of(part)
            if not files and part in ("transformer", "scheduler"):
                total.update(f"{part} {self.name if part == 'transformer' else 'recipe'}\n".encode())
            for path in files:
                stat = path.stat()
                total.update(f"{part}/{path.name} {_sha256(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
        return total.hexdigest()[:16]

    def scheduler_object(self) -> Any:
        """The diffusers scheduler. Raises ValueError for one that diffusers does not know."""
        if self.scheduler is None:  # Open-Sora Plan v1.3's training, diffusers' default betas
            return diffusers.DDPMScheduler(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
                clip_sample=False,
            )
        index = self.folder / INDEX_FILE
        name = _class_name(read_json(index), "scheduler") if index.is_file() else None
        name = name or read_json(self.scheduler / "scheduler_config.json", "_class_name")["_class_name"]
        scheduler_class = getattr(diffusers, name, None)
        if scheduler_class is None:
            raise ValueError(f"{self.folder}: its scheduler is a {name}, which diffusers does not know")
        return scheduler_class.from_pretrained(self.scheduler)

    def save(self, folder: Path, parts: Sequence[str]) -> None:
        """Put parts, under their own names, and the index of a pipeline of them all into a folder.

        Weights are linked where the file system allows it, because an encoder has 20 GB; other files, which somebody
        might edit, are copied. Raises OSError when they cannot be written.
        """
        for part in parts:
            (folder / part).mkdir()
            if part == "scheduler" and self.scheduler is None:
                self.scheduler_object().save_pretrained(folder / part)
            for path in self.files_of(part):
                _link_or_copy(path.resolve(), folder / part / path.name)
        (folder / INDEX_FILE).write_text(json.dumps(self._index(), indent=2) + "\n")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts."""
        return (*PARTS, *(part for part in SECOND_PARTS if getattr(self, part) is not None))

    def _index(self) -> dict[str, Any]:
        """A pipeline's index: the folder's own, with the entries of parts from elsewhere."""
        index: dict[str, Any] = {"_class_name": "OpenSoraPipeline"}
        if (path := self.folder / INDEX_FILE).is_file():
            index = read_json(path)
        for part in self.parts:
            if getattr(self, part) != self.folder / part or part not in index:
                index[part] = [LIBRARIES.get(part, "transformers"), self._class_of(part)]
        return index

    def _class_of(self, part: str) -> str:
        if part == "transformer":
            return OpenSoraT2V_v1_3.__name__
        if part == "scheduler":
            return type(self.scheduler_object()).__name__
        folder = self.folder_of(part)
        assert folder is not None
        if part.startswith("tokenizer"):
            config = folder / "tokenizer_config.json"
            return (read_json(config) if config.is_file() else {}).get("tokenizer_class", "AutoTokenizer")
        config = read_json(folder / "config.json")
        return ENCODERS[config["model_type"]] if part.startswith("text_encoder") else config["_class_name"]


def check_folder(folder: Path, parts: Collection[str] = PARTS) -> dict[str, Any]:
    """Refuse, with one message, a pipeline's folder whose `parts` cannot be loaded; returns its index.

    Reads headers only, no weights.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a model is a folder with {INDEX_FILE} and {', '.join(PARTS)}")
    try:
        index = read_json(folder / INDEX_FILE)
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ValueError(
            f"{folder}: no {INDEX_FILE} in it (found: {found}); it takes a pipeline's folder, or for `train` a"
            " transformer's with --ae_path and --text_encoder_name_1 beside it"
        ) from None
    classes = {part: _class_name(index, part) for part in parts}
    for part, known in CLASSES.items():
        if part in parts and classes[part] not in known:
            found = f"its {part} is a {classes[part]}" if classes[part] else f"it has no {part}"
            kind = index.get("_class_name", "model")
            raise ValueError(f"{folder} holds a {kind}: {found}; this version takes a {' or '.join(known)} there")
    missing = [part for part in parts if classes[part] is None or not any((folder / part).glob("*"))]
    if missing:
        raise ValueError(f"{folder} is half-written: {', '.join(missing)} missing; copy or make the folder again")
    for part in CLASSES:
        if part in parts:
            check_weights(folder / part)
    return index


def _class_name(index: dict[str, Any], part: str) -> str | None:
    """The class that a pipeline's index names for a part, or None."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _place(name: str | None, part: str) -> Path | str | None:
    """Where an encoder's flag says that a part of it is: in a folder of the part's name, in the folder, on the hub."""
    if name is None or not Path(name).is_dir():
        return name
    return Path(name) / part if (Path(name) / part).is_dir() else Path(name)


@cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """A file's digest; its size and its time tell whether it is still the same, so that it is read once."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link_or_copy(source: Path, target: Path) -> None:
    if target.suffix in WEIGHTS:
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copy(source, target)
