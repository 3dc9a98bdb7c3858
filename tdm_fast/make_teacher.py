"""Train the bundled teacher from nothing: evaluator, text encoder, VAE and DiT, in stages that resume."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel

from tdm_fast import tiny_shapes
from tdm_fast.checkpoint import load_checkpoint, save_checkpoint
from tdm_fast.config import DEFAULTS_FILE
from tdm_fast.evaluator import ShapesEvaluator
from tdm_fast.files import latest_checkpoint, locked, read_json, truncate_log, whole_folder, write_atomically
from tdm_fast.host import keep_memory
from tdm_fast.models import OpenSoraT2V_v1_3, WFVAEModel
from tdm_fast.models.loading import METRICS_FILE
from tdm_fast.optimizer_state import load_optimizer_tensors, optimizer_tensors
from tdm_fast.philox import Purpose, bounded, randn, random_integers
from tdm_fast.schedule import Schedule
from tdm_fast.text import PromptCache, word_tokenizer

# The evaluation never sees these seeds: stages draw their clips from `seed` plus one of them.
EVALUATOR_SEED, VAE_SEED, LATENT_SEED, TRANSFORMER_SEED, DETAIL_SEED, DECODER_SEED = range(1, 7)
MAX_SEED = 900
STAGES = ("evaluator", "text", "vae", "decoder", "transformer", "detail")
# Flags that a resumed run may change.
FREE_FLAGS = {"output_dir", "checkpoint_seconds", "evaluate"}
# Noise levels taken to decide the shape, which the first pass learns last: chosen by looking at samples, not swept.
DECISIVE_TIMESTEPS = (60, 560)
# The share of the VAE's steps that see a window of the clip; it is convolutional but for an attention within frames.
VAE_CROPS = 0.92
# What `tdm-fast train` starts from with this teacher; the public demo's own values are for far larger networks.
TRAIN_DEFAULTS = {
    "max_train_steps": 300,
    "train_batch_size": 24,
    "learning_rate": 5e-4,
    "student_learning_rate": 1e-4,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 10,
    "ema_decay": 0.98,
    "cfg": 1.5,
}


@dataclass(kw_only=True)
class TeacherConfig:
    """What `tdm-fast make-teacher` trains, and for how long."""

    output_dir: Path = Path("tiny-shapes-teacher")
    """Where the teacher's folders, the checkpoints of unfinished stages and the log go."""
    seed: int = 0
    """Seed of weights and data."""
    evaluator_steps: int = 1500
    text_steps: int = 300
    vae_steps: int = 4000
    decoder_steps: int = 6000
    """Then the VAE's decoder alone, which leaves the latents as they are."""
    transformer_steps: int = 10000
    """All noise levels alike."""
    detail_steps: int = 4000
    """Then half of every batch at the noise levels that decide the shape."""
    num_latents: int = 144 * 128
    """Clips encoded once as the DiT's training set."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints of a stage."""
    evaluate: bool = True
    """Sweep the guidance at the end and write the teacher's own numbers."""

    def check(self) -> None:
        """Raise ValueError for a value that cannot work, naming the flag, the value and what would work."""
        for name in (f"{stage}_steps" for stage in STAGES):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: it takes a whole number from 1 up")
        if self.num_latents < tiny_shapes.NUM_PROMPTS:
            raise ValueError(
                f"--num_latents {self.num_latents}: it takes at least {tiny_shapes.NUM_PROMPTS}, a clip of every prompt"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"--seed {self.seed}: it takes 0 to {MAX_SEED}; the evaluation's clips have seeds above")
        if not 0 <= self.checkpoint_seconds < math.inf:
            raise ValueError(f"--checkpoint_seconds {self.checkpoint_seconds}: it takes a finite number from 0 up")


@dataclass
class Stage:
    """One network's training; `loss(step)` depends on the step alone, so that a resumed stage is the same stage."""

    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]
    steps: int
    learning_rate: float
    ema: float = 0.999
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    averaged: dict[str, Tensor] = field(init=False)

    def run(self, folder: Path, log: Path, checkpoint_seconds: float) -> None:
        """Train, resuming from the folder's last checkpoint; leaves the averaged weights in the model."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        self.averaged = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        first, spent = self._resume(folder, optimizer)
        truncate_log(log, lambda row: row["stage"] != self.name or row["step"] <= first)
        began = saved = time.monotonic()
        progress = tqdm(range(first, self.steps), desc=self.name, initial=first, total=self.steps, mininterval=5)
        for step in progress:
            scale = min(1.0, (step + 1) / min(200, self.steps)) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * scale
            optimizer.zero_grad()
            loss = self.loss(step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            decay = min(self.ema, (1 + step) / (10 + step))
            for name, parameter in self.model.named_parameters():
                self.averaged[name].lerp_(parameter.detach(), 1 - decay)
            if (step + 1) % 100 == 0 or step + 1 == self.steps:
                seconds = spent + time.monotonic() - began
                progress.set_postfix(loss=f"{loss.item():.4f}")
                with open(log, "a") as file:
                    row = {"stage": self.name, "step": step + 1, "loss": loss.item(), "seconds": round(seconds, 1)}
                    file.write(json.dumps(row) + "\n")
            if time.monotonic() - saved > checkpoint_seconds or step + 1 == self.steps:
                saved = time.monotonic()
                weights = dict(chain(self.model.named_parameters(), self.model.named_buffers()))
                groups = {"model": weights, "ema": self.averaged, "optimizer": optimizer_tensors(optimizer)}
                save_checkpoint(folder, step + 1, groups, {"seconds": spent + saved - began}, keep=1)
        self._load(self.averaged)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    def _resume(self, folder: Path, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        last = latest_checkpoint(folder)
        if last is None:
            return 0, 0.0
        groups, meta = load_checkpoint(last)
        self._load(groups["model"])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(groups["model"][name])
        load_optimizer_tensors(optimizer, groups["optimizer"])
        self.averaged = groups["ema"]
        return int(meta["step"]), float(meta["seconds"])


def make_teacher(config: TeacherConfig) -> None:
    """Run every stage whose result is not there yet; the result is a folder laid out as diffusers pipelines are."""
    keep_memory()
    with locked(config.output_dir):
        _stages(config)


def _stages(config: TeacherConfig) -> None:
    output = config.output_dir
    work = output / "work"
    _refuse_changes(config, work / "config.json")
    log = output / "training_log.jsonl"
    _evaluator(config, work, log)
    cache = _text_encoder(config, work, log)
    vae = _vae(config, work, log)
    latents = _latents(config, vae, work / "latents.safetensors")
    _transformer(config, latents, cache, work, log)
    index = {
        "_class_name": "OpenSoraPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["tdm_fast.models", "OpenSoraT2V_v1_3"],
        "vae": ["tdm_fast.models", "WFVAEModel"],
    }
    write_atomically(output / DEFAULTS_FILE, yaml.safe_dump(TRAIN_DEFAULTS, sort_keys=False).encode())
    write_atomically(output / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())
    if config.evaluate:
        from tdm_fast.evaluate import measure_teacher

        measure_teacher(output)


def _refuse_changes(config: TeacherConfig, path: Path) -> None:
    """Keep the flags that decide the weights. Raises ValueError when the folder's stages were begun with others."""
    mine = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FLAGS}
    saved = read_json(path) if path.exists() else mine
    if changed := [f"{name} was {saved.get(name)}, is {mine[name]}" for name in mine if saved.get(name) != mine[name]]:
        raise ValueError(
            f"{config.output_dir} was begun with another configuration ({'; '.join(changed)}); use its flags to go on"
            " with it, or another --output_dir to start anew"
        )
    write_atomically(path, json.dumps(mine).encode())


def _evaluator(config: TeacherConfig, work: Path, log: Path) -> ShapesEvaluator:
    folder = config.output_dir / "evaluator"
    if not _finished(folder):
        torch.manual_seed(config.seed)
        model = ShapesEvaluator()
        batch = 32

        def loss(step: int) -> Tensor:
            videos, attributes, start = tiny_shapes.sample_clips(
                batch, seed=config.seed + EVALUATOR_SEED, sample_offset=step * batch
            )
            return model.loss(_as_if_decoded(videos, torch.Generator().manual_seed(step)), attributes, start)

        Stage("evaluator", model, loss, config.evaluator_steps, 3e-3, ema=0.99).run(
            work / "evaluator", log, config.checkpoint_seconds
        )
        save_whole(model, folder)
    return ShapesEvaluator.from_pretrained(folder, use_safetensors=True).eval()


def _as_if_decoded(videos: Tensor, generator: torch.Generator) -> Tensor:
    """Clips `[B, 3, T, H, W]` made softer or over-sharp, and noisy, each to a degree of its own.

    Decoders leave such traces. A classifier that has seen clean clips only reads them as content, and a distance
    between its features would be one of decoders, not of what the clips show.
    """
    batch = len(videos)
    strength = 2 * torch.rand(batch, 1, 1, 1, 1, generator=generator) - 1
    blurred = F.avg_pool2d(F.pad(videos.flatten(1, 2), (2, 2, 2, 2), mode="replicate"), 3, stride=1)
    blurred = F.avg_pool2d(blurred, 3, stride=1).view_as(videos)
    noise = 0.15 * torch.rand(batch, 1, 1, 1, 1, generator=generator) * torch.randn(videos.shape, generator=generator)
    return videos + strength * (videos - blurred) + noise


def _text_encoder(config: TeacherConfig, work: Path, log: Path) -> PromptCache:
    """A T5 encoder that learns to tell the attributes apart: heads on its mean state, thrown away afterwards."""
    folder = config.output_dir / "text_encoder"
    prompts = tiny_shapes.all_prompts()
    tokenizer = word_tokenizer(word for prompt in prompts for word in prompt.split())
    if not _finished(folder):
        torch.manual_seed(config.seed)
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        )
        heads = nn.ModuleList(nn.Linear(64, n) for n in tiny_shapes.CARDINALITIES)
        tokens = tokenizer(prompts, return_tensors="pt").input_ids
        targets = tiny_shapes.attributes_of(torch.arange(len(prompts)))

        def loss(step: int) -> Tensor:
            pooled = encoder(input_ids=tokens).last_hidden_state.mean(1)
            losses = [F.cross_entropy(head(pooled), targets[:, i]) for i, head in enumerate(heads)]
            return torch.stack(losses).sum()

        Stage("text_encoder", nn.ModuleList([encoder, heads]), loss, config.text_steps, 1e-3, ema=0.9).run(
            work / "text_encoder", log, config.checkpoint_seconds
        )
        save_whole(tokenizer, config.output_dir / "tokenizer")
        save_whole(encoder, folder)
    encoder = T5EncoderModel.from_pretrained(folder, use_safetensors=True).eval()
    return PromptCache.encode(prompts, tokenizer, encoder)


def _vae(config: TeacherConfig, work: Path, log: Path) -> WFVAEModel:
    folder = config.output_dir / "vae"
    if not _finished(folder):
        torch.manual_seed(config.seed)
        vae = WFVAEModel(
            latent_dim=8, base_channels=8, encoder_num_resblocks=1, encoder_energy_flow_hidden_size=8,
            decoder_num_resblocks=1, decoder_energy_flow_hidden_size=16, norm_type="layernorm",
            t_interpolation="trilinear",
        )  # fmt: skip
        seed = config.seed + VAE_SEED

        def loss(step: int) -> Tensor:
            videos = _vae_clips(8, seed, step, whole=step >= VAE_CROPS * config.vae_steps)
            posterior = vae.encode(videos).latent_dist
            latents = posterior.sample(torch.Generator().manual_seed(step))
            return _pixel_loss(vae, latents, videos) + 1e-4 * posterior.kl().mean() / latents[0].numel()

        Stage("vae", vae, loss, config.vae_steps, 2e-3, ema=0.998).run(work / "vae", log, config.checkpoint_seconds)
        train_decoder(vae, config, work, log)
        vae.eval()
        with torch.no_grad():
            videos, _, _ = tiny_shapes.sample_clips(288, seed=config.seed + VAE_SEED, iteration=1)
            latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in videos.split(16)])
        axes = (0, 2, 3, 4)
        vae.register_to_config(shift=latents.mean(axes).tolist(), scale=latents.std(axes).reciprocal().tolist())
        save_whole(vae, folder)
    return WFVAEModel.from_pretrained(folder, use_safetensors=True).eval()


def train_decoder(vae: WFVAEModel, config: TeacherConfig, work: Path, log: Path) -> None:
    """Sharpen what the decoder makes of whole frames, which it has hardly seen; the latents stay as they are."""
    seed = config.seed + DECODER_SEED

    def loss(step: int) -> Tensor:
        videos = _vae_clips(4, seed, step, whole=True)
        with torch.no_grad():
            latents = vae.encode(videos, return_dict=False)[0].sample(torch.Generator().manual_seed(step))
        return _pixel_loss(vae, latents, videos)

    Stage("vae_decoder", vae.decoder, loss, config.decoder_steps, 1e-3, ema=0.998).run(
        work / "vae_decoder", log, config.checkpoint_seconds
    )


def _pixel_loss(vae: WFVAEModel, latents: Tensor, videos: Tensor) -> Tensor:
    error = vae.decode(latents, return_dict=False)[0] - videos
    # The shape covers a few per cent of the pixels and is all there is to learn.
    weight = 1 + 4 * (videos - tiny_shapes.BACKGROUND).abs().amax(1, keepdim=True).clamp(max=1)
    return (weight * (error.abs() + error.square())).mean()


def _vae_clips(batch: int, seed: int, step: int, *, whole: bool) -> Tensor:
    """Clips for the VAE: whole frames, or windows of a quarter of their size around the middle of the shape's path."""
    attributes, start = tiny_shapes.sample_paths(batch, seed=seed, sample_offset=step * batch)
    if whole:
        return tiny_shapes.render(attributes, start)
    size = tiny_shapes.RESOLUTION // 2
    generator = torch.Generator().manual_seed(step)
    jitter = size * (0.6 * torch.rand(batch, 2, generator=generator) - 0.8)
    middle = start + tiny_shapes.travel(attributes) / 2
    return tiny_shapes.render(attributes, start, origin=middle + jitter, size=size)


@torch.no_grad()
def _latents(config: TeacherConfig, vae: WFVAEModel, path: Path) -> Tensor:
    """Normalised latents `[N, 8, 5, 8, 8]` of clips 0 … N-1; clip n shows the prompt that `sample_paths` says."""
    if not path.exists():
        from tdm_fast.models.vae import WFVAEWrapper

        wrapper, rows = WFVAEWrapper(vae), []
        for offset in tqdm(range(0, config.num_latents, 48), desc="latents", mininterval=5):
            count = min(48, config.num_latents - offset)
            videos, _, _ = tiny_shapes.sample_clips(count, seed=config.seed + LATENT_SEED, sample_offset=offset)
            rows.append(wrapper.encode(videos, sample_posterior=False))
        write_atomically(path, save({"latents": torch.cat(rows)}))
    return load_file(path)["latents"]


def _transformer(config: TeacherConfig, latents: Tensor, cache: PromptCache, work: Path, log: Path) -> None:
    folder = config.output_dir / "transformer"
    if _finished(folder):
        return
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    save_whole(scheduler, config.output_dir / "scheduler")
    schedule = Schedule.from_scheduler(scheduler)
    torch.manual_seed(config.seed)
    model = OpenSoraT2V_v1_3(
        num_layers=6, attention_head_dim=24, num_attention_heads=4, cross_attention_dim=96, caption_channels=64,
        in_channels=8, out_channels=8, patch_size_t=1, patch_size=2, sparse1d=True, sparse_n=2,
        sample_size_t=5, sample_size_h=8, sample_size_w=8, activation_fn="gelu-approximate", attention_bias=True,
    )  # fmt: skip
    batch = 32
    null = len(cache)
    rows = torch.stack(
        [*cache.embeddings, F.pad(cache.negative, (0, 0, 0, len(cache.embeddings[0]) - len(cache.negative)))]
    )
    mask = torch.ones(len(rows), rows.shape[1], dtype=torch.int64)
    mask[null, len(cache.negative) :] = 0

    def loss(step: int, seed: int, focused: bool) -> Tensor:
        words = random_integers((3,), batch, seed=seed, iteration=step, purpose=Purpose.DATA)
        chosen, t = bounded(words[:, 0], len(latents)), bounded(words[:, 1], schedule.num_train_timesteps)
        if focused:
            low, high = DECISIVE_TIMESTEPS
            t[batch // 2 :] = low + bounded(words[batch // 2 :, 1], high - low)
        shown = tiny_shapes.PROMPT_STRIDE * chosen % tiny_shapes.NUM_PROMPTS
        prompt = torch.where(bounded(words[:, 2], 10) == 0, null, shown)
        x0 = latents[chosen]
        noise = randn(batch, x0.shape[1:], seed=seed, iteration=step)
        noisy = schedule.add_noise(x0, noise, t)
        out = model(
            noisy, schedule.timesteps[t], encoder_hidden_states=rows[prompt][:, None],
            encoder_attention_mask=mask[prompt][:, None], return_dict=False,
        )[0]  # fmt: skip
        return F.mse_loss(out, schedule.training_target(x0, noise, t))

    for name, steps, rate, seed, focused in (
        ("transformer", config.transformer_steps, 1e-3, TRANSFORMER_SEED, False),
        ("transformer_detail", config.detail_steps, 7e-4, DETAIL_SEED, True),
    ):
        step_loss = functools.partial(loss, seed=config.seed + seed, focused=focused)
        Stage(name, model, step_loss, steps, rate, ema=0.999, weight_decay=0.01).run(
            work / name, log, config.checkpoint_seconds
        )
    save_whole(model, folder)


def save_whole(part: Any, folder: Path) -> None:
    """`save_pretrained` into a folder that appears when it is whole, because a resumed run takes it for finished.

    The teacher's own numbers, if it had any, were of another part in this one's place, and go.
    """
    (folder.parent / METRICS_FILE).unlink(missing_ok=True)
    with whole_folder(folder) as partial:
        part.save_pretrained(partial)


def _finished(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))
