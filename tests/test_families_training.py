"""Every family of diffusers' own as a teacher: iterations, checkpointing, compiled blocks, shards, adapters' files."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from rank_runs import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_networks import (
    CONFIGS,
    FAMILIES,
    POOLED_WIDTH,
    conditioning,
    denoiser,
    example,
    latent_shape,
    network,
    schedule,
)
from torch import Tensor, nn

from tdm_fast.config import OptimiserConfig, TrainConfig
from tdm_fast.distill import TDMConfig
from tdm_fast.models.blocks import named_blocks
from tdm_fast.models.denoiser import Conditioning
from tdm_fast.models.loading import Weights
from tdm_fast.models.networks import empty_network
from tdm_fast.models.roles import Networks, make_networks
from tdm_fast.models.wan import WanDenoiser
from tdm_fast.parallel import Compilations, apply_checkpointing, compile_blocks, compile_bound, warm_up
from tdm_fast.ranks import Ranks, joined
from tdm_fast.sharding import collect
from tdm_fast.sizing import estimate_run, measure_costs, with_flags
from tdm_fast.step import State, make_batch, make_state, update
from tdm_fast.text import PromptCache

CPU = torch.device("cpu")
KINDS = ("full", "lora")
ADAPTER = "pytorch_lora_weights.safetensors"
CONFIG = TrainConfig(
    tdm=TDMConfig(num_steps=4, seed=4),
    optimiser=OptimiserConfig(max_train_steps=20, train_batch_size=2, learning_rate=1e-3, lr_warmup_steps=1),
)
BLOCKS = {
    "pixart_alpha": {"transformer_blocks": "BasicTransformerBlock"},
    "sd3": {"transformer_blocks": "JointTransformerBlock"},
    "cogvideox_5b": {"transformer_blocks": "CogVideoXBlock"},
    "wan": {"blocks": "WanTransformerBlock"},
}


def prompts_of(name: str) -> PromptCache:
    """Five prompts, of several lengths where a mask can tell them apart."""
    given = conditioning(name, 6).tensors
    rows = list(given["encoder_hidden_states"])
    if CONFIGS[name][0].takes_mask:
        rows = [row[: 2 + index % 5] for index, row in enumerate(rows)]
    second = list(given["encoder_2_hidden_states"]) if name in POOLED_WIDTH else None
    return PromptCache(
        tuple("abcde"), rows[:5], rows[5], *((None, None) if second is None else (second[:5], second[5]))
    )


def iterate(
    name: str, config: TrainConfig, iterations: int, ranks: Ranks | None = None, folder: Path | None = None
) -> tuple[State, list[dict[str, float]]]:
    """Iterations of this rank, and what each said; `folder` has the weights of a network that is made empty."""
    cache, weights, teacher = prompts_of(name), None, denoiser(name)
    if folder is not None:
        empty = empty_network(folder, CONFIGS[name][1])
        teacher, weights = CONFIGS[name][0](empty, schedule(name)), Weights(folder)
    state, rows = make_state(teacher, config, ranks, weights), []
    for iteration in range(iterations):
        batch = make_batch(iteration, cache, config, [latent_shape(name)], ranks=ranks)
        rows.append({key: value.item() for key, value in update(state, batch, config, nullcontext).items()})
    return state, rows


def moved(networks: Networks) -> Networks:
    """Both roles away from the teacher, as training moves them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for role in ("student", "fake"):
            for parameter in networks.trainable(role).values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return networks


def gradients(networks: Networks, name: str, role: str) -> list[Tensor]:
    """A role's output and gradients, after a forward of the other role that has to be told apart from it."""
    outputs = {one: getattr(networks.roles, one)(*example(name, 2)) for one in ("student", "fake")}
    found = torch.autograd.grad(outputs[role].square().sum(), list(networks.trainable(role).values()))
    return [outputs[role].detach(), *found]


def assert_near(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Equal to rounding; `atol` is of the largest value of all, as some gradients are of rounding only."""
    scale = max(float(tensor.abs().max()) for tensor in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol * scale)


FAST = {("pixart_alpha", "full"), ("sd15", "full"), ("sd3", "full"), ("cogvideox_5b", "lora"), ("wan", "lora")}
SLOW_FAMILIES = ("pixart_sigma", "sdxl", "sd35", "cogvideox_2b")
"""Whose networks are of a class that a faster one has as well."""


def families(*slow: str) -> list[Any]:
    """Parameters: all families, of which those named are for the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in FAMILIES]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in FAST else pytest.mark.slow)
        for name in FAMILIES
        for kind in KINDS
    ],
)
def test_twenty_iterations(name: str, kind: Any) -> None:
    original = network(name).state_dict()
    state, rows = iterate(name, with_flags(CONFIG, roles=kind, lora_rank=2), 20)
    losses = torch.tensor([[row["loss_fake"], row["loss_student"]] for row in rows])
    assert bool(losses.isfinite().all()) and bool((losses > 0).all())
    networks = state.networks
    frozen = networks.roles.teacher.model.state_dict() if kind == "full" else networks.adapters.base_state()
    assert frozen.keys() == original.keys()
    assert all(torch.equal(frozen[path], original[path]) for path in original)
    student, fake = (networks.trainable(role) for role in ("student", "fake"))
    start = make_networks(denoiser(name), kind=kind, lora_rank=2, seed=CONFIG.tdm.seed).trainable("student")
    # The last block of SD3 makes no use of what its text's queries find.
    unused = "transformer_blocks.2.attn.add_q_proj.lora_"
    for path in start:
        if not (name in ("sd3", "sd35") and path.startswith(unused)):
            assert not torch.equal(student[path], start[path]) and not torch.equal(fake[path], start[path]), path
    assert any(not torch.equal(student[path], fake[path]) for path in start)


@pytest.mark.parametrize("name", families(*SLOW_FAMILIES))
def test_checkpointing_changes_nothing(name: str) -> None:
    for kind in KINDS:
        networks = moved(make_networks(denoiser(name), kind=kind, lora_rank=2))
        expected = {role: gradients(networks, name, role) for role in ("student", "fake")}
        for way in ("block", "selective"):
            for model in networks.models():
                apply_checkpointing(model, way)  # type: ignore[arg-type]
            for role in expected:
                assert_near(gradients(networks, name, role), expected[role], rtol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_transformers(name: str) -> None:
    model = network(name)
    ((path, cls),) = BLOCKS[name].items()
    found = named_blocks(model)
    assert [block for _, block in found] == list(getattr(model, path))
    assert {(one.rsplit(".", 1)[0], type(block).__name__) for one, block in found} == {(path, cls)}


@pytest.mark.parametrize(("name", "depth"), [("sd15", 1), ("sdxl", 2)])
def test_blocks_of_a_unet(name: str, depth: int) -> None:
    """Attention's and ResNets', on every level, none inside another."""
    found = named_blocks(network(name))
    kinds = [type(block).__name__ for _, block in found]
    assert kinds.count("BasicTransformerBlock") == 4 * depth and kinds.count("ResnetBlock2D") == 8
    assert len({id(p) for _, block in found for p in block.parameters()}) == sum(
        len(list(block.parameters())) for _, block in found
    )


def compiled(name: str, kind: Any, way: Any, backend: str) -> tuple[Networks, Compilations]:
    networks = moved(make_networks(denoiser(name), kind=kind, lora_rank=2))
    compilations = Compilations(compile_bound(networks.roles), backend)
    for model in networks.models():
        apply_checkpointing(model, way)
        compile_blocks(model, compilations)
    return networks, compilations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "way", "backend"),
    [
        ("pixart_alpha", "lora", "block", "aot_eager"),
        ("sd15", "lora", "none", "eager"),
        ("sd35", "lora", "none", "eager"),
        ("cogvideox_5b", "lora", "selective", "aot_eager"),
        ("wan", "full", "none", "eager"),
    ],
)
def test_nothing_compiles_after_the_warm_up(name: str, kind: Any, way: Any, backend: str) -> None:
    torch._dynamo.reset()
    networks, compilations = compiled(name, kind, way, backend)
    plain = moved(make_networks(denoiser(name), kind=kind, lora_rank=2))
    warm_up(compilations, networks.roles, *example(name, 1)[::2])
    assert 0 < compilations.count <= compilations.bound.total
    with torch.compiler.set_stance("fail_on_recompile"):
        for role in ("student", "fake"):
            assert_near(gradients(networks, name, role), gradients(plain, name, role))
        with torch.no_grad():
            for batch in (1, 3):
                given = example(name, batch)
                assert_near([role(*given) for role in networks.roles], [role(*given) for role in plain.roles])
    assert compilations.after_warm_up == 0


@torch.no_grad()
@pytest.mark.parametrize("name", families(*SLOW_FAMILIES, "sd15", "sd3", "cogvideox_5b"))
def test_blocks_compile_whole(name: str) -> None:
    """No graph breaks, and the bound holds, in a forward of a batch."""
    torch._dynamo.reset()
    networks, compilations = compiled(name, "full", "none", "eager")
    expected = moved(make_networks(denoiser(name))).roles.student(*example(name, 2))
    assert_near([networks.roles.student(*example(name, 2))], [expected])
    of_student = compilations.bound.blocks["student without gradient"]
    assert 0 < compilations.count <= of_student


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_inductor_rounds_as_eager_does(name: str) -> None:
    torch._dynamo.reset()
    networks, _ = compiled(name, "full", "none", "inductor")
    plain = moved(make_networks(denoiser(name)))
    assert_near(gradients(networks, name, "student"), gradients(plain, name, "student"), rtol=1e-3, atol=1e-5)


def on_a_rank(name: str, config: TrainConfig, iterations: int, folder: Path) -> Any:
    with joined(CPU) as ranks:
        state, rows = iterate(name, config, iterations, ranks, folder)
        collected = collect(state.networks, state.student_weights, ranks)
        if collected is None:
            return rows, None
        student = state.networks.student_network(collected.weights, base=collected.base)
        return rows, CONFIGS[name][0](student, schedule(name))(*example(name, 2))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wan", "lora"),
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name, kind in [
                *(("pixart_alpha", "full"), ("sdxl", "full"), ("sd15", "lora")),
                *(("sd35", "full"), ("cogvideox_5b", "full")),
            ]
        ),
    ],
)
def test_two_ranks_are_one(name: str, kind: Any, tmp_path: Path) -> None:
    """Every rank reads its shards, positions included, and the student that is collected is the whole one's."""
    network(name).save_pretrained(tmp_path)
    config = with_flags(CONFIG, roles=kind, lora_rank=2, learning_rate=2e-5)
    alone, wanted = iterate(name, config, 3)
    results = run_ranks(2, on_a_rank, name, config, 3, tmp_path)
    for rows, _ in results:
        for key in ("loss_fake", "loss_student"):
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in wanted], rel=1e-5)
    student = CONFIGS[name][0](alone.networks.student_network(alone.student_weights), schedule(name))
    torch.testing.assert_close(results[0][1], student(*example(name, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_in_bf16(kind: Any, tmp_path: Path) -> None:
    """Shards of a frozen network of two dtypes, and of a trained one that is gathered in bf16: at most twice as far
    from fp32's losses as one rank is, plus what bf16 rounds a loss's own number by."""
    network("wan").save_pretrained(tmp_path)
    config = with_flags(CONFIG, roles=kind, lora_rank=2, mixed_precision="bf16")
    _, exact = iterate("wan", with_flags(config, mixed_precision="no"), 2)
    _, alone = iterate("wan", config, 2)

    def error(rows: list[dict[str, float]]) -> float:
        return max(abs(row["loss_fake"] / wanted["loss_fake"] - 1) for row, wanted in zip(rows, exact, strict=True))

    for rows, _ in run_ranks(2, on_a_rank, "wan", config, 2, tmp_path):
        assert error(rows) <= 2 * error(alone) + torch.finfo(torch.bfloat16).eps


def test_context_parallel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "context_group", object())
    monkeypatch.setattr(Ranks, "context", 2)
    with pytest.raises(ValueError, match="--context_parallel 2: a WanTransformer3DModel cannot split a sample's"):
        make_state(denoiser("wan"), CONFIG)


def load_adapter(model: Any, folder: Path, part: str) -> None:
    """As a user of the stock class does: by diffusers, or by peft where the class has nothing for it."""
    if hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(folder, prefix=part, use_safetensors=True)
        return
    with safe_open(folder / ADAPTER, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    inject_adapter_in_model(LoraConfig(**{key.removeprefix(f"{part}."): v for key, v in settings.items()}), model)
    weights = {key.removeprefix(f"{part}."): value for key, value in load_file(folder / ADAPTER).items()}
    assert not set_peft_model_state_dict(model, weights).unexpected_keys


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapters_file_loads_into_the_stock_network(name: str, tmp_path: Path) -> None:
    networks = moved(make_networks(denoiser(name), kind="lora", lora_rank=3, lora_alpha=5.0))
    (tmp_path / ADAPTER).write_bytes(networks.lora_file())
    part = "unet" if name in ("sd15", "sdxl") else "transformer"
    assert all(key.startswith(f"{part}.") for key in load_file(tmp_path / ADAPTER))
    stock = network(name)
    load_adapter(stock, tmp_path, part)
    given = example(name, 2)
    student = networks.roles.student(*given)
    for other in (stock, networks.student_network()):
        torch.testing.assert_close(CONFIGS[name][0](other, schedule(name))(*given), student, rtol=1e-4, atol=1e-5)
    assert float((student - networks.roles.teacher(*given)).abs().mean()) > 0.01


def test_adapters_are_on_attention_and_feed_forward() -> None:
    wanted = {
        "wan": ("attn1.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"),
        "sd35": ("attn.add_k_proj", "attn2.to_q", "ff.net.2", "ff_context.net.0.proj"),
        "sdxl": ("attn1.to_q", "attn2.to_v", "ff.net.0.proj"),
    }
    for name, linears in wanted.items():
        adapters = make_networks(denoiser(name), kind="lora", lora_rank=2).adapters
        assert adapters is not None
        blocks = tuple(path for path, _ in named_blocks(adapters.model))
        assert all(path.startswith(blocks) for path in adapters.layers)
        for linear in linears:
            assert any(path.endswith(f".{linear}") for path in adapters.layers), linear


@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_keeps_in_fp32_stays_in_it(kind: Any) -> None:
    networks = make_networks(denoiser("wan"), kind=kind, lora_rank=2, teacher_dtype=torch.bfloat16)
    kept = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "rope")
    model = networks.roles.teacher.model
    frozen = {path: p for path, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    for path, tensor in frozen.items():
        wide = not set(kept).isdisjoint(path.split("."))
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), path
    assert {p.dtype for p in networks.trainable("student").values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_at_most_twice_as_far_off_as_diffusers_own(kind: Any, tmp_path: Path) -> None:
    """The frozen Wan in bf16 but for its fp32 parts, autocast around the rest; diffusers' computes all in bf16."""
    state, rows = iterate("wan", with_flags(CONFIG, roles=kind, lora_rank=2, mixed_precision="bf16"), 2)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    network("wan").save_pretrained(tmp_path)
    stock = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    x, t, given = example("wan", 2)

    def predicted(model: nn.Module, dtype: torch.dtype) -> Tensor:
        text = Conditioning({name: tensor.to(dtype) for name, tensor in given.tensors.items()})
        return WanDenoiser(model, schedule("wan"))(x.to(dtype), t, text).double()

    with torch.no_grad():
        exact, theirs = predicted(network("wan").double(), torch.float64), predicted(stock, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            ours = predicted(state.networks.roles.teacher.model, torch.float32)
    assert 0 < (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("name", [pytest.param("sdxl", marks=pytest.mark.slow), "wan"])
def test_operations_are_counted_before_a_run(name: str) -> None:
    costs = measure_costs(CONFIG, denoiser(name), prompts_of(name), [latent_shape(name)])[0]
    assert costs.student == costs.fake and costs.teacher.forward == costs.student.forward > 0
    assert costs.student.trained > 2 * costs.student.forward


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart_alpha", "sdxl", "sd3", "cogvideox_5b", "wan"])
def test_memory_is_told_before_a_run(name: str) -> None:
    teacher, cache, shapes = denoiser(name), prompts_of(name), [latent_shape(name)]
    found = {kind: estimate_run(with_flags(CONFIG, roles=kind, lora_rank=2), teacher, cache, shapes) for kind in KINDS}
    assert found["full"].peak > found["full"].state > found["lora"].state > 0
    assert all(type(parameter) is nn.Parameter for parameter in teacher.parameters())
