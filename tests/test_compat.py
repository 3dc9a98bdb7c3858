"""The public demo's helpers against its formulas, written out in float64, on toy networks with its two calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from tdm_fast.compat import Predictor, generate_new
from tdm_fast.models.loading import load_pipeline

B, C, L, D = 3, 4, 5, 6


class Toy(nn.Module):
    """Mixes latents, time and the text's kept rows; 2C channels for images, C for videos."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = ndim == 4
        self.mix = nn.Linear(C, 2 * C if self.image else C)
        self.text = nn.Linear(D, C)
        self.calls = 0

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        added_cond_kwargs: dict[str, None] | None = None,
    ) -> tuple[Tensor]:
        assert return_dict is False
        if self.image:
            assert attention_mask is None
        else:  # the original class takes no None
            assert attention_mask is not None and attention_mask.shape == (len(x), *x.shape[2:])
            assert bool((attention_mask == 1).all()) and encoder_attention_mask is not None
            assert encoder_attention_mask.shape == (len(x), 1, L)
        assert added_cond_kwargs == ({"resolution": None, "aspect_ratio": None} if self.image else None)
        assert encoder_hidden_states.shape[1:] == ((L, D) if self.image else (1, L, D))
        self.calls += 1
        text = encoder_hidden_states.reshape(len(x), L, D)
        mask = torch.ones(len(x), L) if encoder_attention_mask is None else encoder_attention_mask.reshape(len(x), L)
        pooled = (self.text(text) * mask[..., None].to(text)).sum(1) / mask.sum(1, keepdim=True)
        told = pooled + timestep.to(text)[:, None] / 500
        return (
            self.mix(torch.sin(2 * x + told.reshape(len(x), C, *[1] * (x.ndim - 2))).movedim(1, -1)).movedim(-1, 1),
        )


def scheduler(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=prediction_type)


class Case:
    """Latents, texts and the network in float64, with what the formulas of arXiv 2503.06674 give for them."""

    def __init__(self, ndim: int = 4, prediction_type: str = "epsilon") -> None:
        generator = torch.Generator().manual_seed(1)
        self.opensora = ndim == 5
        self.prediction_type = prediction_type
        self.network = Toy(ndim)
        self.exact = Toy(ndim).double()
        self.x = torch.randn(B, C, *(4,) * (ndim - 2), generator=generator)
        self.noise = torch.randn(self.x.shape, generator=generator)
        self.text = torch.randn(B, L, D, generator=generator)
        self.mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
        self.null = torch.randn(1, L, D, generator=generator)
        self.null_mask = torch.tensor([[1, 0, 0, 0, 0]])
        alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        self.alpha, self.sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def output(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        extra: dict[str, Any] = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        text, mask = text.double(), mask.double()
        if self.opensora:
            text, mask = text[:, None], mask[:, None]
            extra = {"attention_mask": torch.ones(len(x), *x.shape[2:])}
        return self.exact(x, t, text, encoder_attention_mask=mask, return_dict=False, **extra)[0][:, :C]

    def prediction(self, x: Tensor, t: Tensor, cfg: float | None = None) -> tuple[Tensor, Tensor]:
        """(noise, x0), guided."""
        output = self.output(x, t, self.text, self.mask)
        if cfg is not None:
            null = self.output(x, t, self.null.expand(B, -1, -1), self.null_mask.expand(B, -1))
            output = null + cfg * (output - null)
        alpha, sigma = self.at(t)
        if self.prediction_type == "epsilon":
            return output, (x - sigma * output) / alpha
        return sigma * x + alpha * output, alpha * x - sigma * output

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (self.x.ndim - 1))
        return self.alpha[t].reshape(shape), self.sigma[t].reshape(shape)

    def predictor(self, dtype: torch.dtype = torch.float32) -> Predictor:
        return Predictor(
            scheduler(self.prediction_type),
            self.alpha.to(dtype),
            self.sigma.to(dtype),
            use_opensora=self.opensora,
            uncond_prompt_embeds=self.null,
            uncond_attention_mask=self.null_mask,
        )


def close(ours: Tensor, exact: Tensor, tolerance: float = 2e-6) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


CASES = [(4, "epsilon"), (5, "epsilon"), (5, "v_prediction")]


@pytest.mark.parametrize(("ndim", "prediction_type"), CASES)
@pytest.mark.parametrize("cfg", [None, 4.5])
@torch.no_grad()
def test_a_prediction_is_the_formulas(ndim: int, prediction_type: str, cfg: float | None) -> None:
    case, t = Case(ndim, prediction_type), torch.tensor([899, 450, 3])
    eps, x0 = case.predictor().predict(case.network, case.x, t, case.text, case.mask, cfg)
    for ours, exact in zip((eps, x0), case.prediction(case.x.double(), t, cfg), strict=True):
        close(ours, exact)
    assert case.network.calls == 1, "guidance takes one call"


@pytest.mark.parametrize("cfg", [None, 3.0])
@torch.no_grad()
def test_steps_go_down_by_their_part_of_the_timestep(cfg: float | None) -> None:
    case, t = Case(), torch.tensor([899, 450, 7])
    eps, x0 = case.predictor().predict(case.network, case.x, t, case.text, case.mask, cfg=cfg, steps=3)
    x = case.x.double()
    for _ in range(3):
        exact = case.prediction(x, t, cfg)
        t = t - t // 3
        alpha, sigma = case.at(t)
        x = alpha * exact[1] + sigma * exact[0]
    # x0 at timestep 899 is a difference of numbers 60 times as large, and the network is not smooth.
    close(eps, exact[0], 1e-4)
    close(x0, exact[1], 1e-4)


def test_the_gradient_and_the_second_prediction_of_guidance() -> None:
    case, t = Case(), torch.tensor([700, 450, 20])
    arguments = (case.network, case.x, t, case.text, case.mask, 4.5)
    _, guided, plain = case.predictor().predict(*arguments, return_double=True)
    exact = [case.prediction(case.x.double(), t, cfg)[1] for cfg in (4.5, None)]
    for ours, truth in zip((guided, plain), exact, strict=True):
        close(ours.detach(), truth.detach())
    names = [name for name, _ in case.network.named_parameters()]
    mine = torch.autograd.grad((guided.square() + plain).mean(), list(case.network.parameters()))
    theirs = torch.autograd.grad((exact[0].square() + exact[1]).mean(), list(case.exact.parameters()))
    for name, ours, truth in zip(names, mine, theirs, strict=True):
        error = (ours.double() - truth).abs().max() / truth.abs().max()
        assert error < 1e-5, name


@torch.no_grad()
def test_noising_and_mixed_noise_are_the_formulas_and_never_nan() -> None:
    case = Case(5)
    predictor = case.predictor()
    for t1, t2 in (([675, 225, 0], [880, 300, 20]), ([25, 500, 998], [25, 500, 998])):
        first, second = torch.tensor(t1), torch.tensor(t2)
        (alpha_1, sigma_1), (alpha_2, sigma_2) = case.at(first), case.at(second)
        carried = alpha_2 / alpha_1 * sigma_1
        beta = (sigma_2**2 - carried**2).clamp(min=0).sqrt()
        x, noise = case.x.double(), case.noise.double()
        # Where t1 is t2, beta is 0 but for the rounding of a difference of float32 numbers near 1.
        bound = 2e-6 if t1 != t2 else 1e-3
        for ours, exact in (
            (predictor.add_noise(case.x, case.noise, first, second), alpha_2 / alpha_1 * x + beta * noise),
            (predictor.obtain_mixed_noise(case.x, case.noise, first, second), (carried * x + beta * noise) / sigma_2),
        ):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), exact, rtol=bound, atol=bound)
    half = predictor.add_noise(case.x.half(), case.noise.half(), first, second)
    assert half.dtype == torch.float16 and half.isfinite().all()


@torch.no_grad()
def test_schedules_in_half_precision_are_replaced_by_the_schedulers_own() -> None:
    case, t = Case(), torch.tensor([899, 450, 3])
    half, single = (case.predictor(dtype) for dtype in (torch.float16, torch.float32))
    arguments = (case.network, case.x, t, case.text, case.mask)
    for ours, exact in zip(half.predict(*arguments), single.predict(*arguments), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


TRAJECTORIES: list[tuple[dict[str, Any], list[int]]] = [
    ({"steps": 4, "total_steps": 900}, [899, 674, 449, 224]),
    ({}, [799]),
    ({"steps": 3}, [799, 533, 267]),
    ({"steps": 4, "total_steps": 1000, "mid_points": [0, 856, 665, 399, 7]}, [999, 856, 665, 399]),
]


@pytest.mark.parametrize(("ndim", "prediction_type"), CASES)
@pytest.mark.parametrize(("arguments", "nodes"), TRAJECTORIES)
@pytest.mark.parametrize("cfg", [None, 2.0])
@torch.no_grad()
def test_the_trajectory_is_the_formulas(
    ndim: int, prediction_type: str, arguments: dict[str, Any], nodes: list[int], cfg: float | None
) -> None:
    case = Case(ndim, prediction_type)
    texts = (case.text, case.mask) if ndim == 4 else (case.text[:, None], case.mask[:, None])
    null = {"cfg": cfg, "uncond_prompt_embeds": case.null, "uncond_attention_mask": case.null_mask}
    given = {**arguments, "add_cfg": None if cfg is None else null, "use_opensora": case.opensora}
    unused = torch.full_like(case.x, torch.nan)
    run: Callable[..., Any] = generate_new
    last = run(case.network, scheduler(prediction_type), unused, case.x, *texts, **given)
    clean, noisy = run(case.network, scheduler(prediction_type), unused, case.x, *texts, return_mid=True, **given)
    x, exact_clean, exact_noisy = case.x.double(), [], []
    for i, node in enumerate(nodes):
        exact_noisy.append(x)
        eps, x0 = case.prediction(x, torch.full((B,), node), cfg)
        exact_clean.append(x0)
        if i + 1 < len(nodes):
            x = case.alpha[nodes[i + 1]] * x0 + case.sigma[nodes[i + 1]] * eps
    assert torch.equal(last, clean[-1])
    for ours, exact in zip([*clean, *noisy], [*exact_clean, *exact_noisy, exact_clean[-1]], strict=True):
        close(ours, exact, 1e-5)  # the rounding of the first steps grows with the steps


@torch.no_grad()
def test_a_null_prompt_of_a_full_batch_serves_a_smaller_one() -> None:
    case, t = Case(), torch.tensor([899, 450, 3])
    once = case.predictor().predict(case.network, case.x, t, case.text, case.mask, 2.0)
    full = case.predictor()
    full.uncond_prompt_embeds, full.uncond_attention_mask = case.null.expand(8, -1, -1), case.null_mask.expand(8, -1)
    for ours, exact in zip(full.predict(case.network, case.x, t, case.text, case.mask, 2.0), once, strict=True):
        assert torch.equal(ours, exact)


@torch.no_grad()
def test_a_mask_that_is_left_out_keeps_all_of_a_prompt() -> None:
    case, t = Case(5), torch.tensor([899, 450, 3])
    case.mask = torch.ones(B, L, dtype=torch.int64)
    bare = case.predictor().predict(case.network, case.x, t, case.text, None)
    for ours, exact in zip(bare, case.prediction(case.x.double(), t), strict=True):
        close(ours, exact)


@torch.no_grad()
def test_our_own_network_is_called_without_masks_in_whatever_it_is_wrapped(tiny_teacher: Path) -> None:
    teacher = load_pipeline(tiny_teacher)
    case, t, seen = Case(5, "v_prediction"), torch.tensor([899, 450, 3]), []
    x, text = torch.randn(B, *teacher.latent_shape), torch.randn(B, L, 8)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = teacher.denoiser.model

        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            seen.append(keywords["attention_mask"])
            return self.module(*arguments, **keywords)

    bare, wrapped = (case.predictor().predict(each, x, t, text, None) for each in (teacher.denoiser.model, Wrapped()))
    assert seen == [None] and all(map(torch.equal, bare, wrapped))


def test_what_cannot_work_is_refused() -> None:
    case, t = Case(), torch.tensor([899, 450, 3])
    arguments = (case.network, case.x, t, case.text, case.mask)
    bare = Predictor(scheduler("epsilon"), case.alpha, case.sigma)
    with pytest.raises(ValueError, match=r"cfg is 4\.5, which needs the null prompt: give Predictor uncond_prompt"):
        bare.predict(*arguments, cfg=4.5)
    with pytest.raises(ValueError, match="return_double is True, but cfg is None"):
        bare.predict(*arguments, return_double=True)
    with pytest.raises(ValueError, match="steps is 0; with total_steps 800 it takes 1 to 800"):
        generate_new(case.network, scheduler("epsilon"), case.x, case.x, case.text, case.mask, steps=0)
    with pytest.raises(ValueError, match="mid_points has 2 timesteps; 4 steps take as many"):
        generate_new(
            case.network, scheduler("epsilon"), case.x, case.x, case.text, case.mask, steps=4, mid_points=[1, 2]
        )
    with pytest.raises(ValueError, match="x_t has 3 samples"):
        generate_new(case.network, scheduler("epsilon"), case.x, case.x, case.text[:2], case.mask[:2])
