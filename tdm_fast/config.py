"""Typed configuration: one group of flags per concern, flat names, defaults from a YAML file, everything checked."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import tyro
import yaml

from tdm_fast.attention import Name as AttentionName
from tdm_fast.distill import TDMConfig
from tdm_fast.ranks import Sharding

BUNDLED_TEACHER = Path(__file__).parent / "assets" / "tiny-shapes"
DEFAULTS_FILE = "train.yaml"

T = TypeVar("T")


@dataclass(kw_only=True)
class ModelConfig:
    """What is distilled."""

    model: Path = BUNDLED_TEACHER
    """The teacher: a pipeline's or a transformer's folder, or a name of Open-Sora Plan's registry, whose size is
    part of it (OpenSoraT2V_v1_3_93x640x640); the bundled tiny-shapes teacher if none is named."""
    model_path: Path | None = None
    """Folder of the transformer's weights where `--model` is a name."""
    ae: str | None = None
    """The VAE's name, such as WFVAEModel_D8_4x8x8, which `--ae_path` has to hold."""
    ae_path: Path | None = None
    """The VAE's folder; the teacher's own if not given."""
    text_encoder_name_1: str | None = None
    """T5, mT5 or UMT5: a hub name, or a folder with model and tokenizer; the teacher's own if not given."""
    text_encoder_name_2: str | None = None
    """A second encoder (CLIP), for a transformer that takes two."""
    num_frames: int | None = None
    """Frames of the videos to train on; what the transformer's config says if not given, else what its name says."""
    max_height: int | None = None
    """Their height in pixels, likewise."""
    max_width: int | None = None
    """Their width in pixels, likewise."""
    opensora_source: Literal["native", "upstream"] = "native"
    """Whose code the transformer runs: this project's, or that of the package `opensora`, which has to be installed."""
    prompts: Path | None = None
    """One prompt a line (.txt), or .csv, .jsonl, .parquet, or the name of a data set on the hub; the 144 prompts of
    tiny-shapes if none is named."""
    prompt_column: str | None = None
    """The table's column of prompts; `prompt`, `caption`, `text`, or the only one with text if not given."""
    prompt_cache: Path | None = None
    """Folder of prompts that `tdm-fast encode` has encoded; without it they are encoded into the run's folder."""
    negative_prompt: str = ""
    """What the teacher's guidance leads away from."""

    @property
    def folder(self) -> Path | None:
        """Where the transformer's weights are: a folder named `model`, else `model_path`; None if neither is there."""
        unnamed = self.model == BUNDLED_TEACHER and self.model_path is not None
        return self.model if self.model.is_dir() and not unnamed else self.model_path


@dataclass(kw_only=True)
class NetworksConfig:
    """The three networks, and how the device holds and runs them."""

    roles: Literal["full", "lora"] = "full"
    """`full`: three networks. `lora`: one frozen network, with an adapter for the student and one for the fake score;
    the teacher is that network without them."""
    lora_rank: int = 32
    """Rank of the adapters."""
    lora_alpha: float | None = None
    """Scale of the adapters times their rank; the rank if not given."""
    device: str = "auto"
    """`cuda`, `cuda:1`, `cpu`; `auto` takes a GPU if there is one."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """`bf16`: networks compute in bfloat16 and what is frozen is kept in it; trained weights stay float32. `auto` takes
    it on a GPU, where it is faster."""
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """`block` keeps a block's input and computes the rest again in the backward; `selective` also keeps what matrix
    products and attention gave."""
    attention: AttentionName = "auto"
    """What computes attention. `sdpa`: PyTorch's own kernels. `flash4`: FlashAttention 4 in their place. `flash`,
    `xformers`: those packages. `math`: the definition, slow and large. `auto`: flash4 or sdpa."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, block by block. `auto` takes it on a GPU; on a CPU compiling takes a minute or more."""
    sharding: Sharding = "full"
    """How several ranks (torchrun, accelerate launch) hold weights. `none`: whole on every rank, gradients averaged.
    `full`: in shards over all ranks. `hybrid`: in shards inside a machine, or over `shard_size` ranks, with copies
    across."""
    shard_size: int | None = None
    """With `hybrid`: how many ranks hold one copy of the weights; the ranks of a machine if not given."""
    context_parallel: int = 1
    """How many ranks share a sample and split its tokens; it must divide the model's attention heads."""
    reshard_after_forward: bool = True
    """Drop a block's gathered weights after its forward and gather them again for its backward. Off, they are kept:
    less to communicate, and the memory of one whole network in the dtype of computation."""


@dataclass(kw_only=True)
class OptimiserConfig:
    """How it is trained. `learning_rate` is the fake score's, as in the public demo."""

    max_train_steps: int = 500
    """Iterations; each makes `fake_updates` fake-score updates and one student update."""
    train_batch_size: int | Literal["auto"] = 32
    """Samples of one iteration, over all ranks together; `auto` finds the largest number up to 64 that fits the memory
    of every rank's device, for each of its `gradient_accumulation_steps`, and the least activation checkpointing."""
    gradient_accumulation_steps: int = 1
    """Parts of a rank's samples whose gradients are added up one after another; activations take the memory of one."""
    learning_rate: float = 2e-5
    """The fake score's learning rate."""
    student_learning_rate: float | None = None
    """The student's learning rate; a fifth of the fake score's if not given."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "cosine_with_restarts"
    """The student's learning-rate schedule; the fake score's rate is constant."""
    lr_warmup_steps: int = 50
    """Iterations over which the student's rate rises from zero."""
    max_grad_norm: float = 1.0
    """The student's gradient is clipped to this norm."""
    adam_beta1: float = 0.0
    adam_beta2: float = 0.95
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    use_8bit_adam: bool = False
    """Keep AdamW's moments in 8 bits (torchao)."""
    use_ema: bool = True
    """Keep a moving average of the student and sample from it."""
    ema_decay: float = 0.98
    """Decay of that average per iteration."""


@dataclass(kw_only=True)
class RunConfig:
    """Where it goes and what is kept."""

    output_dir: Path = Path("runs/tiny-shapes")
    """The run's folder."""
    checkpointing_steps: int = 50
    """Iterations between two checkpoints."""
    checkpoints_total_limit: int | None = 2
    """How many of the newest checkpoints stay."""
    resume_from_checkpoint: str = "latest"
    """`latest` goes on from the folder's newest whole checkpoint if there is one; a checkpoint's folder, or
    its name in the run's folder; or `none`."""
    validation_steps: int = 50
    """Iterations between two sets of samples from fixed prompts and noise."""
    num_eval_videos: int = 576
    """Videos behind the student's numbers at the end; 0 leaves the evaluation out."""
    video_sizes: tuple[str, ...] = ()
    """Sizes to mix, as frames × height × width such as 17x64x64, one drawn per batch; the teacher's own
    if none is named."""
    lora_save: Literal["merged", "adapter"] = "merged"
    """What the student's folder holds with `lora` roles: merged weights, or the teacher's and the adapter beside them;
    the adapter's file is there either way."""
    logging_steps: int = 10
    """Iterations between two readings of the losses, for which the host waits for the device."""
    max_skipped_steps: int = 10
    """Updates in a row that may be skipped, because a loss or gradient is not finite, before the run stops."""
    report_to: Literal["tensorboard", "wandb", "all", "none"] = "tensorboard"
    """Where the numbers go besides `metrics.jsonl`."""
    profile: str | None = None
    """Iterations A:B to trace; `trace-A-B.json.gz` in the run's folder opens in Perfetto."""


@dataclass(kw_only=True)
class TrainConfig:
    """Distil a teacher into a few-step student.

    Defaults are the public demo's. The teacher's `train.yaml`, if it has one, is laid over them; over that the YAML
    file that `--config FILE` names, flags' names as keys; and over that the flags themselves.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    tdm: TDMConfig = field(default_factory=TDMConfig)
    networks: NetworksConfig = field(default_factory=NetworksConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise ValueError for a value that cannot work, naming the flag, the value and what would work."""
        n, o, r = self.networks, self.optimiser, self.run
        for name, value, least in (
            ("max_train_steps", o.max_train_steps, 1),
            ("train_batch_size", None if o.train_batch_size == "auto" else o.train_batch_size, 1),
            ("lora_rank", n.lora_rank, 1),
            ("shard_size", n.shard_size, 1),
            ("context_parallel", n.context_parallel, 1),
            ("gradient_accumulation_steps", o.gradient_accumulation_steps, 1),
            ("lr_warmup_steps", o.lr_warmup_steps, 0),
            ("checkpointing_steps", r.checkpointing_steps, 1),
            ("validation_steps", r.validation_steps, 1),
            ("checkpoints_total_limit", r.checkpoints_total_limit, 1),
            ("logging_steps", r.logging_steps, 1),
            ("max_skipped_steps", r.max_skipped_steps, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"--{name} {value}: it takes a whole number from {least} up")
        for name, rate in (
            ("learning_rate", o.learning_rate),
            ("student_learning_rate", o.student_learning_rate),
            ("max_grad_norm", o.max_grad_norm),
            ("adam_epsilon", o.adam_epsilon),
            ("lora_alpha", n.lora_alpha),
        ):
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(f"--{name} {rate}: it takes a finite number above 0")
        for name, share in (
            ("adam_beta1", o.adam_beta1),
            ("adam_beta2", o.adam_beta2),
            ("ema_decay", o.ema_decay),
        ):
            if not 0 <= share < 1:
                raise ValueError(f"--{name} {share}: it takes a number from 0 to below 1")
        if n.shard_size is not None and n.sharding != "hybrid":
            raise ValueError(f"--shard_size {n.shard_size}: it goes with --sharding hybrid, which is {n.sharding}")
        if n.roles == "full" and r.lora_save == "adapter":
            raise ValueError("--lora_save adapter: --roles full trains no adapter; it takes --roles lora")
        for size in r.video_sizes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", size):
                raise ValueError(f"--video_sizes {size}: it takes frames x height x width, such as 17x64x64")
        if r.num_eval_videos != 0 and r.num_eval_videos < 64:
            raise ValueError(f"--num_eval_videos {r.num_eval_videos}: it takes 0 (none) or at least 64")

    def flat(self) -> dict[str, Any]:
        """All flags by name, with plain values; what `config.yaml` in the run's folder holds."""
        groups = (getattr(self, group.name) for group in dataclasses.fields(self))
        values = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}
        return {name: _plain(value) for name, value in values.items()}


# Flags that a YAML file may set to null.
OPTIONAL = {
    name
    for group in (ModelConfig, TDMConfig, NetworksConfig, OptimiserConfig, RunConfig)
    for name, hint in get_type_hints(group).items()
    if NoneType in get_args(hint)
}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def parse(config: type[T], arguments: Sequence[str], *, prog: str) -> T:
    """Parse flags into a dataclass. Exits with code 2 and a message for unknown flags and values."""
    return tyro.cli(config, args=arguments, prog=prog, config=(tyro.conf.OmitArgPrefixes,))


def parse_train(arguments: Sequence[str], *, prog: str = "tdm-fast train") -> TrainConfig:
    """Flags of `train`, over the YAML file that `--config` names, over the teacher folder's `train.yaml`.

    All go through one parser, so a wrong value is refused the same way wherever it stands.
    """
    early = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--model", type=Path)
    early.add_argument("--model_path", "--model-path", type=Path)
    named, others = early.parse_known_args(arguments)
    if named.config and not named.config.is_file():
        raise ValueError(f"--config {named.config}: no such file; it takes a YAML file with flags' names as keys")
    chosen = _read_yaml(named.config) if named.config else {}
    wished = {name: getattr(named, name) or chosen.get(name) for name in ("model", "model_path")}
    places: dict[str, Any] = {name: Path(place) for name, place in wished.items() if place}
    folder = ModelConfig(**places).folder
    defaults = _read_yaml(folder / DEFAULTS_FILE) if folder and (folder / DEFAULTS_FILE).is_file() else {}
    given = [*_yaml_arguments(defaults | chosen), *others]
    given += [word for name, place in places.items() for word in (f"--{name}", str(place))]
    config = parse(TrainConfig, given, prog=prog)
    config.check()
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: it takes a mapping from flags' names to values, got {type(values).__name__}")
    for name, value in values.items():
        if value is None and str(name).replace("-", "_") not in OPTIONAL:
            raise ValueError(f"{path}: {name} is null, but it always has a value; leave the line out for its default")
    return values


def _yaml_arguments(values: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments += [f"--{name}", str(value)]
    return arguments
