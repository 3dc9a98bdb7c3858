"""Where a model's parts come from: one pipeline's folder, or part by part, as Open-Sora Plan's users name them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers

from tdm_fast.encoders import CLASSES as ENCODERS
from tdm_fast.encoders import EncoderFiles, find_encoder
from tdm_fast.files import content_digest, read_json, weight_files
from tdm_fast.models import registry, upstream
from tdm_fast.models.families import INDEX_FILE, OPENSORA, Family, StockFamily, class_name, family_of
from tdm_fast.models.networks import check_weights
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.opensora_denoiser import say_unused
from tdm_fast.notes import say_once
from tdm_fast.stock_text import StockText

if TYPE_CHECKING:
    from tdm_fast.config import ModelConfig

SAMPLER_FILE = "few_step.json"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND_PARTS = ("text_encoder_2", "tokenizer_2")
# What a part of a pipeline's folder may be.
CLASSES = {
    "transformer": ("OpenSoraT2V_v1_3",),
    "vae": ("WFVAEModel", "CausalVAEModel"),
    "text_encoder": ("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel"),
}
LIBRARIES = {"transformer": "tdm_fast.models", "vae": "tdm_fast.models", "scheduler": "diffusers"}
WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Sources:
    """Where each part of a pipeline is. Made by `of_folder` or `of_flags`, which see that it is there."""

    folder: Path
    """What names the model; its measured quality, its evaluator and a student's trajectory are there if it has them."""
    transformer: Path | None
    """None for random weights, which the registry makes by `name`."""
    vae: Path
    encoder: EncoderFiles
    scheduler: Path | None
    """None for Open-Sora Plan v1.3's recipe."""
    encoder_2: EncoderFiles | None = None
    name: str | None = None
    """The transformer's name in the registry, if that is how it was named; a preset's size is part of it."""
    size: tuple[int | None, int | None, int | None] = (None, None, None)
    """Frames, height and width that outrank what the transformer's config and name say."""
    upstream: bool = False
    """Whether the transformer runs the package `opensora`'s code."""
    family: Family = OPENSORA
    """What kind of model it is; of one of diffusers' `transformer` is the folder of the network, a UNet's too."""

    @classmethod
    def of_folder(cls, folder: Path) -> Sources:
        """The parts of one pipeline's folder. Raises ValueError when it is missing, half-written or another model's."""
        family = family_of(folder)
        return cls._of_stock(folder, family) if isinstance(family, StockFamily) else cls._of_pipeline(folder, {})

    @classmethod
    def _of_stock(cls, folder: Path, family: StockFamily) -> Sources:
        """The parts of the folder of one of diffusers' pipelines."""
        index = read_json(folder / INDEX_FILE)
        family.refuse(index, folder)
        wanted: dict[str, tuple[str, ...] | None] = {
            family.part: (family.network.__name__, *family.former_names),
            "vae": (family.vae.__name__,),
            **{part: None for part in family.encoders if part not in family.optional},
        }
        for part, known in wanted.items():
            found = class_name(index, part)
            if found is None or (known is not None and found not in known):
                takes = "one" if known is None else f"a {known[0]}"
                raise ValueError(
                    f"{folder} holds a {index['_class_name']} whose {part} is a {found}; it takes {takes} there"
                )
        needed = [*wanted, "scheduler"]
        if missing := [part for part in needed if not any((folder / part).glob("*"))]:
            raise ValueError(f"{folder} is half-written: {', '.join(missing)} missing; copy or make the folder again")
        for part in (family.part, "vae"):
            check_weights(folder / part)
        encoder, *second = StockText.find(folder, family)
        return cls(
            folder,
            transformer=folder / family.part,
            vae=folder / "vae",
            encoder=encoder,
            scheduler=folder / "scheduler",
            encoder_2=second[0] if second else None,
            family=family,
        )

    @classmethod
    def of_flags(cls, flags: ModelConfig, *, find: Callable[..., EncoderFiles] = find_encoder) -> Sources:
        """The parts that the flags name. Those that no flag names are those of the pipeline's folder `--model`.

        A transformer is taken from an existing folder of the name `--model`, else from `--model_path`, else made by the
        registry. `find` is what finds the encoders that flags name. Raises ValueError, naming the flag, for what is
        missing, damaged or of another model.
        """
        folder, name = find_folder(flags), str(flags.model)
        size = (flags.num_frames, flags.max_height, flags.max_width)
        if folder is not None and isinstance(family := family_of(folder), StockFamily):
            _refuse_open_sora_flags(flags, folder)
            return replace(cls._of_stock(folder, family), size=size)
        if flags.opensora_source == "upstream":
            upstream.registries()  # raises where the package cannot be imported
        named: dict[str, Any] = {}
        if flags.ae is not None:
            registry.check_ae(flags.ae)
        if flags.ae_path is not None:
            if not flags.ae_path.is_dir():
                raise ValueError(f"--ae_path {flags.ae_path}: no such folder; it takes a VAE's, with its config.json")
            named["vae"] = registry.check_vae(flags.ae, flags.ae_path)
            if any(named["vae"].glob("*.safetensors")):  # and not a trainer's checkpoint
                check_weights(named["vae"])
        if flags.text_encoder_name_1 is not None:
            named["encoder"] = find(flags.text_encoder_name_1, flag="--text_encoder_name_1", kind="t5")
        if flags.text_encoder_name_2 is not None and takes_second(folder and find_transformer(folder), name):
            named["encoder_2"] = find(flags.text_encoder_name_2, flag="--text_encoder_name_2", kind="clip")
        if folder is not None and ((folder / INDEX_FILE).is_file() or not named):
            parts = cls._of_pipeline(folder, named)
        else:
            parts = cls._of_transformer(folder, name, named)
        if flags.ae is not None and "vae" not in named:
            registry.check_vae(flags.ae, parts.vae)
        return replace(
            parts,
            name=name if registry.is_known(name) else None,
            size=size,
            upstream=flags.opensora_source == "upstream",
        )

    @classmethod
    def _of_pipeline(cls, folder: Path, named: dict[str, Any]) -> Sources:
        """The parts of a pipeline's folder but for those that are `named` otherwise, which need not be there."""
        replaced = {"vae": ["vae"], "encoder": ["text_encoder", "tokenizer"], "encoder_2": []}
        absent = {part for each in named for part in replaced[each]}
        index = check_folder(folder, [part for part in PARTS if part not in absent])
        own: dict[str, Any] = {"vae": folder / "vae"}
        if "encoder" not in named:
            own["encoder"] = _encoder_of(folder, "text_encoder")
        has_second = "encoder_2" not in named and class_name(index, "text_encoder_2")
        if has_second and takes_second(folder / "transformer", str(folder)):
            own["encoder_2"] = _encoder_of(folder, "text_encoder_2")
        return cls(folder, transformer=folder / "transformer", scheduler=folder / "scheduler", **own | named)

    @classmethod
    def _of_transformer(cls, folder: Path | None, name: str, named: dict[str, Any]) -> Sources:
        """A transformer's folder, or none, and the parts that the flags name beside it."""
        for part, flag in (("vae", "--ae_path"), ("encoder", "--text_encoder_name_1")):
            if part not in named:
                brings = "is a name, which brings" if folder is None else f"has no {INDEX_FILE} and so brings"
                what = "VAE" if part == "vae" else "text encoder"
                raise ValueError(f"{flag} is needed: {folder or name} {brings} no {what} of its own")
        transformer = scheduler = None
        if folder is not None:
            transformer = find_transformer(folder)
            check_weights(transformer)
            places = (folder / "scheduler", transformer.absolute().parent / "scheduler")
            scheduler = next((place for place in places if (place / "scheduler_config.json").is_file()), None)
        if scheduler is None:
            say_once(
                f"{transformer or name} has no scheduler/ in or beside it, so the schedule is Open-Sora Plan v1.3's:"
                " v_prediction, zero-terminal SNR, linear betas, trailing spacing"
            )
        return cls(folder or Path(name), transformer=transformer, scheduler=scheduler, **named)

    @property
    def knows_null_prompt(self) -> bool:
        """Whether guidance makes sense: not for a few-step student, nor where diffusers' `is_distilled` says so."""
        index = self.folder / INDEX_FILE
        distilled = index.is_file() and read_json(index).get("is_distilled") is True
        return not distilled and not (self.folder / SAMPLER_FILE).exists()

    @property
    def preset(self) -> registry.Preset | None:
        """The size of videos that is part of the transformer's name, if there is one."""
        return registry.preset(self.name) if self.name else None

    @property
    def has_weights(self) -> bool:
        """Whether the transformer's weights are on the disk, and not made here."""
        return self.transformer is not None

    @property
    def encoders(self) -> list[EncoderFiles]:
        """The text encoders, one or two."""
        return [self.encoder] if self.encoder_2 is None else [self.encoder, self.encoder_2]

    @property
    def folders(self) -> dict[str, Path | None]:
        """The folder of each part, by its name in a pipeline."""
        if isinstance(self.family, StockFamily):
            index = read_json(self.folder / INDEX_FILE)
            present = [part for part in index if class_name(index, part) and (self.folder / part).is_dir()]
            return {part: self.folder / part for part in present}
        places: dict[str, Path | None] = {"transformer": self.transformer, "vae": self.vae, "scheduler": self.scheduler}
        for encoder, suffix in zip(self.encoders, ("", "_2"), strict=False):
            places |= {f"text_encoder{suffix}": encoder.model, f"tokenizer{suffix}": encoder.tokenizer}
        return places

    def files_of(self, part: str) -> list[Path]:
        """A part's own files, sorted by name, also where one folder holds an encoder and its tokenizer."""
        folder = self.folders[part]
        if folder is None:
            return []
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if part.startswith("tokenizer"):
            return [path for path in files if path.suffix in (".json", ".model", ".txt") and ".index." not in path.name]
        if part in ("scheduler", "feature_extractor"):
            return files
        weights = weight_files(folder) or [path for path in files if path.suffix in WEIGHTS]
        about = {path for path in files if path.name == "config.json"}
        about |= {path for path in files if weights and path.name.endswith(f"{weights[0].suffix}.index.json")}
        return sorted({*weights, *about})

    def digest(self, *parts: str) -> str:
        """A short digest of what some parts contain; the same wherever they lie."""
        total = hashlib.sha256()
        for part in sorted(parts):
            files = self.files_of(part)
            if not files and part in ("transformer", "scheduler"):
                total.update(f"{part} {self.name if part == 'transformer' else 'recipe'}\n".encode())
            for path in files:
                total.update(f"{part}/{path.name} {content_digest(path)}\n".encode())
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
        name = class_name(read_json(index), "scheduler") if index.is_file() else None
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
            if self.folders[part] is None:
                self.scheduler_object().save_pretrained(folder / part)
            if self.family is OPENSORA and part == "vae" and not any(self.vae.glob("*.safetensors")):
                registry.load_vae(None, self.vae).vae.save_pretrained(folder / part)
                continue
            for path in self.files_of(part):
                _link_or_copy(path.resolve(), folder / part / path.name)
        (folder / INDEX_FILE).write_text(json.dumps(self._index(), indent=2) + "\n")

    def _index(self) -> dict[str, Any]:
        """A pipeline's index: the folder's own, with the entries of parts from elsewhere."""
        if self.family is not OPENSORA:
            index: dict[str, Any] = read_json(self.folder / INDEX_FILE)
            absent = [part for part in index if class_name(index, part) and part not in self.folders]
            index |= {part: [None, None] for part in absent}
            if "safety_checker" in absent:
                index["requires_safety_checker"] = False
            return index | {self.family.part: ["diffusers", self.family.network.__name__]}
        index = {"_class_name": "OpenSoraPipeline"}
        if (path := self.folder / INDEX_FILE).is_file():
            entries = read_json(path).items()
            index = {part: entry for part, entry in entries if part in self.folders or part not in SECOND_PARTS}
        for part, place in self.folders.items():
            if place != self.folder / part or part not in index:
                index[part] = [LIBRARIES.get(part, "transformers"), self._class_of(part, place)]
        return index

    def _class_of(self, part: str, folder: Path | None) -> str:
        if part == "transformer":
            return OpenSoraT2V_v1_3.__name__
        if part == "scheduler":
            return type(self.scheduler_object()).__name__
        assert folder is not None
        if part.startswith("tokenizer"):
            return "AutoTokenizer"
        config = read_json(folder / "config.json")
        return ENCODERS[config["model_type"]].__name__ if part.startswith("text_encoder") else config["_class_name"]


def find_folder(flags: ModelConfig) -> Path | None:
    """Where the transformer's weights are, None where the registry is to make them; refuses what is neither."""
    folder, name = flags.folder, str(flags.model)
    if folder is None and not registry.is_known(name):
        names = ", ".join(registry.Diffusion_models_class)
        raise ValueError(
            f"--model {name}: no such folder, nor a name that is known ({names}, or one with a size at its end, such as"
            " OpenSoraT2V_v1_3_93x640x640)"
        )
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--model_path {folder}: no such folder; it takes a transformer's or a pipeline's")
    if flags.model_path not in (None, folder):
        say_once(f"--model {folder} is a folder and holds the weights; --model_path {flags.model_path} is left out")
    elif flags.model_path is not None and flags.model not in (type(flags).model, folder):
        registry.check_name(name)
    return folder


def _refuse_open_sora_flags(flags: ModelConfig, folder: Path) -> None:
    """Raise ValueError for flags that name parts of an Open-Sora Plan model beside a pipeline of diffusers."""
    names = ("ae", "ae_path", "text_encoder_name_1", "text_encoder_name_2")
    named = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    if flags.opensora_source != "native":
        named["opensora_source"] = flags.opensora_source
    if named:
        name, value = next(iter(named.items()))
        pipeline = read_json(folder / INDEX_FILE)["_class_name"]
        raise ValueError(
            f"--{name} {value}: {folder} holds a {pipeline}, whose parts are those of its folder; the flag is for"
            " Open-Sora Plan's models"
        )


def find_transformer(folder: Path) -> Path:
    """Where the transformer is in a pipeline's folder, or in one that `registry.find_folder` knows its way in."""
    return folder / "transformer" if (folder / INDEX_FILE).is_file() else registry.find_folder(folder, OpenSoraT2V_v1_3)


def caption_channels(transformer: Path) -> Any:
    """The width of text that a transformer's config says, or a list of them; None where it says nothing."""
    path = transformer / "config.json"
    return read_json(path).get("caption_channels") if path.is_file() else None


def takes_second(transformer: Path | None, name: str) -> bool:
    """Whether a transformer (None: the registry's) takes a second text encoder; says so if not, as one is named."""
    channels = None if transformer is None else caption_channels(transformer)
    if isinstance(channels, list) and len(channels) > 1:
        return True
    say_unused(str(transformer or name))
    return False


def _encoder_of(folder: Path, part: str) -> EncoderFiles:
    """The encoder of a pipeline's folder."""
    tokenizer = folder / part.replace("text_encoder", "tokenizer")
    return find_encoder(folder / part, flag="--model", tokenizer=tokenizer)


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
            f"{folder}: no {INDEX_FILE} in it (found: {found}); it takes a pipeline's folder, or a"
            " transformer's with --ae_path and --text_encoder_name_1 beside it"
        ) from None
    classes = {part: class_name(index, part) for part in parts}
    for part, known in CLASSES.items():
        if part in parts and classes[part] not in known:
            found = f"its {part} is a {classes[part]}" if classes[part] else f"it has no {part}"
            kind = index.get("_class_name", "model")
            raise ValueError(f"{folder} holds a {kind}: {found}; this version takes a {' or '.join(known)} there")
    missing = [part for part in parts if classes[part] is None or not any((folder / part).glob("*"))]
    if missing:
        raise ValueError(f"{folder} is half-written: {', '.join(missing)} missing; copy or make the folder again")
    for part in ("transformer", "vae"):
        if part in parts:
            check_weights(folder / part)
    return index


def _link_or_copy(source: Path, target: Path) -> None:
    if target.suffix in WEIGHTS:
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copy(source, target)
