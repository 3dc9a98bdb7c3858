"""Activation checkpointing and torch.compile of blocks: the same numbers, and no more programs than announced."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from tdm_fast.distill import TDMConfig, draw, fake_loss, rollout, student_loss
from tdm_fast.memory import TensorMemory
from tdm_fast.models import OpenSoraT2V_v1_3
from tdm_fast.models.denoiser import Conditioning, Roles
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.models.roles import Networks, make_networks
from tdm_fast.parallel import (
    KEPT_OPS,
    SHAPE_KINDS,
    Compilations,
    CompileBound,
    ShapeKind,
    apply_checkpointing,
    blocks_of,
    compile_blocks,
    compile_bound,
    warm_up,
)
from tdm_fast.schedule import Schedule

SCHEDULE = Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)
SHAPE = (4, 2, 4, 4)
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


def test_selective_keeps_no_more_than_nothing_at_all_with_adapters() -> None:
    """An adapter's second product is as wide as the layer's own, and hardly any work."""
    kept = {}
    for kind in ("none", "selective", "block"):
        roles = make_networks(make_teacher(), kind="lora", lora_rank=1).roles
        apply_checkpointing(roles.student.model, kind)  # type: ignore[arg-type]
        with TensorMemory() as memory:
            output = roles.student(*inputs(2, 3, False))
            kept[kind] = memory.current
        assert output.requires_grad
    assert kept["block"] < kept["selective"] < kept["none"]


def test_checkpointing_of_what_it_cannot_know_is_refused() -> None:
    with pytest.raises(ValueError, match="activation_checkpointing is 'some'; it must be none, block or selective"):
        apply_checkpointing(make_teacher().model, "some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no repeated blocks"):
        blocks_of(nn.Linear(1, 1))
    apply_checkpointing(nn.Linear(1, 1), "none")
    replaced = make_teacher().model
    blocks_of(replaced)[1].forward = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"OpenSoraBlock\.forward was replaced"):
        apply_checkpointing(replaced, "block")
    compiled = make_teacher()
    compile_blocks(compiled.model, Compilations(compile_bound(Roles(compiled, compiled, compiled))))
    with pytest.raises(ValueError, match="compiled already"):
        apply_checkpointing(compiled.model, "block")


def test_checkpointing_can_be_changed_and_taken_off() -> None:
    teacher = make_teacher()
    forwards = []
    for kind in ("block", "selective", "none"):
        apply_checkpointing(teacher.model, kind)  # type: ignore[arg-type]
        forwards.append(vars(teacher.model.transformer_blocks[0]).get("forward"))
    assert forwards[0] is not forwards[1] and forwards[2] is None


def test_a_copy_runs_its_own_blocks() -> None:
    network = make_teacher()
    apply_checkpointing(network.model, "block")
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert bool(network(*inputs(2, 3, False)).any()) and not bool(other(*inputs(2, 3, False)).any())


def test_every_attention_of_torch_is_kept() -> None:
    """All of aten's fused attention forwards are listed; the composite ones are made of matmuls."""
    names = {name.removeprefix("aten::").split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    attention = {name for name in names if name.startswith(("_scaled_dot_product", "_flash_att", "_efficient_att"))}
    composite = {"_scaled_dot_product_attention_math"}
    assert {name for name in attention if not name.endswith("_backward")} - composite <= set(KEPT_OPS)


def test_blocks_of_diffusers_own_transformers() -> None:
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=6, in_channels=4, num_layers=3, cross_attention_dim=12, sample_size=4,
        caption_channels=8,
    )  # fmt: skip
    assert blocks_of(model) == list(model.transformer_blocks)
    assert blocks_of(nn.Sequential(nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])))[0].in_features == 1


def networks(roles: str, checkpointing: str, backend: str | None = None) -> tuple[Networks, Compilations]:
    made = make_networks(make_teacher(), kind=roles, lora_rank=2)  # type: ignore[arg-type]
    compilations = Compilations(compile_bound(made.roles), backend or "inductor")
    for model in made.models():
        apply_checkpointing(model, checkpointing)  # type: ignore[arg-type]
        if backend is not None:
            compile_blocks(model, compilations)
    return made, compilations


def every_call(made: Networks, batch: int, length: int, masked: bool) -> list[Tensor]:
    """All that an iteration asks of the three networks, for one size of batch and text."""
    given, results = inputs(batch, length, masked), []
    with torch.no_grad():
        results += [role(*given) for role in made.roles]
    for name in ("student", "fake"):
        output = getattr(made.roles, name)(*given)
        results += [output.detach(), *torch.autograd.grad(output.square().sum(), list(made.trainable(name).values()))]
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("roles", "checkpointing"),
    [
        ("full", "none"),
        ("lora", "block"),
        ("full", "selective"),
        ("lora", "none"),
    ],
)
def test_nothing_compiles_after_the_warm_up(roles: str, checkpointing: str) -> None:
    torch._dynamo.reset()
    (compiled, compilations), (plain, _) = networks(roles, checkpointing, "aot_eager"), networks(roles, checkpointing)
    latents, _, conditioning = inputs(1, 3, False)
    warm_up(compilations, compiled.roles, latents, conditioning)
    assert 0 < compilations.count <= compilations.bound.total
    assert all(parameter.grad is None for role in compiled.roles for parameter in role.parameters())
    cases = [(2, 3, False), (5, 3, False), (1, 7, False), (3, 3, True), (1, 4, True), (7, 2, False), (4, 9, True)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for case in cases:
            found, expected = every_call(compiled, *case), every_call(plain, *case)
            scale = max(
                float(tensor.abs().max()) for tensor in expected
            )  # a key's bias has a gradient of rounding only
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * scale)
    assert compilations.after_warm_up == 0


def test_the_bound_is_kept_and_told() -> None:
    torch._dynamo.reset()
    full, lora = (networks(kind, "none")[1].bound for kind in ("full", "lora"))
    assert full.total == (3 + 3 + 3 + 3 + 3) * len(SHAPE_KINDS)
    assert lora.total == (3 + 4 + 3 + 3 + 4) * len(SHAPE_KINDS)  # of a frozen network's first block
    assert str(full).startswith("at most 60 compilations: block kinds (student without gradient 3, ")
    network = make_teacher()
    compile_blocks(network.model, Compilations(CompileBound({"teacher": 1}, shapes=1), "aot_eager"))
    with torch.no_grad(), pytest.raises(Exception) as error:
        network(*inputs(2, 3, False))
    assert "at most 1 compilations" in "".join(traceback.format_exception(error.value))


def test_a_text_of_one_token_is_a_kind_of_its_own() -> None:
    torch._dynamo.reset()
    network = make_teacher()
    roles = Roles(network, network, network)
    kinds = [ShapeKind(), ShapeKind(one_token=True)]
    compilations = Compilations(compile_bound(roles, shapes=kinds), "aot_eager")
    compile_blocks(network.model, compilations)
    warm_up(compilations, roles, *inputs(1, 3, False)[::2], shapes=kinds)
    with torch.no_grad():
        network(*inputs(3, 1, False)), network(*inputs(3, 5, False))
    assert compilations.after_warm_up == 0


@pytest.mark.slow
def test_blocks_that_inductor_compiled_round_as_well_as_eager_ones() -> None:
    """Against float64: at most twice the eager block's own error, and an ulp of the largest value."""
    torch._dynamo.reset()
    exact, eager = (make_teacher(dtype).requires_grad_(True) for dtype in (torch.float64, torch.float32))
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled.model, Compilations(compile_bound(Roles(compiled, compiled, compiled))))
    results = [
        gradients(network, *inputs(2, 3, False, next(network.parameters()).dtype))
        for network in (exact, eager, compiled)
    ]
    for gold, plain, ours in zip(*([output, *grads] for output, grads in results), strict=True):
        scale = float(gold.abs().max())
        limit = 2 * float((plain - gold).abs().max()) + 2.0**-23 * scale
        assert float((ours - gold).abs().max()) <= limit


@pytest.mark.slow
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
