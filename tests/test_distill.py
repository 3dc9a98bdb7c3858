"""The fast iteration against the plain one: same draws, same losses, same gradients, fewer forwards."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdm_fast import distill, reference
from tdm_fast.distill import Draws, Intervals, Roles, TDMConfig
from tdm_fast.models.denoiser import Conditioning, Denoiser, ForwardCount, count_forwards
from tdm_fast.philox import randn
from tdm_fast.schedule import Schedule

SCHEDULES = {
    "epsilon": Schedule.ddpm(prediction_type="epsilon"),
    "v_prediction": Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": Schedule.flow(shift=3.0),
}
SHAPE = (2, 3, 3)
ITERATION, OFFSET = 17, 40
ROUNDINGS = 32


class TinyNetwork(nn.Module):
    """Two layers on the latents, the time and the mean of the kept tokens."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        size = math.prod(SHAPE)
        self.inner, self.outer = nn.Linear(size + 2 + 3, 16), nn.Linear(16, size)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)

    def forward(
        self, x_t: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None
    ) -> Tensor:
        if encoder_attention_mask is None:
            encoder_attention_mask = torch.ones_like(encoder_hidden_states[..., 0])
        kept = encoder_attention_mask.to(x_t.dtype)[..., None]
        text = (kept * encoder_hidden_states).sum(1) / kept.sum(1)
        phase = timestep.to(x_t.dtype)[:, None] / 150
        inputs = torch.cat((x_t.flatten(1), phase.sin(), phase.cos(), text), dim=1)
        return self.outer(torch.tanh(self.inner(inputs))).view_as(x_t)


def make_roles(schedule: Schedule, dtype: torch.dtype) -> Roles:
    """Three networks near each other, as in training; float64 ones hold the float32 ones' weights."""
    networks = [TinyNetwork(seed=0) for _ in range(3)]
    for seed, network in enumerate(networks):
        for parameter, other in zip(network.parameters(), TinyNetwork(seed + 1).parameters(), strict=True):
            parameter.data += 0.2 * other.data
    student, teacher, fake = (Denoiser(network.to(dtype), schedule) for network in networks)
    teacher.requires_grad_(False)
    return Roles(student, teacher, fake)


def make_conditions(batch_size: int, dtype: torch.dtype) -> tuple[Conditioning, Conditioning]:
    """Prompts of 5 tokens without a mask, and one empty prompt of 2 tokens for all."""
    generator = torch.Generator().manual_seed(9)
    prompts = torch.randn(batch_size, 5, 3, generator=generator).to(dtype)
    return Conditioning({"encoder_hidden_states": prompts}), Conditioning({"encoder_hidden_states": -prompts[:1, :2]})


@dataclass
class Outcome:
    """What one iteration leaves, in float64: both losses, both gradients, and the forwards of every role."""

    numbers: dict[str, Tensor]
    counts: dict[str, ForwardCount]


def flat_gradient(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters()]
    return torch.cat([gradient.flatten().double() for gradient in gradients if gradient is not None])


def iterate(
    method: ModuleType, config: TDMConfig, schedule: Schedule, batch_size: int, dtype: torch.dtype, jitter: int = 0
) -> Outcome:
    """One iteration as a trainer makes it: rollout, fake update and step, student update.

    `jitter`, if not 0, seeds a change by an ulp of float32 to every table, weight, latent and network output.
    """
    generator = torch.Generator().manual_seed(jitter)

    def jittered(tensor: Tensor) -> Tensor:
        return tensor * (1 + 2.0**-23 * torch.randn(tensor.shape, dtype=dtype, generator=generator))

    if jitter:
        names = ("alpha", "sigma", "a", "b", "c", "d", "snr")
        tables: dict[str, Any] = {name: jittered(getattr(schedule, name)) for name in names}
        schedule = dataclasses.replace(schedule, **tables)
    roles = make_roles(schedule, dtype)
    conditioning, unconditional = make_conditions(batch_size, dtype)
    latents = randn(batch_size, SHAPE, seed=3, iteration=ITERATION, sample_offset=OFFSET).to(dtype)
    if jitter:
        latents = jittered(latents)
        for role in roles:
            role.register_forward_hook(lambda _module, _args, output: jittered(output))
            for parameter in role.parameters():
                parameter.data = jittered(parameter.data)
    draws = method.draw(config, batch_size, ITERATION, OFFSET)
    with (
        count_forwards(roles.student) as student,
        count_forwards(roles.teacher) as teacher,
        count_forwards(roles.fake) as fake,
    ):
        rolled = method.rollout(roles.student, latents, conditioning, schedule, config, draws)
        loss_fake = method.fake_loss(roles, rolled, conditioning, config, draws, ITERATION, OFFSET)
        loss_fake.backward()
        assert all(parameter.grad is None for parameter in roles.student.parameters())
        gradient_fake = flat_gradient(roles.fake)
        # A step of fixed length, so that no prediction type's loss scale decides how far the fake score moves.
        with torch.no_grad():
            for parameter in roles.fake.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad / gradient_fake.norm().to(dtype))
        roles.fake.zero_grad()
        loss_student = method.student_loss(roles, rolled, conditioning, unconditional, config, draws, ITERATION, OFFSET)
        loss_student.backward()
    assert all(parameter.grad is None for role in (roles.fake, roles.teacher) for parameter in role.parameters())
    numbers = {
        "loss_fake": loss_fake.detach().double(),
        "gradient_fake": gradient_fake,
        "loss_student": loss_student.detach().double(),
        "gradient_student": flat_gradient(roles.student),
    }
    return Outcome(numbers, {"student": student, "teacher": teacher, "fake": fake})


def assert_same(config: TDMConfig, schedule: Schedule, batch_size: int) -> tuple[Outcome, Outcome]:
    """Both methods agree in float64 to its rounding; in float32 both are as near to that as float32 allows.

    How near that is, float64 tells: with every table, weight, latent and output off by an ulp of float32, it moves by
    what one rounding per number costs; a run in float32 has some dozens of roundings on every path. ROUNDINGS was
    settled after errors of at most 2.7 (distill) and 20.8 (reference) such units had been seen, so in float32 this
    guards against regressions; that the methods are the same is shown by the float64 line.
    """
    exact, fast = (iterate(method, config, schedule, batch_size, torch.float64) for method in (reference, distill))
    plain32, fast32 = (iterate(method, config, schedule, batch_size, torch.float32) for method in (reference, distill))
    moved = [iterate(reference, config, schedule, batch_size, torch.float64, jitter) for jitter in (1, 2, 3)]
    for name, gold in exact.numbers.items():
        scale = max(float((run.numbers[name] - gold).norm()) for run in moved) + 2.0**-23 * float(gold.norm())
        assert float(gold.norm()) > 0
        assert float((fast.numbers[name] - gold).norm()) <= ROUNDINGS * 2.0**-29 * scale, name
        assert float((plain32.numbers[name] - gold).norm()) <= ROUNDINGS * scale, name
        assert float((fast32.numbers[name] - gold).norm()) <= ROUNDINGS * scale, name
    return exact, fast


CASES = list(product([1, 5], [1, 2, 4], [True, False], [True, False]))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize(("batch_size", "num_steps", "separate", "randmid"), CASES)
def test_both_methods_agree_and_the_forwards_are_counted(
    schedule: Schedule, batch_size: int, num_steps: int, separate: bool, randmid: bool
) -> None:
    config = TDMConfig(num_steps=num_steps, use_separate=separate, use_randmid=randmid, seed=11)
    plain, fast = assert_same(config, schedule, batch_size)

    draws = distill.draw(config, batch_size, ITERATION, OFFSET)
    pairs = list(zip(draws.intervals_student.steps, draws.intervals_fake.steps, strict=True))
    rolled = [num_steps - min(k_student, k_fake - 1) for k_student, k_fake in pairs]
    one = batch_size
    assert fast.counts == {
        "student": ForwardCount(calls=max(rolled) + 1, samples=sum(rolled) + one, trained_samples=one),
        "teacher": ForwardCount(calls=1, samples=2 * one, trained_samples=0),
        "fake": ForwardCount(calls=2, samples=2 * one, trained_samples=one),
    }
    assert plain.counts == {
        "student": ForwardCount(calls=num_steps + 2, samples=(num_steps + 2) * one, trained_samples=one),
        "teacher": ForwardCount(calls=3, samples=3 * one, trained_samples=0),
        "fake": ForwardCount(calls=2, samples=2 * one, trained_samples=one),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"use_huber": False},
        {"importance_weight": False},
        {"cfg": 1.0, "snr_gamma": 0.1},
        {"nodes": (999, 856, 665, 399), "total_steps": 1000},
        {"nodes": (999, 856, 665, 399), "total_steps": 1000, "use_randmid": True, "use_separate": False},
        {"min_timestep": 50, "margin": 3, "mid_gap": 70, "use_randmid": True},
    ],
    ids=str,
)
def test_both_methods_agree_for_the_other_options(change: dict[str, Any]) -> None:
    plain = iterate(reference, TDMConfig(seed=11), SCHEDULES["v_prediction"], 5, torch.float64)
    changed, _ = assert_same(TDMConfig(seed=11, **change), SCHEDULES["v_prediction"], 5)
    assert any(not torch.equal(plain.numbers[name], changed.numbers[name]) for name in plain.numbers)


def every_pair() -> Draws:
    """One sample for each (k_g, k_f) of four steps."""
    k_student, k_fake = torch.tensor(list(product(range(1, 5), range(1, 5)))).unbind(1)

    def intervals(k: Tensor) -> Intervals:
        t_gen = k * 225 - 1
        return Intervals(k, t_gen, t_gen - 224, t_gen - 50, tuple(k.tolist()))

    return Draws(intervals(k_fake), intervals(k_student))


def cost_per_sample(method: ModuleType, part: str) -> float:
    """Forwards per sample over all 16 pairs, a backward counted as two, of one part of the iteration."""
    schedule, config, draws = SCHEDULES["flow"], TDMConfig(), every_pair()
    roles = make_roles(schedule, torch.float32)
    conditioning, unconditional = make_conditions(16, torch.float32)
    latents = randn(16, SHAPE, seed=3)
    rolled = method.rollout(roles.student, latents, conditioning, schedule, config, draws)
    with (
        count_forwards(roles.student) as student,
        count_forwards(roles.teacher) as teacher,
        count_forwards(roles.fake) as fake,
    ):
        if part == "rollout":
            method.rollout(roles.student, latents, conditioning, schedule, config, draws)
        elif part == "fake":
            method.fake_loss(roles, rolled, conditioning, config, draws, 0)
        else:
            method.student_loss(roles, rolled, conditioning, unconditional, config, draws, 0)
    return sum(count.samples + 2 * count.trained_samples for count in (student, teacher, fake)) / 16


def test_an_iteration_costs_what_the_method_says() -> None:
    parts = ("rollout", "fake", "student")
    assert [cost_per_sample(reference, part) for part in parts] == [4, 5, 6]
    assert [cost_per_sample(distill, part) for part in parts] == [2.75, 3, 6]


def test_the_rollout_is_the_plain_trajectory_where_it_is_needed() -> None:
    schedule, config, draws = SCHEDULES["epsilon"], TDMConfig(), every_pair()
    student = make_roles(schedule, torch.float64).student
    conditioning, _ = make_conditions(16, torch.float64)
    latents = randn(16, SHAPE, seed=3, dtype=torch.float64)
    rolled = distill.rollout(student, latents, conditioning, schedule, config, draws)
    trajectory = reference.rollout(student, latents, conditioning, schedule, config, draws).trajectory
    for sample, intervals in (
        (rolled.student_sample, draws.intervals_student),
        (rolled.fake_sample, draws.intervals_fake),
    ):
        wanted = torch.stack([trajectory[4 - k][b] for b, k in enumerate(intervals.steps)])
        torch.testing.assert_close(sample, wanted, rtol=1e-10, atol=1e-10)
    output = student(rolled.fake_sample, draws.intervals_fake.t_gen, conditioning)
    torch.testing.assert_close(rolled.fake_output, output, rtol=1e-10, atol=1e-10)
    assert not any(value.requires_grad for value in rolled)


@pytest.mark.parametrize("nodes", [None, (999, 856, 665, 399)])
@pytest.mark.parametrize(("separate", "randmid"), list(product([True, False], [True, False])))
def test_draws_are_the_plain_loops(nodes: tuple[int, ...] | None, separate: bool, randmid: bool) -> None:
    total_steps = 900 if nodes is None else 1000
    config = TDMConfig(total_steps=total_steps, nodes=nodes, use_separate=separate, use_randmid=randmid, seed=2**40 + 5)
    fast, plain = distill.draw(config, 33, 5, 7), reference.draw(config, 33, 5, 7)
    for left, right in zip(fast, plain, strict=True):
        assert left.steps == right.steps == tuple(left.k.tolist())
        for ours, theirs in zip(left[:4], right[:4], strict=True):
            assert torch.equal(ours, theirs)
    assert fast.intervals_fake.steps != fast.intervals_student.steps


def test_an_iteration_does_not_depend_on_the_batch_split() -> None:
    schedule, config = SCHEDULES["v_prediction"], TDMConfig(seed=4)
    roles = make_roles(schedule, torch.float64)
    conditioning, unconditional = make_conditions(5, torch.float64)

    def losses(first: int, last: int) -> Tensor:
        latents = randn(last - first, SHAPE, seed=3, sample_offset=first, dtype=torch.float64)
        draws, part = distill.draw(config, last - first, 2, first), conditioning[first:last]
        rolled = distill.rollout(roles.student, latents, part, schedule, config, draws)
        loss_fake = distill.fake_loss(roles, rolled, part, config, draws, 2, first)
        loss_student = distill.student_loss(roles, rolled, part, unconditional, config, draws, 2, first)
        return (last - first) * torch.stack((loss_fake, loss_student)).detach()

    torch.testing.assert_close(losses(0, 2) + losses(2, 5), losses(0, 5), rtol=1e-11, atol=0)


def test_the_two_updates_see_different_noise() -> None:
    """With one draw of (k, t) for both, only their streams can tell the two noisy latents apart."""
    schedule, config, draws = SCHEDULES["flow"], TDMConfig(), every_pair()
    draws = Draws(draws.intervals_student, draws.intervals_student)
    roles = make_roles(schedule, torch.float32)
    seen: list[Tensor] = []
    roles.fake.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    conditioning, unconditional = make_conditions(16, torch.float32)
    rolled = distill.rollout(roles.student, randn(16, SHAPE, seed=3), conditioning, schedule, config, draws)
    distill.fake_loss(roles, rolled, conditioning, config, draws, 0)
    distill.student_loss(roles, rolled, conditioning, unconditional, config, draws, 0)
    assert torch.equal(rolled.fake_sample, rolled.student_sample)
    assert float((seen[0] - seen[1]).abs().mean()) > 0.1


def test_half_precision_networks_give_finite_float32_losses() -> None:
    schedule, config = SCHEDULES["v_prediction"], TDMConfig()
    roles = copy.deepcopy(make_roles(schedule, torch.bfloat16))
    conditioning, unconditional = make_conditions(2, torch.bfloat16)
    draws = distill.draw(config, 2, 0)
    latents = randn(2, SHAPE, seed=3, dtype=torch.bfloat16)
    rolled = distill.rollout(roles.student, latents, conditioning, schedule, config, draws)
    assert rolled.student_sample.dtype == torch.bfloat16
    for loss in (
        distill.fake_loss(roles, rolled, conditioning, config, draws, 0),
        distill.student_loss(roles, rolled, conditioning, unconditional, config, draws, 0),
    ):
        assert loss.dtype == torch.float32 and bool(loss.isfinite())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_steps": 902}, r"does not divide total_steps 902; 900 or 904"),
        ({"num_steps": 45}, r"has no timestep left"),
        ({"nodes": (399, 665), "num_steps": 2}, r"must descend"),
        ({"cfg": math.inf}, r"cfg is inf"),
        ({"huber_c": 0.0}, r"huber_c is 0.0"),
        ({"snr_gamma": math.nan}, r"snr_gamma is nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TDMConfig(**change)


def test_a_batch_that_does_not_fit_its_draws_is_refused() -> None:
    schedule, config = SCHEDULES["flow"], TDMConfig()
    roles = make_roles(schedule, torch.float32)
    conditioning, _ = make_conditions(2, torch.float32)
    with pytest.raises(ValueError, match="latents have 2 samples, conditioning 2, draws 3"):
        distill.rollout(
            roles.student, torch.zeros(2, *SHAPE), conditioning, schedule, config, distill.draw(config, 3, 0)
        )
