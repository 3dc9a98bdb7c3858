"""Noise schedules as tables: alpha, sigma and the map from a network's output to (x0, eps).

Every prediction type is linear in (x_t, output), so a schedule is a handful of tables over the training timesteps:

    x_t = alpha * x0 + sigma * eps          x0 = a * x_t + b * out          eps = c * x_t + d * out

| prediction type | a     | b             | c       | d              | the network's output is |
|-----------------|-------|---------------|---------|----------------|-------------------------|
| epsilon         | 1/al. | -sigma/alpha  | 0       | 1              | eps                     |
| v_prediction    | alpha | -sigma        | sigma   | alpha          | alpha*eps - sigma*x0    |
| sample          | 0     | 1             | 1/sigma | -alpha/sigma   | x0                      |
| flow            | 1     | -sigma        | 1       | 1 - sigma      | eps - x0                |

The tables are computed in float64 and kept in float32, never in half precision. A timestep is an index into them, noise
ascending, for flow as well. Notation follows arXiv 2503.06674.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]

_DDPM_SCHEDULERS = (
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("LMSDiscreteScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSinglestepScheduler"),
    *("DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"),
    *("LCMScheduler", "TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
)
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")


def per_sample(values: Tensor, ndim: int) -> Tensor:
    """Shape `[B]` values as `[B, 1, ...]` with `ndim` dimensions, so that they broadcast over latents."""
    return values.reshape(-1, *[1] * (ndim - 1))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that arithmetic on `tensors` runs in: float64 if one of them is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@dataclass(frozen=True, eq=False)
class Schedule:
    """Immutable tables of a noise schedule; build one with `ddpm`, `flow` or `from_scheduler`.

    All tables are float32 of length N = `num_train_timesteps`, except `timesteps`: what the network is told for table
    index t, int64 for DDPM-type schedules (the index itself) and float32 `sigma * N` for flow.
    """

    prediction_type: str
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    snr: Tensor
    timesteps: Tensor
    _copies: dict[torch.device, Schedule] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_tables(cls, alpha: Tensor, sigma: Tensor, timesteps: Tensor, prediction_type: str) -> Schedule:
        """Schedule from float64 `alpha[N]` and `sigma[N]`; refuses a prediction type that would divide by zero."""
        if prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"prediction_type is {prediction_type!r}; it must be one of {', '.join(get_args(PredictionType))}"
            )
        if prediction_type == "epsilon" and bool((alpha == 0).any()):
            raise ValueError(
                "prediction_type is 'epsilon', but alpha is 0 at the last timestep (zero-terminal SNR), where x0 cannot"
                " be told from eps; use 'v_prediction', or a schedule without zero-terminal SNR"
            )
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        a, b, c, d = {
            "epsilon": lambda: (1 / alpha, -sigma / alpha, zero, one),
            "v_prediction": lambda: (alpha, -sigma, sigma, alpha),
            "sample": lambda: (zero, one, 1 / sigma, -alpha / sigma),
            "flow": lambda: (one, -sigma, one, 1 - sigma),
        }[prediction_type]()
        tables = {"alpha": alpha, "sigma": sigma, "a": a, "b": b, "c": c, "d": d, "snr": (alpha / sigma) ** 2}
        single = {name: table.to(torch.float32) for name, table in tables.items()}
        return cls(prediction_type, **single, timesteps=timesteps)

    @classmethod
    def ddpm(
        cls,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
    ) -> Schedule:
        """Variance-preserving schedule from betas; with `rescale_betas_zero_snr` alpha is exactly 0 at the end.

        Raises ValueError for an unknown `beta_schedule` or `prediction_type`, betas outside (0, 1), `'epsilon'` with
        zero-terminal SNR, and `'flow'`, which is the prediction type of `Schedule.flow` alone.
        """
        betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule)
        return cls._from_betas(betas, prediction_type, rescale_betas_zero_snr)

    @classmethod
    def _from_betas(
        cls, betas: Tensor, prediction_type: str, rescale_betas_zero_snr: bool, snr_shift_scale: float = 1.0
    ) -> Schedule:
        if prediction_type == "flow":
            raise ValueError(
                "prediction_type is 'flow', which needs alpha + sigma = 1; use Schedule.flow, or one of epsilon,"
                " v_prediction, sample here"
            )
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas are {betas}; at least two values above 0 and below 1 are needed")
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        alpha_bar = alpha_bar / (snr_shift_scale + (1 - snr_shift_scale) * alpha_bar)
        alpha = alpha_bar.sqrt()
        if rescale_betas_zero_snr:
            # Lin et al., arXiv 2305.08891, algorithm 1: shift sqrt(alpha_bar) to end at 0, scale to keep its start.
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        return cls.from_tables(alpha, (1 - alpha**2).sqrt(), torch.arange(len(betas)), prediction_type)

    @classmethod
    def flow(cls, num_train_timesteps: int = 1000, shift: float = 1.0) -> Schedule:
        """Rectified flow, x_t = (1 - sigma) x0 + sigma eps with sigma_t = (t+1)/N, shifted by s*x / (1 + (s-1)*x).

        Raises ValueError for fewer than two timesteps or a `shift` that is not positive.
        """
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift is {shift}; it must be a positive number (1.0 leaves the timesteps as they are)")
        _check_num_train_timesteps(num_train_timesteps)
        uniform = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        sigma = shift * uniform / (1 + (shift - 1) * uniform)
        return cls.from_tables(1 - sigma, sigma, (sigma * num_train_timesteps).to(torch.float32), "flow")

    @classmethod
    def from_scheduler(cls, scheduler: Any, mu: float | None = None) -> Schedule:
        """Rebuild the schedule of a diffusers scheduler from its `.config`, in float64.

        Taken are the DDPM-type and the flow-matching schedulers. Options that only place a sampler's steps (Karras
        sigmas, spacing, clipping, thresholding) do not touch the tables. `mu` is the shift where shifting is dynamic.
        Raises ValueError, by name, for any other scheduler and for a config that cannot be honoured.
        """
        name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
        if config is None or name not in _DDPM_SCHEDULERS + _FLOW_SCHEDULERS:
            known = ", ".join(sorted(_DDPM_SCHEDULERS + _FLOW_SCHEDULERS))
            raise ValueError(f"scheduler is a {name}, whose tables are not known here; it must be one of {known}")
        if config.get("invert_sigmas"):
            raise ValueError(f"scheduler {name} has invert_sigmas set; noise must ascend with t: set it to False")
        if name in _FLOW_SCHEDULERS or config.get("use_flow_sigmas"):
            return cls._from_flow_config(name, config, mu)
        if mu is not None:
            raise ValueError(f"mu is {mu}, but scheduler {name} has no dynamic shifting; leave mu out")
        if config.get("trained_betas") is not None:
            betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
        else:
            span = (config["num_train_timesteps"], config["beta_start"], config["beta_end"])
            betas = _betas(*span, config["beta_schedule"])
        prediction_type = config.get("prediction_type", "epsilon")
        rescale = bool(config.get("rescale_betas_zero_snr", False))
        return cls._from_betas(betas, prediction_type, rescale, config.get("snr_shift_scale", 1.0))

    @classmethod
    def _from_flow_config(cls, name: str, config: Any, mu: float | None) -> Schedule:
        if config.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise ValueError(
                f"scheduler {name} has use_flow_sigmas with prediction_type {config['prediction_type']!r}; only"
                " 'flow_prediction' works there"
            )
        length, dynamic = config["num_train_timesteps"], bool(config.get("use_dynamic_shifting", False))
        if dynamic != (mu is not None):
            need = (
                "is needed, because use_dynamic_shifting is set" if dynamic else "is useless without dynamic shifting"
            )
            raise ValueError(f"mu is {mu}, and for this {name} mu {need}")
        if mu is None:
            return cls.flow(length, config.get("flow_shift", config.get("shift", 1.0)))
        # exp(mu) / (exp(mu) + 1/x - 1) is the static shift with s = exp(mu); the linear kind takes mu itself as s.
        return cls.flow(length, mu if config.get("time_shift_type") == "linear" else math.exp(mu))

    @property
    def num_train_timesteps(self) -> int:
        """N, the length of the tables."""
        return self.alpha.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tables live."""
        return self.alpha.device

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tables on `device`; copies are kept, so that asking again costs nothing."""
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._copies:
            tables = {item.name: getattr(self, item.name) for item in fields(self)}
            moved: dict[str, Any] = {k: v.to(device) for k, v in tables.items() if isinstance(v, Tensor)}
            self._copies[device] = replace(self, **moved)
        return self._copies[device]

    def coefficients(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, c, d) at timesteps `t` (int64 `[B]`, any device), float32 `[B, 1, ...]` with `ndim` dimensions."""
        here = self.to(t.device)
        a, b, c, d = (per_sample(table[t], ndim) for table in (here.a, here.b, here.c, here.d))
        return a, b, c, d

    def alpha_sigma(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at `t`, float32 `[B, 1, ...]`; t = -1 stands for clean data, (1, 0)."""
        here, index, clean = self.to(t.device), t.clamp(min=0), t < 0
        alpha = torch.where(clean, 1.0, here.alpha[index])
        sigma = torch.where(clean, 0.0, here.sigma[index])
        return per_sample(alpha, ndim), per_sample(sigma, ndim)

    def predict(self, sample: Tensor, model_output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) from x_t = `sample` and the raw output, both `[B, ...]`, at `t` `[B]`.

        Computed and returned in float32, or in float64 if an input is float64. Raises ValueError if shapes differ.
        """
        _check_latents(sample, t, model_output=model_output)
        dtype = compute_dtype(sample, model_output)
        a, b, c, d = (value.to(dtype) for value in self.coefficients(t, sample.ndim))
        sample, model_output = sample.to(dtype), model_output.to(dtype)
        return a * sample + b * model_output, c * sample + d * model_output

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha * x0 + sigma * noise, `[B, ...]` in x0's dtype, computed in float32 or better."""
        _check_latents(x0, t, noise=noise)
        dtype = compute_dtype(x0, noise)
        alpha, sigma = (value.to(dtype) for value in self.alpha_sigma(t, x0.ndim))
        return (alpha * x0.to(dtype) + sigma * noise.to(dtype)).to(x0.dtype)

    def training_target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a network of this prediction type is trained to put out at x_t, `[B, ...]`, float32 or float64."""
        _check_latents(x0, t, noise=noise)
        dtype = compute_dtype(x0, noise)
        x0, noise = x0.to(dtype), noise.to(dtype)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        if self.prediction_type == "flow":
            return noise - x0
        alpha, sigma = (value.to(dtype) for value in self.alpha_sigma(t, x0.ndim))
        return alpha * noise - sigma * x0


def _check_num_train_timesteps(num_train_timesteps: int) -> None:
    if num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}; it must be at least 2 (1000 is usual)")


def _check_latents(x: Tensor, t: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}; it must have the latents' {tuple(x.shape)}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)}; it must be {tuple(x.shape[:1])}, one timestep per sample")


def _betas(num_train_timesteps: int, beta_start: float, beta_end: float, beta_schedule: str) -> Tensor:
    _check_num_train_timesteps(num_train_timesteps)
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    if beta_schedule == "squaredcos_cap_v2":
        edges = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        alpha_bar = torch.cos((edges + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    known: Sequence[str] = get_args(BetaSchedule)
    raise ValueError(f"beta_schedule is {beta_schedule!r}; it must be one of {', '.join(known)}")
