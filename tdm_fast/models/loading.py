"""The networks of one text-to-video model, from where its parts are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from tdm_fast.encoders import EncoderFiles, check_encoders
from tdm_fast.files import read_json
from tdm_fast.models import registry, upstream
from tdm_fast.models.denoiser import Denoiser
from tdm_fast.models.families import OPENSORA, Family, StockFamily
from tdm_fast.models.networks import check_tensors, check_weights, empty_network, load_network
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.opensora_denoiser import takes_two
from tdm_fast.models.sizes import SIZE_FLAGS, latent_size, latents_of
from tdm_fast.models.sources import Sources, caption_channels
from tdm_fast.models.student import FewStep, load_adapter, load_biases, read_few_step
from tdm_fast.models.vae import VAEWrapper
from tdm_fast.notes import say_once
from tdm_fast.schedule import Schedule

METRICS_FILE = "teacher_metrics.json"


@dataclass(frozen=True)
class Weights:
    """Where a transformer's weights are: in files, changed by what a student's folder has beside them."""

    folder: Path
    products: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of an adapter B `[out, r]` and A `[r, in]`, by the weight `[out, in]` that their product is added to."""
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters that take the place of the files'."""

    @property
    def changed(self) -> bool:
        """Whether there is anything beside the files."""
        return bool(self.products or self.replaced)

    def rows(self, name: str, rows: Tensor, start: int) -> Tensor:
        """What the files' `rows` of a parameter, from number `start` on, are once they are changed."""
        mine = slice(start, start + len(rows))
        if name in self.replaced:
            return self.replaced[name][mine]
        if name not in self.products:
            return rows
        up, down = self.products[name]
        return rows + up[mine] @ down


@dataclass
class Pipeline:
    """One model ready to sample: the denoiser with its schedule, the VAE, the text encoder and its own timesteps."""

    sources: Sources
    denoiser: Denoiser
    vae: VAEWrapper
    tokenizer: Any
    """None, as the text encoder, where it has been left out."""
    text_encoder: nn.Module | None
    scheduler: Any
    """Of diffusers; the denoiser's schedule is its noise levels."""
    latent_shape: tuple[int, ...]
    """`(C, T, H, W)`, or of images `(C, H, W)`, of its latents, whoever has decided their size."""
    weights: Weights | None
    """The denoiser's, for one that is loaded without them; None where no folder has any."""
    timesteps: tuple[int, ...] | None
    """The nodes of a few-step student's trajectory, descending; None for a teacher."""
    trajectories: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The nodes for each number of steps that a student of several was told in training; empty for others."""
    biases: dict[int, Tensor] = field(default_factory=dict)
    """What makes it the student of each of them: the bias `[d]` of its time embedding's last linear."""

    @property
    def folder(self) -> Path:
        """What names the model, with its numbers and evaluator if it has them."""
        return self.sources.folder

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def family(self) -> Family:
        """What kind of model it is."""
        return self.sources.family

    @property
    def config(self) -> Any:
        """The network's."""
        return self.denoiser.model.config

    @property
    def has_own_size(self) -> bool:
        """Whether that size is what the config.json on the disk says, and not a flag or the transformer's name."""
        if self.sources.transformer is None:
            return False
        config = read_json(self.sources.transformer / "config.json")
        try:
            return self.family.time_and_space(self.latent_shape) == self.family.own_size(config, self.vae.strides)
        except KeyError:
            return False

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def to(self, device: torch.device | str) -> Pipeline:
        """Move the networks to a device, but those that have no weights; returns itself."""
        for network in (self.denoiser, self.vae, self.text_encoder):
            if network is not None and not any(parameter.is_meta for parameter in network.parameters()):
                network.to(device)
        return self

    @property
    def encoders(self) -> list[EncoderFiles]:
        """The text encoders that the transformer takes, one or two, as files."""
        if self.family is not OPENSORA:
            return self.sources.encoders
        return self.sources.encoders[: 2 if takes_two(self.denoiser.model) else 1]

    def load_text_encoder(self) -> None:
        """Load the first text encoder where it has been left out."""
        if self.text_encoder is None:
            loaded = self.sources.encoder.load()
            self.tokenizer, self.text_encoder = loaded.tokenizer, loaded.model.to(self.device)

    def latents_of(self, size: str) -> tuple[int, ...]:
        """`(C, T, H, W)` of the latents of videos of `size`, frames x height x width such as 17x64x64.

        Raises ValueError, with the nearest sizes that would do, for one that VAE and patches do not divide.
        """
        lengths = [int(number) for number in size.split("x")]
        axes = self.family.axes(self.config, self.vae.strides)
        latents = latents_of(lengths, axes, f"--video_sizes {size}")
        self.family.check_size(self.config, latents, self.vae.strides, f"--video_sizes {size}")
        return self.family.latent_shape(self.config, latents)

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """`(T, H, W)` of the videos that the VAE makes of such latents, in frames and pixels; T = 1 of images."""
        return self.video_shape_of(self.latent_shape)

    def video_shape_of(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """The same of latents of this shape."""
        axes = self.family.axes(self.config, self.vae.strides)
        sizes = self.family.time_and_space(latent_shape)
        frames, height, width = (unit.pixels(size) for unit, size in zip(axes, sizes, strict=True))
        return frames, height, width

    @torch.no_grad()
    def set_num_steps(self, num_steps: int) -> None:
        """Make a student of several numbers of steps the one of `num_steps`; without this it is that of the most.

        Raises ValueError for a number that it was not trained for.
        """
        if num_steps not in self.trajectories:
            known = ", ".join(map(str, self.trajectories)) or str(len(self.timesteps or ()) or "any (a teacher)")
            raise ValueError(f"num_steps is {num_steps}; {self.folder} holds a model for {known}")
        bias: Any = self.denoiser.time_embedding().bias
        bias.copy_(self.biases[num_steps])
        self.timesteps = self.trajectories[num_steps]


def load_pipeline(folder: Path, *, empty: Collection[str] = ()) -> Pipeline:
    """Load a teacher's or a student's folder; `load_parts` of its own parts."""
    return load_parts(Sources.of_folder(folder), empty=empty)


def load_empty(sources: Sources) -> Pipeline:
    """A model without weights: what `load_parts` refuses and what its size is, within seconds.

    The transformer is this project's; upstream's has the same sizes.
    """
    return load_parts(replace(sources, upstream=False), empty=("transformer", "vae", "text_encoder"))


@torch.no_grad()
def load_parts(sources: Sources, *, empty: Collection[str] = ()) -> Pipeline:
    """Load a model onto the CPU, everything frozen and in evaluation mode.

    A student whose folder keeps its adapter apart gets it merged. The networks named in `empty` are made on the meta
    device, without weights; a text encoder that is named there is left out. The transformer's config says the size of
    its latents, whoever has decided it.
    Raises ValueError, before weights are read where configs tell, for parts that do not fit each other or the size
    asked for.
    """
    scheduler = sources.scheduler_object()
    try:
        schedule = Schedule.from_scheduler(scheduler)
    except ValueError as error:
        raise ValueError(f"{sources.scheduler}: {error}") from error
    own = read_few_step(sources.folder, schedule.num_train_timesteps)
    if isinstance(sources.family, StockFamily):
        return _load_stock(sources, sources.family, empty, scheduler, schedule, own)
    vae = registry.load_vae(None, sources.vae, empty=True)
    if sources.transformer is not None:
        _check_fit(sources, sources.transformer, vae)
    for check in weight_checks(sources).values():
        check()
    transformer = _transformer(sources, vae, empty="transformer" in empty).requires_grad_(False).eval()
    if "vae" not in empty:
        vae = registry.load_vae(None, sources.vae)
    products = {} if own.adapter is None else load_adapter(transformer, sources.folder / own.adapter)
    if "transformer" not in empty:
        for name, (up, down) in products.items():
            transformer.get_parameter(name).add_(up @ down)
    denoiser = OPENSORA.denoiser(transformer, schedule)
    biases, replaced = {}, {}
    if own.trajectories:
        biases = load_biases(sources.folder, own.trajectories, denoiser.time_embedding())
        names = {module: name for name, module in transformer.named_modules()}
        replaced = {f"{names[denoiser.time_embedding()]}.bias": biases[max(own.trajectories)]}
    pipeline = Pipeline(
        sources=sources,
        denoiser=denoiser,
        vae=vae,
        tokenizer=None,
        text_encoder=None,
        scheduler=scheduler,
        latent_shape=OPENSORA.latent_shape(transformer.config, OPENSORA.own_size(transformer.config, vae.strides)),
        weights=None if sources.transformer is None else Weights(sources.transformer, products, replaced),
        timesteps=own.timesteps,
        trajectories=own.trajectories,
        biases=biases,
    )
    if "text_encoder" not in empty:
        pipeline.load_text_encoder()
    if own.trajectories:
        pipeline.set_num_steps(max(own.trajectories))
    return pipeline


def _load_stock(
    sources: Sources, family: StockFamily, empty: Collection[str], scheduler: Any, schedule: Schedule, own: FewStep
) -> Pipeline:
    """`load_parts` of one of diffusers' families; its text encoders are loaded when they are asked for."""
    folder = sources.transformer
    assert folder is not None
    vae = family.wrap(empty_network(sources.vae, family.vae))
    config = family.network.load_config(folder)
    if config["in_channels"] != vae.channels:
        raise ValueError(
            f"{folder}: it takes latents of in_channels={config['in_channels']} but the VAE in {sources.vae} decodes"
            f" {vae.channels} channels; the two are not of one model"
        )
    for check in weight_checks(sources).values():
        check()
    axes = family.axes(config, vae.strides)
    size = list(own.size or family.own_size(config, vae.strides))
    for axis, (flag, asked) in enumerate(zip(SIZE_FLAGS, sources.size, strict=True)):
        if asked is not None:
            size[axis] = axes[axis].latents(asked, f"--{flag} is {asked}")
            family.check_size(config, size, vae.strides, f"--{flag} is {asked}")
    network = (empty_network if "transformer" in empty else load_network)(folder, family.network)
    network.requires_grad_(False).eval()
    if "vae" not in empty:
        vae = family.wrap(load_network(sources.vae, family.vae))
    vae.requires_grad_(False).eval()
    products = {} if own.adapter is None else load_adapter(network, sources.folder / own.adapter, f"{family.part}.")
    if "transformer" not in empty:
        for name, (up, down) in products.items():
            weight = network.get_parameter(name)
            weight.add_((up @ down).view_as(weight))
    return Pipeline(
        sources=sources,
        denoiser=family.denoiser(network, schedule),
        vae=vae,
        tokenizer=None,
        text_encoder=None,
        scheduler=scheduler,
        latent_shape=family.latent_shape(config, size),
        weights=Weights(folder, products),
        timesteps=own.timesteps,
    )


def weight_checks(sources: Sources) -> dict[str, Callable[[], None]]:
    """What raises ValueError for a network's weights that are not all of it, by their headers; by the part's name."""
    checks: dict[str, Callable[[], None]] = {}
    if isinstance(family := sources.family, StockFamily):
        assert sources.transformer is not None
        checks[family.part] = partial(check_tensors, sources.transformer, family.network, others=True)
        checks["vae"] = partial(check_weights, sources.vae)  # old ones have names that diffusers translates
        return checks | {"text_encoder": sources.encoder.check_tensors}
    if sources.transformer is not None and not sources.upstream:
        checks["transformer"] = partial(_check_transformer, sources.transformer)
    checks["vae"] = partial(check_tensors, sources.vae, registry.vae_class(sources.vae))
    for encoder, suffix in zip(sources.encoders, ("", "_2"), strict=False):
        checks[f"text_encoder{suffix}"] = encoder.check_tensors
    return checks


def _check_fit(sources: Sources, folder: Path, vae: VAEWrapper) -> None:
    """Raise ValueError where VAE or text encoders do not fit the transformer in a folder, by its config."""
    channels = read_json(folder / "config.json").get("in_channels")
    if channels != vae.channels:
        raise ValueError(
            f"{folder}: the transformer takes latents of in_channels={channels} but the VAE in {sources.vae} decodes"
            f" {vae.channels} channels; the two are not of one model"
        )
    check_encoders(str(folder), sources.encoders, caption_channels(folder))


def _check_transformer(folder: Path) -> None:
    """Raise ValueError for a transformer's folder that is not one of ours, by its config and its files' headers."""
    channels = caption_channels(folder)
    if isinstance(channels, list) and len(channels) > 1:
        raise ValueError(
            f"{folder}: caption_channels={channels}, so it takes two text encoders; this project's transformer takes"
            " one, and --opensora_source upstream runs the package opensora's own"
        )
    check_tensors(folder, OpenSoraT2V_v1_3)


def _transformer(sources: Sources, vae: VAEWrapper, *, empty: bool) -> Any:
    """The transformer, with the size of its latents in its config.

    Raises ValueError for a size that patches and VAE do not divide.
    """
    if sources.transformer is None:
        return _random_transformer(sources, vae, empty=empty)
    config = OpenSoraT2V_v1_3.load_config(sources.transformer)
    size = latent_size(sources, config, vae.strides)
    transformer: Any
    if sources.upstream:
        transformer = upstream.load_transformer(sources.transformer, sources.name or OpenSoraT2V_v1_3.__name__)
    else:
        transformer = (empty_network if empty else load_network)(sources.transformer, OpenSoraT2V_v1_3)
    transformer.register_to_config(**size)
    return transformer


def _random_transformer(sources: Sources, vae: VAEWrapper, *, empty: bool) -> Any:
    """A transformer that the registry makes, and a loud word about it."""
    assert sources.name is not None
    channels = {"in_channels": vae.channels, "out_channels": vae.channels}
    config: dict[str, Any] = {**channels, "caption_channels": sources.encoder.width}
    config |= latent_size(sources, registry.TWO_BILLION, vae.strides)
    say_once(
        f"--model {sources.name}: RANDOM WEIGHTS. No folder has this name and --model_path names none, so the network"
        " is made as its name says and knows nothing. A student of it is good for a look at speed and memory only"
    )
    with torch.random.fork_rng(devices=[]), init_empty_weights() if empty else nullcontext():
        torch.manual_seed(0)  # the same on every rank, and when a run goes on
        if sources.upstream:
            return upstream.build(registry.base_name(sources.name), **config)
        return registry.Diffusion_models[sources.name](**config)


def load_metrics(folder: Path) -> dict[str, Any] | None:
    """The rows that a teacher's folder keeps of its own quality, or None. Raises ValueError when they are damaged."""
    path = folder / METRICS_FILE
    if not path.exists():
        return None
    metrics = read_json(path, "teacher", "teacher_few_step")
    for name in ("teacher", "teacher_few_step"):
        row = metrics[name] if isinstance(metrics[name], dict) else {}
        numbers = [row.get(key) for key in ("nfe", "guidance", "frechet", "prompt_accuracy", "videos")]
        interval = row.get("frechet_ci")
        numbers += interval if isinstance(interval, list) and len(interval) == 2 else [None]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{path} is damaged: {name} lacks numbers; `tdm-fast evaluate --sweep` writes it anew")
    return metrics
