"""For trainers grown from the public PixArt demo of TDM (arXiv 2503.06674): its two helpers, computed by our ops.

    from tdm_fast.compat import Predictor, generate_new

Arguments are the demo's, in its order, then `use_opensora` and, by keyword, the null prompt's embeddings. For epsilon
prediction in float32 the numbers are the demo's. Where it rounds to half precision, this does not: schedules are exact,
latents keep their dtype and arithmetic is float32. For v-prediction, whose raw output the demo takes for the noise,
this gives the noise. Nothing is drawn from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.ops import ode_step
from tdm_fast.samplers import guided, joined
from tdm_fast.schedule import Schedule, compute_dtype


class _PixArtDenoiser(Denoiser):
    """A network that is called as the demo calls PixArt's: text `[B, L, D]`, mask `[B, L]`, no size conditions."""

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.model(
            x_t,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_hidden_states=conditioning.tensors["encoder_hidden_states"],
            encoder_attention_mask=conditioning.tensors.get("encoder_attention_mask"),
            return_dict=False,
        )[0]


class _OriginalDenoiser(OpenSoraDenoiser):
    """A network of Open-Sora Plan's own code, which takes no None for a mask: ones keep everything."""

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        states = conditioning.tensors["encoder_hidden_states"].unsqueeze(1)
        mask = conditioning.tensors.get("encoder_attention_mask")
        return self.model(
            x_t,
            timestep,
            states,
            attention_mask=x_t.new_ones(x_t.shape[0], *x_t.shape[2:]),
            encoder_attention_mask=states.new_ones(states.shape[:-1]) if mask is None else mask.unsqueeze(1),
            return_dict=False,
        )[0]


class Predictor:
    """Predictions of clean latents and noise, and the noising of latents from one timestep to a later one.

    `alpha_schedule` and `sigma_schedule` are float32 or float64 `[N]`; where they are in half precision, as the demo
    makes them, the scheduler's own are taken. `uncond_prompt_embeds` `[B, L, D]` and `uncond_attention_mask` `[B, L]`
    (or of one sample, for all) are the null prompt, needed for guidance only. With `use_opensora` networks are called
    as Open-Sora Plan's, on latents `[B, C, T, H, W]`, otherwise as PixArt's.
    """

    def __init__(
        self,
        noise_scheduler: Any,
        alpha_schedule: Tensor,
        sigma_schedule: Tensor,
        use_opensora: bool = False,
        *,
        uncond_prompt_embeds: Tensor | None = None,
        uncond_attention_mask: Tensor | None = None,
    ) -> None:
        if alpha_schedule.dtype.itemsize < 4 or sigma_schedule.dtype.itemsize < 4:
            self.schedule = _schedule(noise_scheduler)
        else:
            self.schedule = _schedule(noise_scheduler, alpha_schedule, sigma_schedule)
        self.uncond_prompt_embeds = uncond_prompt_embeds
        self.uncond_attention_mask = uncond_attention_mask
        self.use_opensora = use_opensora

    def predict(
        self,
        score_model: nn.Module,
        noisy_samples: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        prompt_attention_mask: Tensor | None,
        cfg: float | None = None,
        steps: int = 1,
        return_double: bool = False,
        timestep_cond: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """(noise, clean latents) that the network predicts from `noisy_samples` `[B, C, ...]` at `timesteps` `[B]`.

        With `cfg` guided against the null prompt; `return_double` adds the clean latents without guidance, after the
        first step. With `steps` above 1 the prediction is noised again and predicted from once more: each step lowers
        the timesteps by their own `steps`-th part. `timestep_cond` is the demo's, and unused there as well. Raises
        ValueError for a `cfg` without null prompt, a `return_double` without `cfg`, and shapes that do not fit.
        """
        if return_double and cfg is None:
            raise ValueError("return_double is True, but cfg is None: there is no second prediction without guidance")
        denoiser = _denoiser(score_model, self.schedule, self.use_opensora)
        conditioning = _conditioning(encoder_hidden_states, prompt_attention_mask)
        negative = None
        if cfg is not None:
            if self.uncond_prompt_embeds is None:
                raise ValueError(f"cfg is {cfg}, which needs the null prompt: give Predictor uncond_prompt_embeds")
            negative = _null(self.uncond_prompt_embeds, self.uncond_attention_mask, len(noisy_samples))
        sample, t = noisy_samples, timesteps.long()
        for step in range(steps):
            output, conditional = _predict(denoiser, sample, t, conditioning, negative, 1.0 if cfg is None else cfg)
            eps, x0 = _eps(self.schedule, sample, output, t), _x0(self.schedule, sample, output, t)
            if return_double:
                return eps, x0, _x0(self.schedule, sample, conditional, t)
            if step + 1 < steps:
                t = t - t // steps
                sample = self.schedule.add_noise(x0.detach(), eps, t)
        return eps, x0

    def add_noise(self, samples: Tensor, noise: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
        """`samples` `[B, ...]` at `t1` taken to the later `t2` (int64 `[B]`), in their dtype, with fresh `noise`."""
        signal, _, beta, _ = self._factors(t1, t2, samples, noise)
        return (signal * samples + beta * noise).to(samples.dtype)

    def obtain_mixed_noise(self, model_noise: Tensor, noise: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
        """All noise of such samples at `t2`, in units of its level: the predicted one of `t1`, and the fresh one."""
        _, carried, beta, sigma = self._factors(t1, t2, model_noise, noise)
        return ((carried * model_noise + beta * noise) / sigma).to(model_noise.dtype)

    def _factors(self, t1: Tensor, t2: Tensor, *latents: Tensor) -> tuple[Tensor, ...]:
        """What a step from `t1` to `t2` multiplies with: signal, noise of t1, fresh noise; and the noise level there.

        The fresh noise's square is kept from falling below 0 by rounding, which gives NaN in the demo.
        """
        dtype, ndim = compute_dtype(*latents), latents[0].ndim
        alpha_1, sigma_1 = (value.to(dtype) for value in self.schedule.alpha_sigma(t1, ndim))
        alpha_2, sigma_2 = (value.to(dtype) for value in self.schedule.alpha_sigma(t2, ndim))
        signal = alpha_2 / alpha_1
        carried = signal * sigma_1
        return signal, carried, (sigma_2**2 - carried**2).clamp(min=0).sqrt(), sigma_2


def generate_new(
    unet: nn.Module,
    noise_scheduler: Any,
    latent: Tensor,
    noise: Tensor,
    encoder_hidden_states: Tensor,
    prompt_attention_mask: Tensor | None,
    steps: int = 1,
    return_mid: bool = False,
    mid_points: Sequence[int] | None = None,
    total_steps: int = 800,
    add_cfg: Mapping[str, Any] | None = None,
    use_opensora: bool = False,
) -> Tensor | tuple[list[Tensor], list[Tensor]]:
    """The student's trajectory of `steps` steps from `noise` `[B, C, ...]`, the first at timestep `total_steps - 1`.

    Later ones follow at distances of `total_steps // steps`, or at `mid_points[1:steps]`. Returns the clean latents of
    the last step; with `return_mid` those of every step, and what every step began with followed by the last clean
    latents. `add_cfg` holds `cfg`, `uncond_prompt_embeds` and `uncond_attention_mask`. Of `latent` nothing is used.
    Raises ValueError for `steps` that do not fit and for shapes that differ.
    """
    if not 1 <= steps <= total_steps:
        raise ValueError(f"steps is {steps}; with total_steps {total_steps} it takes 1 to {total_steps}")
    if mid_points is not None and len(mid_points) < steps:
        raise ValueError(f"mid_points has {len(mid_points)} timesteps; {steps} steps take as many, the first unused")
    nodes = [total_steps - 1 - i * (total_steps // steps) for i in range(steps)]
    if mid_points is not None:
        nodes[1:] = [int(node) for node in mid_points[1:steps]]
    denoiser = _denoiser(unet, _schedule(noise_scheduler), use_opensora)
    conditioning, negative, guidance = _conditioning(encoder_hidden_states, prompt_attention_mask), None, 1.0
    if add_cfg is not None:
        guidance = add_cfg["cfg"]
        negative = _null(add_cfg["uncond_prompt_embeds"], add_cfg["uncond_attention_mask"], len(noise))
    clean, noisy = [], [noise]
    for node, following in pairwise([*nodes, -1]):
        t = torch.full((len(noise),), node, device=noise.device)
        output, _ = _predict(denoiser, noisy[-1], t, conditioning, negative, guidance)
        clean.append(_x0(denoiser.schedule, noisy[-1], output, t))
        if following >= 0:
            t_next = torch.full_like(t, following)
            noisy.append(ode_step(noisy[-1], output, schedule=denoiser.schedule, t=t, t_next=t_next))
    return (clean, [*noisy, clean[-1]]) if return_mid else clean[-1]


def _schedule(noise_scheduler: Any, alpha: Tensor | None = None, sigma: Tensor | None = None) -> Schedule:
    alphas_cumprod = noise_scheduler.alphas_cumprod.double()
    alpha = alphas_cumprod.sqrt() if alpha is None else alpha.double()
    sigma = (1 - alphas_cumprod).sqrt() if sigma is None else sigma.double()
    timesteps = torch.arange(len(alpha), device=alpha.device)
    return Schedule.from_tables(alpha, sigma, timesteps, noise_scheduler.config.prediction_type)


def _denoiser(model: nn.Module, schedule: Schedule, use_opensora: bool) -> Denoiser:
    if not use_opensora:
        return _PixArtDenoiser(model, schedule)
    ours = any(isinstance(module, OpenSoraT2V_v1_3) for module in model.modules())  # in whatever it is wrapped
    return (OpenSoraDenoiser if ours else _OriginalDenoiser)(model, schedule)


def _conditioning(states: Tensor, mask: Tensor | None) -> Conditioning:
    """States `[B, L, D]` and mask `[B, L]`, or, as Open-Sora Plan's code has them, with a dimension of 1 behind B."""
    tensors = {"encoder_hidden_states": states.squeeze(1) if states.ndim == 4 else states}
    if mask is not None:
        tensors["encoder_attention_mask"] = mask.squeeze(1) if mask.ndim == 3 else mask
    return Conditioning(tensors)


def _null(states: Tensor, mask: Tensor | None, batch_size: int) -> Conditioning:
    """The null prompt for a batch: given once, or for a full batch, of which the last of an epoch is a part."""
    return _conditioning(states, mask)[:batch_size].expand(batch_size)


def _predict(
    denoiser: Denoiser,
    sample: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """(guided output, output with the prompt alone)."""
    both = joined(conditioning, negative, guidance)
    if both is None:
        output = denoiser(sample, t, conditioning)
        return output, output
    return guided(denoiser, sample, t, both, guidance)


def _x0(schedule: Schedule, sample: Tensor, output: Tensor, t: Tensor) -> Tensor:
    return ode_step(sample, output, schedule=schedule, t=t, t_next=torch.full_like(t, -1))


def _eps(schedule: Schedule, sample: Tensor, output: Tensor, t: Tensor) -> Tensor:
    return output if schedule.prediction_type == "epsilon" else schedule.predict(sample, output, t)[1].to(sample.dtype)
