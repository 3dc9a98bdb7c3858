"""Roles as three networks or as two adapters on one: alone with their updates, told K, saved for others to load."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError, checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from torch.utils.flop_counter import FlopCounterMode

from tdm_fast import distill
from tdm_fast.distill import TDMConfig
from tdm_fast.models import OpenSoraT2V_v1_3
from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.models.loading import load_pipeline
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.models.roles import Networks, StepsEmbedding, make_networks, role_context, tell
from tdm_fast.schedule import Schedule

KINDS = ("full", "lora")
RANK, ALPHA = 3, 5.0
UNIFY = (1, 2, 4)
NODES = {1: (899,), 2: (899, 449), 4: (899, 674, 449, 224)}
BATCH = 3
ADAPTER, BIASES = "pytorch_lora_weights.safetensors", "num_steps.safetensors"


def make_teacher(folder: Path, dtype: torch.dtype = torch.float64) -> Denoiser:
    return load_pipeline(folder).denoiser.to(dtype)


def randomise(networks: Networks, roles: tuple[str, ...] = ("student", "fake")) -> None:
    """Move both roles away from the teacher, as training does: B and what is told of K are zero at first."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for role in roles:
            for parameter in networks.trainable(role).values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def make_lora(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Networks:
    networks = make_networks(
        make_teacher(folder, dtype), kind="lora", lora_rank=RANK, lora_alpha=ALPHA, teacher_dtype=None, **options
    )
    randomise(networks)
    return networks


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(BATCH, 8, 2, 4, 4, generator=generator, dtype=dtype)
    text = torch.randn(BATCH, 5, 8, generator=generator, dtype=dtype)
    return latents, torch.tensor([20, 500, 998]), Conditioning({"encoder_hidden_states": text})


def losses(networks: Networks, role: str) -> Tensor:
    """The loss of one role's update, as the distillation computes it."""
    latents, _, conditioning = inputs(next(networks.roles.teacher.model.parameters()).dtype)
    roles: Any = networks.roles
    config = TDMConfig(seed=2)
    draws = distill.draw(config, BATCH, 7)
    rolled = distill.rollout(roles.student, latents, conditioning, roles.student.schedule, config, draws)
    if role == "fake":
        return distill.fake_loss(roles, rolled, conditioning, config, draws, 7)
    negative = Conditioning({"encoder_hidden_states": -conditioning.tensors["encoder_hidden_states"][:1, :2]})
    return distill.student_loss(roles, rolled, conditioning, negative, config, draws, 7)


def gradients(networks: Networks, role: str) -> dict[str, Tensor]:
    losses(networks, role).backward()
    found = {name: parameter.grad for name, parameter in networks.trainable(role).items()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_rounding(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for rounding, of which the way through some networks and back has some hundred."""
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).norm()) <= 2000 * torch.finfo(ours.dtype).eps * float(theirs.norm())


def every_tensor(networks: Networks) -> dict[str, Tensor]:
    """A copy of every parameter of all networks: those of the two roles, and the frozen ones."""
    tensors = {f"{role}:{name}": p for role in ("student", "fake") for name, p in networks.trainable(role).items()}
    frozen = [p for model in networks.models() for p in model.parameters() if not p.requires_grad]
    tensors |= {f"frozen:{index}": parameter for index, parameter in enumerate(frozen)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("unify", [None, UNIFY])
@pytest.mark.parametrize("kind", KINDS)
def test_all_roles_start_as_the_teacher(tiny_teacher: Path, kind: Any, unify: Any) -> None:
    latents, t, conditioning = inputs(torch.float32)
    original = make_teacher(tiny_teacher, torch.float32)
    expected = original(latents, t, conditioning)
    networks = make_networks(make_teacher(tiny_teacher, torch.float32), kind=kind, lora_rank=RANK, unify=unify)
    told = tell(conditioning, 2) if unify else conditioning
    assert torch.equal(networks.roles.teacher(latents, t, conditioning), expected)
    assert torch.equal(networks.roles.student(latents, t, told), expected)
    assert torch.equal(networks.roles.fake(latents, t, told), expected)
    randomise(networks)
    outputs = [networks.roles.student(latents, t, told), networks.roles.fake(latents, t, told)]
    assert torch.equal(networks.roles.teacher(latents, t, conditioning), expected)
    for left, right in ((outputs[0], outputs[1]), (outputs[0], expected), (outputs[1], expected)):
        assert float((left - right).detach().abs().mean()) > 0.01
    assert len(networks.models()) == len({id(model) for model in networks.models()}) == (3 if kind == "full" else 1)
    assert networks.trainable("student").keys() == networks.trainable("fake").keys()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["student", "fake"])
def test_an_update_changes_its_own_role_alone(tiny_teacher: Path, kind: Any, role: str, checkpointing: bool) -> None:
    networks = make_networks(make_teacher(tiny_teacher), kind=kind, lora_rank=RANK)
    randomise(networks)
    if checkpointing:
        for model in networks.models():
            model.enable_gradient_checkpointing()  # type: ignore[operator]
    before = every_tensor(networks)
    optimizer = torch.optim.AdamW(networks.trainable(role).values(), lr=1e-3)
    losses(networks, role).backward()
    optimizer.step()
    after = every_tensor(networks)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{role}:{name}" for name in networks.trainable(role)}
    other = "fake" if role == "student" else "student"
    assert all(parameter.grad is None for parameter in networks.trainable(other).values())
    assert any(name.startswith("frozen:") for name in before)


def save_matmuls(_context: object, op: object, *_args: object, **_kwargs: object) -> bool:
    return op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, save_matmuls)


def wrap_blocks(model: Any, context_fn: Callable[[], Any]) -> None:
    """Checkpoint every block's forward, as `parallel` does."""
    for block in model.transformer_blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=context_fn)


@pytest.mark.parametrize("role", ["student", "fake"])
@pytest.mark.parametrize("way", ["diffusers", "turned on before", "block", "selective"])
def test_recomputed_blocks_have_the_adapter_of_their_forward(tiny_teacher: Path, way: str, role: str) -> None:
    plain = gradients(make_lora(tiny_teacher), role)
    teacher = make_teacher(tiny_teacher)
    model: Any = teacher.model
    if way == "turned on before":
        model.enable_gradient_checkpointing()
    networks = make_networks(teacher, kind="lora", lora_rank=RANK, lora_alpha=ALPHA)
    randomise(networks)
    if way == "diffusers":
        model.enable_gradient_checkpointing()
    elif way in ("block", "selective"):
        wrap_blocks(model, role_context(model, SELECTIVE if way == "selective" else noop_context_fn))
    for name, gradient in gradients(networks, role).items():
        assert_rounding(gradient, plain[name])


def test_without_the_context_a_recomputed_block_has_the_wrong_adapter(tiny_teacher: Path) -> None:
    networks = make_lora(tiny_teacher)
    wrap_blocks(networks.models()[0], noop_context_fn)
    with pytest.raises(CheckpointError):
        losses(networks, "student").backward()


def test_a_graph_can_be_recomputed_twice(tiny_teacher: Path) -> None:
    networks = make_lora(tiny_teacher)
    networks.models()[0].enable_gradient_checkpointing()  # type: ignore[operator]
    loss = losses(networks, "student")
    once = torch.autograd.grad(loss, list(networks.trainable("student").values()), retain_graph=True)
    twice = torch.autograd.grad(loss, list(networks.trainable("student").values()))
    assert all(torch.equal(left, right) for left, right in zip(once, twice, strict=True))


def test_a_model_without_adapters_keeps_its_contexts() -> None:
    contexts = noop_context_fn()
    assert role_context(nn.Linear(1, 1), lambda: contexts)() is not None
    assert role_context(nn.Linear(1, 1), lambda: contexts)() == contexts


@pytest.mark.parametrize("role", ["student", "fake"])
def test_gradients_are_those_of_merged_weights_by_the_chain_rule(tiny_teacher: Path, role: str) -> None:
    """W' = W + s B A, so dA = s B^T dW' and dB = s dW' A^T."""
    networks = make_lora(tiny_teacher)
    ours = gradients(networks, role)
    assert networks.adapters is not None
    student, fake = (copy.deepcopy(make_teacher(tiny_teacher)) for _ in range(2))
    for name, denoiser in (("student", student), ("fake", fake)):
        denoiser.model.load_state_dict(networks.adapters.merged_state(networks.trainable(name)))
    merged = Networks(networks.roles._replace(student=student, fake=fake))
    trained = getattr(merged.roles, role).model.requires_grad_(True)
    losses(merged, role).backward()
    weights, scaling = networks.trainable(role), ALPHA / RANK
    for path in {name.split(".lora_")[0] for name in ours}:
        gradient = trained.get_parameter(f"{path}.weight").grad
        down, up = weights[f"{path}.lora_A.weight"].detach(), weights[f"{path}.lora_B.weight"].detach()
        assert_rounding(ours[f"{path}.lora_A.weight"], scaling * up.T @ gradient)
        assert_rounding(ours[f"{path}.lora_B.weight"], scaling * gradient @ down.T)
    assert len(ours) == 2 * 10 * 3


def test_adapters_are_seeded_and_their_gradients_never_turned_off(tiny_teacher: Path) -> None:
    first, second = make_teacher(tiny_teacher), make_teacher(tiny_teacher)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    one = make_networks(first, kind="lora", lora_rank=RANK, seed=4).trainable("student")
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    other = make_networks(second, kind="lora", lora_rank=RANK, seed=4).trainable("student")
    assert all(torch.equal(left, right) for left, right in zip(one.values(), other.values(), strict=True))

    networks = make_lora(tiny_teacher)
    assert networks.adapters is not None
    trained = [p for role in ("student", "fake") for p in networks.trainable(role).values()]
    for name in ("student", "fake", None):
        networks.adapters.activate(name)
        assert all(parameter.requires_grad for parameter in trained)


def test_compiled_blocks_are_compiled_once_for_each_role(tiny_teacher: Path) -> None:
    """A second iteration makes no more graphs than the first, none is broken, and outputs are those of eager blocks."""
    networks = make_lora(tiny_teacher)
    latents, t, conditioning = inputs()
    eager = [role(latents, t, conditioning).detach() for role in networks.roles]
    model: Any = networks.models()[0]
    counters.clear()
    made = []
    with torch._dynamo.config.patch(recompile_limit=64):
        for block in model.transformer_blocks:
            block.compile(backend="eager", fullgraph=True, dynamic=False)
        for _ in range(2):
            for role, expected in zip(networks.roles, eager, strict=True):
                output = role(latents, t, conditioning)
                assert_rounding(output, expected)
                if output.requires_grad:
                    output.sum().backward()
            made.append(counters["stats"]["unique_graphs"])
    assert 0 < made[0] == made[1]


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_frozen_weights(tiny_teacher: Path, kind: Any) -> None:
    """bf16 teacher, fp32 latents: the teacher is the cast original, what trains stays fp32, losses are fp32."""
    latents, t, conditioning = inputs(torch.float32)
    original = make_teacher(tiny_teacher, torch.bfloat16)
    teacher = make_teacher(tiny_teacher, torch.float32)
    networks = make_networks(teacher, kind=kind, lora_rank=RANK, teacher_dtype=torch.bfloat16, unify=UNIFY)
    output = networks.roles.teacher(latents, t, conditioning)
    assert output.dtype == torch.bfloat16 and torch.equal(output, original(latents, t, conditioning))
    assert not any(parameter.requires_grad for parameter in original.parameters())
    assert {p.dtype for role in ("student", "fake") for p in networks.trainable(role).values()} == {torch.float32}
    student = networks.roles.student(latents, t, tell(conditioning, 2))
    assert student.dtype == (torch.float32 if kind == "full" else torch.bfloat16)
    student.float().square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in networks.trainable("student").values())


def test_adapters_keep_no_wide_copy_of_narrow_activations(tiny_teacher: Path) -> None:
    networks = make_networks(
        make_teacher(tiny_teacher, torch.float32), kind="lora", lora_rank=RANK, teacher_dtype=torch.bfloat16
    )
    saved: list[Tensor] = []
    block: Any = networks.models()[0].transformer_blocks[0].ff  # type: ignore[index, union-attr]
    x = torch.randn(2, 7, 12, dtype=torch.bfloat16)
    assert networks.adapters is not None
    networks.adapters.activate("student")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        block(x).sum()
    activations = [tensor for tensor in saved if tensor.numel() >= x.numel() and 7 in tensor.shape]
    assert activations and all(tensor.dtype == torch.bfloat16 for tensor in activations)


def test_a_denoiser_gives_any_network_its_own_dtype() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return self.linear(x + text)

    teacher = Denoiser(Network(), Schedule.ddpm(prediction_type="epsilon"))
    networks = make_networks(teacher, teacher_dtype=torch.bfloat16)
    text = Conditioning({"text": torch.ones(2, 3)})
    outputs = [role(torch.ones(2, 3), torch.tensor([3, 4]), text) for role in networks.roles]
    assert [output.dtype for output in outputs] == [torch.float32, torch.bfloat16, torch.float32]
    with pytest.raises(ValueError, match=r"Network has no blocks with linears named attn"):
        make_networks(teacher, kind="lora")
    with pytest.raises(ValueError, match=r"unify: a .* cannot be told its number of steps; leave it out"):
        make_networks(teacher, unify=UNIFY)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_of_k_is_folded_into_a_bias(tiny_teacher: Path, kind: Any) -> None:
    networks = make_networks(make_teacher(tiny_teacher), kind=kind, lora_rank=RANK, lora_alpha=ALPHA, unify=(4, 1, 2))
    randomise(networks)
    latents, t, conditioning = inputs()
    mixed = Conditioning({**conditioning.tensors, "num_steps": torch.tensor([4, 1, 2])})
    assert networks.unify == UNIFY
    outputs = []
    for k in UNIFY:
        told = networks.roles.student(latents, t, tell(conditioning, k))
        plain = OpenSoraDenoiser(networks.student_network(num_steps=k), networks.roles.student.schedule)
        assert_rounding(plain(latents, t, conditioning), told)
        outputs.append(told)
    assert float((outputs[0] - outputs[1]).detach().abs().mean()) > 0.01
    expected = torch.stack([outputs[2][0], outputs[0][1], outputs[1][2]])
    assert_rounding(networks.roles.student(latents, t, mixed), expected)
    greatest = OpenSoraDenoiser(networks.student_network(), networks.roles.student.schedule)
    assert_rounding(greatest(latents, t, conditioning), outputs[2])


@pytest.mark.parametrize("kind", KINDS)
def test_each_role_learns_what_it_is_told(tiny_teacher: Path, kind: Any) -> None:
    networks = make_networks(make_teacher(tiny_teacher), kind=kind, lora_rank=RANK, unify=UNIFY)
    latents, t, conditioning = inputs()
    for role in ("student", "fake"):
        getattr(networks.roles, role)(latents, t, tell(conditioning, 2)).square().sum().backward()
        gradient = networks.trainable(role)["steps_embedding.weight"].grad
        assert gradient is not None and [bool(row.any()) for row in gradient] == [False, True, False]
    left, right = (networks.trainable(role)["steps_embedding.weight"] for role in ("student", "fake"))
    assert left is not right


def test_numbers_of_steps_that_are_not_known_are_refused(tiny_teacher: Path) -> None:
    networks = make_networks(make_teacher(tiny_teacher), kind="lora", lora_rank=RANK, unify=UNIFY)
    latents, t, conditioning = inputs()
    with pytest.raises(ValueError, match="num_steps is 3; this student was made for 1, 2, 4"):
        networks.roles.student(latents, t, tell(conditioning, 3))
    with pytest.raises(ValueError, match="encoder_hidden_states; this network is told its number of steps, so num_ste"):
        networks.roles.student(latents, t, conditioning)
    with pytest.raises(ValueError, match="num_steps is 8; this student was made for 1, 2, 4"):
        networks.student_network(num_steps=8)


def test_where_looking_would_stall_an_unknown_number_of_steps_gives_nan() -> None:
    embedding = StepsEmbedding(UNIFY, 2, torch.float32, torch.device("cpu"))
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    vectors = compiled(torch.tensor([4, 3, 1]))
    assert vectors.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


@pytest.mark.parametrize("unify", [None, UNIFY])
def test_diffusers_loads_the_adapter_into_the_teacher(tiny_teacher: Path, tmp_path: Path, unify: Any) -> None:
    networks = make_lora(tiny_teacher, unify=unify)
    latents, t, conditioning = inputs()
    for k in unify or (None,):
        (tmp_path / ADAPTER).write_bytes(networks.lora_file(num_steps=k))
        plain = make_teacher(tiny_teacher)
        plain.model.load_lora_adapter(tmp_path, use_safetensors=True)  # type: ignore[operator]
        told = conditioning if k is None else tell(conditioning, k)
        assert_rounding(plain(latents, t, conditioning), networks.roles.student(latents, t, told))
    with safe_open(tmp_path / ADAPTER, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
        assert settings["transformer.r"] == settings["transformer.lora_alpha"] == RANK
        assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in opened.keys()  # noqa: SIM118


class LTXDenoiser(Denoiser):
    """A transformer of diffusers itself, which takes tokens `[B, N, C]`."""

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning.tensors["encoder_hidden_states"]
        tokens = x_t.flatten(2).transpose(1, 2)
        mask = torch.ones(text.shape[:2], dtype=torch.int64)
        sizes = dict(zip(("num_frames", "height", "width"), x_t.shape[2:], strict=True))
        output = self.model(tokens, text, timestep, mask, **sizes, return_dict=False)[0]
        return output.transpose(1, 2).reshape(x_t.shape)


def make_ltx() -> LTXVideoTransformer3DModel:
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=8,
    ).double()  # fmt: skip


def test_adapters_trained_on_a_stock_transformer_load_there(tmp_path: Path) -> None:
    schedule = Schedule.flow(shift=3.0)
    networks = make_networks(LTXDenoiser(make_ltx(), schedule), kind="lora", lora_rank=RANK, lora_alpha=ALPHA)
    optimizer = torch.optim.AdamW(networks.trainable("student").values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        losses(networks, "student").backward()
        optimizer.step()
    latents, t, conditioning = inputs()
    trained = networks.roles.student(latents, t, conditioning)
    (tmp_path / ADAPTER).write_bytes(networks.lora_file())
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipeline = LTXPipeline(transformer=make_ltx(), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipeline.load_lora_weights(tmp_path)
    assert_rounding(LTXDenoiser(pipeline.transformer, schedule)(latents, t, conditioning), trained)
    assert_rounding(LTXDenoiser(networks.student_network(), schedule)(latents, t, conditioning), trained)
    original = LTXDenoiser(make_ltx().requires_grad_(False), schedule)(latents, t, conditioning)
    assert torch.equal(networks.roles.teacher(latents, t, conditioning), original)
    assert float((trained - original).detach().abs().mean()) > 0.01


@pytest.mark.parametrize("unify", [None, UNIFY])
@pytest.mark.parametrize(("kind", "lora_save"), [("full", "merged"), ("lora", "merged"), ("lora", "adapter")])
def test_a_students_folder_samples_by_itself(
    tiny_teacher: Path, tmp_path: Path, kind: Any, lora_save: Any, unify: Any
) -> None:
    networks = make_networks(
        make_teacher(tiny_teacher, torch.float32), kind=kind, lora_rank=RANK, lora_alpha=ALPHA, unify=unify
    )
    randomise(networks)
    average = {name: (0.9 * value).detach() for name, value in networks.trainable("student").items()}
    networks.save(
        tmp_path / "student", tiny_teacher, NODES if unify else NODES[4], weights=average, lora_save=lora_save
    )
    networks.load("student", average)
    pipeline = load_pipeline(tmp_path / "student")
    latents, t, conditioning = inputs(torch.float32)
    assert pipeline.timesteps == NODES[4]
    for k in unify or ():
        pipeline.set_num_steps(k)
        assert pipeline.timesteps == NODES[k]
        told = networks.roles.student(latents, t, tell(conditioning, k))
        assert_rounding(pipeline.denoiser(latents, t, conditioning), told)
    if unify is None:
        assert_rounding(pipeline.denoiser(latents, t, conditioning), networks.roles.student(latents, t, conditioning))
    assert (tmp_path / "student" / ADAPTER).exists() == (kind == "lora")
    assert not any(p.requires_grad for p in pipeline.denoiser.parameters())
    known = "1, 2, 4" if unify else "4"
    with pytest.raises(ValueError, match=f"num_steps is 3; .*student holds a model for {known}"):
        pipeline.set_num_steps(3)


def edit(folder: Path, **values: object) -> None:
    path = folder / "few_step.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / ADAPTER).unlink(), f"half-written: {ADAPTER} missing"),
        (lambda f: (f / BIASES).unlink(), f"half-written: {BIASES} missing"),
        (lambda f: cut(f / ADAPTER), f"{ADAPTER} is damaged or half-written"),
        (lambda f: cut(f / BIASES), f"{BIASES} is damaged or half-written"),
        (lambda f: edit(f, adapter="../x"), "few_step.json is damaged: its adapter is ../x"),
        (lambda f: edit(f, adapter=3), "few_step.json is damaged: its adapter is 3"),
        (lambda f: edit(f, num_steps=[4]), r"few_step.json is damaged: its num_steps are \[4\]"),
        (lambda f: edit(f, num_steps={"4": [1000]}), r"few_step.json is damaged: its timesteps are \[1000\]"),
        (lambda f: edit(f, num_steps={"8": [899]}), f"{BIASES} has shape None for 8 steps"),
        (
            lambda f: rewrite(f / BIASES, lambda t: {k: v[:2] for k, v in t.items()}),
            r"has shape torch.Size\(\[2\]\) for",
        ),
        (lambda f: rewrite(f / ADAPTER, lambda t: {"x": t.popitem()[1]}), "is of another network: it adapts x"),
        (lambda f: rewrite(f / ADAPTER, lambda t: {}), "is of another network: it adapts nothing"),
        (
            lambda f: rewrite(f / ADAPTER, lambda t: {k: v[..., :2].contiguous() for k, v in t.items()}),
            "is of another network: .*size mismatch",
        ),
    ],
)
def test_a_spoilt_student_is_refused(
    tiny_teacher: Path, tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    networks = make_lora(tiny_teacher, torch.float32, unify=UNIFY)
    networks.save(tmp_path / "student", tiny_teacher, NODES, lora_save="adapter")
    load_pipeline(tmp_path / "student")
    spoil(tmp_path / "student")
    with pytest.raises(ValueError, match=f"(?s){says}"):
        load_pipeline(tmp_path / "student")


def test_weights_can_be_copied(tiny_teacher: Path) -> None:
    networks = make_lora(tiny_teacher)
    latents, t, conditioning = inputs()
    zero = {name: torch.zeros_like(value) for name, value in networks.trainable("student").items()}
    networks.load("student", zero)
    teacher = networks.roles.teacher(latents, t, conditioning)
    assert torch.equal(networks.roles.student(latents, t, conditioning), teacher)
    zero["odd"] = zero.pop(next(iter(zero)))
    with pytest.raises(ValueError, match="the weights are of another student: 2 names differ, odd first"):
        networks.load("student", zero)
    with pytest.raises(ValueError, match="role is 'teacher'; student and fake train"):
        networks.trainable("teacher")


def test_an_adapter_costs_its_two_products(tiny_teacher: Path) -> None:
    """Forward: 2 r (in + out) a token for each adapted linear, text's own tokens for what reads the text."""
    networks = make_lora(tiny_teacher)
    latents, t, conditioning = inputs()

    def flops(role: Denoiser) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            role(latents, t, conditioning)
        return counter.get_total_flops()

    video, text = BATCH * 2 * 2 * 2, BATCH * 5
    expected = 0
    assert networks.adapters is not None
    for path, layer in networks.adapters.layers.items():
        tokens = text if path.endswith(("attn2.to_k", "attn2.to_v")) else video
        expected += 2 * RANK * tokens * (layer.in_features + layer.out_features)
    assert flops(networks.roles.student) - flops(networks.roles.teacher) == expected


@pytest.mark.parametrize(
    ("kind", "independent", "shared"), [("full", 11.75, 10.5), ("lora", 11.0, 9.66)], ids=["full", "lora"]
)
def test_what_an_iteration_of_four_steps_costs(kind: Any, independent: float, shared: float) -> None:
    """In forwards of the teacher, on a model of 47M parameters, for rank 32 and math attention; nothing is computed.

    A frozen base needs the gradients of its inputs alone: about 1 F of backward instead of 2, and the adapters' own.
    """
    with torch.device("meta"):
        model = OpenSoraT2V_v1_3(
            num_layers=12, num_attention_heads=10, attention_head_dim=48, in_channels=8, out_channels=8, patch_size=2,
            caption_channels=512, activation_fn="gelu-approximate", sparse1d=True, sparse_n=2,
        )  # fmt: skip
        arguments = (torch.empty(1, 8, 8, 32, 32), torch.empty(1, dtype=torch.int64))
        conditioning = Conditioning({"encoder_hidden_states": torch.empty(1, 64, 512)})
    schedule = Schedule.ddpm(prediction_type="v_prediction")
    roles = make_networks(OpenSoraDenoiser(model, schedule), kind=kind, lora_rank=32).roles

    def cost(role: Denoiser) -> tuple[int, int]:
        """FLOPs of a forward and of its backward."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
            output = role(*arguments, conditioning)
        with FlopCounterMode(display=False) as backward:
            if output.requires_grad:
                output.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    unit, _ = cost(roles.teacher)
    (student, student_backward), (fake, fake_backward) = cost(roles.student), cost(roles.fake)
    updates = student + student_backward + 2 * fake + fake_backward + 2 * unit
    assert 2.75 * student + updates == pytest.approx(independent * unit, rel=0.02)
    assert 1.5 * student + updates == pytest.approx(shared * unit, rel=0.02)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "lora "}, "kind is 'lora '; it is full"),
        ({"lora_rank": 0}, "lora_rank is 0; it takes a whole number of at least 1"),
        ({"lora_rank": True}, "lora_rank is True"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0; it takes a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"teacher_dtype": "bf16"}, "teacher_dtype is 'bf16'; it is a torch.dtype"),
        ({"teacher_dtype": torch.int8}, "teacher_dtype is torch.int8; weights are floating-point"),
        ({"unify": ()}, r"unify is \(\); it takes different numbers of steps above 0"),
        ({"unify": (1, 1)}, r"unify is \(1, 1\)"),
        ({"unify": (0, 4)}, r"unify is \(0, 4\)"),
    ],
)
def test_roles_that_cannot_work_are_refused(tiny_teacher: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_networks(make_teacher(tiny_teacher), **options)


def test_what_cannot_be_saved_or_adapted_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    full, lora = make_networks(make_teacher(tiny_teacher)), make_lora(tiny_teacher, unify=UNIFY)
    with pytest.raises(ValueError, match="lora_save is adapter, but the roles are full"):
        full.save(tmp_path / "student", tiny_teacher, NODES[4], lora_save="adapter")
    with pytest.raises(ValueError, match="lora_save is 'lora'; it is merged or adapter"):
        lora.save(tmp_path / "student", tiny_teacher, NODES, lora_save="lora")  # type: ignore[arg-type]
    for networks, nodes, wanted in (
        (full, NODES, "one list of nodes"),
        (lora, NODES[4], "a list for each of 1, 2, 4"),
        (lora, {4: NODES[4]}, "a list for each of 1, 2, 4"),
    ):
        with pytest.raises(ValueError, match=f"this student takes {wanted}"):
            networks.save(tmp_path / "student", tiny_teacher, nodes)  # type: ignore[arg-type]
    assert not (tmp_path / "student").exists()
    with pytest.raises(ValueError, match=r"the network has adapters already \(student, fake\)"):
        make_networks(lora.roles.teacher, kind="lora")


def test_added_time_embeddings_leave_a_network_that_has_none_as_it_was(tiny_teacher: Path) -> None:
    model = make_teacher(tiny_teacher).model
    assert isinstance(model, OpenSoraT2V_v1_3)
    latents, t, conditioning = inputs()
    arguments = (latents, t, conditioning.tensors["encoder_hidden_states"].unsqueeze(1))
    plain, added = model(*arguments).sample, model(*arguments, added_time_embedding=torch.zeros(BATCH, 12)).sample
    assert torch.equal(plain, added)
