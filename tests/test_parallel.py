"""Activation checkpointing and torch.compile of blocks: the same numbers, and no more programs than announced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdm_fast.distill import TDMConfig, draw, fake_loss, rollout, student_loss
from tdm_fast.models import OpenSoraT2V_v1_3
from tdm_fast.models.denoiser import Conditioning
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.models.roles import Networks, make_networks
from tdm_fast.parallel import Compilations, apply_checkpointing, blocks_of, bound, compile_blocks
from tdm_fast.schedule import Schedule

SCHEDULE = Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)
SHAPE = (4, 2, 4, 4)
KINDS = 3  # of blocks below: dense, sparse, sparse and swapped
CONFIG = TDMConfig(num_steps=2, seed=3)


def make_teacher(dtype: torch.dtype = torch.float32) -> OpenSoraDenoiser:
    torch.manual_seed(0)
    model = OpenSoraT2V_v1_3(
        num_layers=4, attention_head_dim=6, num_attention_heads=2, cross_attention_dim=12, caption_channels=8,
        in_channels=4, out_channels=4, patch_size_t=1, patch_size=2, sparse1d=True, sparse_n=2,
        sample_size_t=2, sample_size_h=4, sample_size_w=4, activation_fn="gelu-approximate",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return OpenSoraDenoiser(model.to(dtype), SCHEDULE)


def inputs(batch: int, length: int, masked: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(100 * batch + length)
    tensors = {
        "encoder_hidden_states": torch.randn(batch, length, 8, generator=generator, dtype=torch.float64).to(dtype)
    }
    if masked:
        tensors["encoder_attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
        tensors["encoder_attention_mask"][0, -1] = 0
    latents = torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return latents, torch.arange(batch) * 100 + 5, Conditioning(tensors)


def gradients(network: nn.Module, *given: Any) -> tuple[Tensor, list[Tensor]]:
    output = network(*given)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return output.detach(), list(torch.autograd.grad(output.square().sum(), parameters))


@pytest.mark.parametrize("kind", ["block", "selective"])
def test_checkpointing_keeps_less_and_gives_the_same(kind: str) -> None:
    plain = make_teacher().requires_grad_(True)
    lean = copy.deepcopy(plain)
    names = [name for name, _ in lean.named_parameters()]
    apply_checkpointing(lean.model, kind)
    assert (
        names == [name for name, _ in lean.named_parameters()] and lean.state_dict().keys() == plain.state_dict().keys()
    )
    kept = {}
    for name, network in (("plain", plain), ("lean", lean)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            network(*inputs(2, 3, False))
        kept[name] = sum(sizes)
    assert kept["lean"] < kept["plain"] / 2
    expected, found = (gradients(network, *inputs(2, 3, True)) for network in (plain, lean))
    assert torch.equal(expected[0], found[0])
    assert all(map(torch.equal, expected[1], found[1]))


def test_checkpointing_of_what_it_cannot_know_is_refused() -> None:
    with pytest.raises(ValueError, match="activation_checkpointing is 'some'; it must be none, block or selective"):
        apply_checkpointing(make_teacher().model, "some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear names no blocks in _no_split_modules"):
        blocks_of(nn.Linear(1, 1))
    apply_checkpointing(nn.Linear(1, 1), "none")


def networks(roles: str, checkpointing: str, compilations: Compilations | None = None) -> Networks:
    made = make_networks(make_teacher(), kind=roles, lora_rank=2)  # type: ignore[arg-type]
    for model in made.models():
        apply_checkpointing(model, checkpointing)  # type: ignore[arg-type]
        if compilations is not None:
            compile_blocks(model, compilations)
    return made


def every_call(made: Networks, batch: int, length: int, masked: bool) -> list[Tensor]:
    """All that an iteration asks of the three networks, for one size of batch and text."""
    given, results = inputs(batch, length, masked), []
    with torch.no_grad():
        results += [role(*given) for role in made.roles]
    for name in ("student", "fake"):
        output = getattr(made.roles, name)(*given)
        results += [output.detach(), *torch.autograd.grad(output.square().sum(), list(made.trainable(name).values()))]
    return results


@pytest.mark.parametrize(
    ("roles", "checkpointing"), [("full", "none"), ("full", "selective"), ("lora", "none"), ("lora", "block")]
)
def test_nothing_compiles_after_the_warm_up(roles: str, checkpointing: str) -> None:
    torch._dynamo.reset()
    compilations = Compilations("aot_eager")
    compiled, plain = networks(roles, checkpointing, compilations), networks(roles, checkpointing)
    warm_ups = [(1, 3, False), (2, 3, False), (1, 3, True), (2, 3, True)]
    for case in warm_ups:
        every_call(compiled, *case)
    made = compilations.count
    assert 0 < made <= bound(KINDS, roles=3)
    for case in [(5, 3, False), (1, 7, False), (3, 6, True), (1, 4, True), (7, 2, False), *warm_ups]:
        for found, expected in zip(every_call(compiled, *case), every_call(plain, *case), strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert compilations.count == made


def test_blocks_that_inductor_compiled_round_as_well_as_eager_ones() -> None:
    """Against float64: at most twice the eager block's own error, and an ulp of the largest value."""
    torch._dynamo.reset()
    exact, eager = (make_teacher(dtype).requires_grad_(True) for dtype in (torch.float64, torch.float32))
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled.model)
    results = [
        gradients(network, *inputs(2, 3, False, next(network.parameters()).dtype))
        for network in (exact, eager, compiled)
    ]
    for gold, plain, ours in zip(*([output, *grads] for output, grads in results), strict=True):
        scale = float(gold.abs().max())
        limit = 2 * float((plain - gold).abs().max()) + 2.0**-23 * scale
        assert float((ours - gold).abs().max()) <= limit


def test_the_steps_losses_are_one_graph() -> None:
    """No graph break in ops, networks and what lies between them: the whole of an update under fullgraph=True."""
    torch._dynamo.reset()
    roles = make_networks(make_teacher()).roles
    latents, _, conditioning = inputs(3, 3, False)
    unconditional = Conditioning({"encoder_hidden_states": torch.zeros(1, 3, 8)})
    draws = draw(CONFIG, 3, 0)
    rolled = rollout(roles.student, latents, conditioning, SCHEDULE, CONFIG, draws)

    def fake() -> Tensor:
        return fake_loss(roles, rolled, conditioning, CONFIG, draws, 0)

    def student() -> Tensor:
        return student_loss(roles, rolled, conditioning, unconditional, CONFIG, draws, 0)

    def rolling() -> Tensor:
        return rollout(roles.student, latents, conditioning, SCHEDULE, CONFIG, draws).student_sample

    functions: list[Callable[[], Tensor]] = [fake, student, rolling]
    for function in functions:
        whole = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(), function(), rtol=1e-4, atol=1e-6)
