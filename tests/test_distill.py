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
import scipy.stats
import torch
from tiny_roles import SCHEDULES, SHAPE, draws_of, make_conditions, make_roles
from torch import Tensor, nn

from tdm_fast import distill, reference
from tdm_fast.distill import Draws, Roles, TDMConfig
from tdm_fast.models.denoiser import Conditioning, ForwardCount, count_forwards
from tdm_fast.ops.sample_intervals import intervals_at
from tdm_fast.philox import randn
from tdm_fast.schedule import Schedule

ITERATION, OFFSET = 17, 40
ROUNDINGS = 32


@dataclass
class Outcome:
    """What one iteration leaves, in float64: all losses, all gradients, and the forwards of every role."""

    numbers: dict[str, Tensor]
    counts: dict[str, ForwardCount]


def flat_gradient(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters()]
    return torch.cat([gradient.flatten().double() for gradient in gradients if gradient is not None])


def iterate(
    method: ModuleType, config: TDMConfig, schedule: Schedule, batch_size: int, dtype: torch.dtype, jitter: int = 0
) -> Outcome:
    """One iteration as a trainer makes it: rollout, fake updates and their steps, student update.

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
    config = config.at(ITERATION)
    draws = method.draw(config, batch_size, ITERATION, OFFSET)
    with (
        count_forwards(roles.student) as student,
        count_forwards(roles.teacher) as teacher,
        count_forwards(roles.fake) as fake,
    ):
        rolled = method.rollout(roles.student, latents, conditioning, schedule, config, draws)
        forward: dict[str, Tensor] = {}
        if config.share_index and method is distill:
            forward = {"output": distill.student_forward(roles, rolled, conditioning, config, draws)}
            rolled = rolled.sharing(forward["output"])
        losses_fake, gradients_fake = [], []
        for update in range(config.fake_updates):
            loss = method.fake_loss(roles, rolled, conditioning, config, draws, ITERATION, OFFSET, update=update)
            loss.backward()
            assert all(parameter.grad is None for parameter in roles.student.parameters())
            losses_fake.append(loss.detach().double())
            gradients_fake.append(flat_gradient(roles.fake))
            # A step of fixed length, so that no prediction type's loss scale decides how far the fake score moves.
            with torch.no_grad():
                for parameter in roles.fake.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.1 * parameter.grad / gradients_fake[-1].norm().to(dtype))
            roles.fake.zero_grad()
        loss_student = method.student_loss(
            roles, rolled, conditioning, unconditional, config, draws, ITERATION, OFFSET, **forward
        )
        loss_student.backward()
    assert all(parameter.grad is None for role in (roles.fake, roles.teacher) for parameter in role.parameters())
    numbers = {
        "loss_fake": torch.stack(losses_fake),
        "gradient_fake": torch.cat(gradients_fake),
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
    pairs = list(zip(draws.student.steps, draws.fake[0].steps, strict=True))
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
        {"timesteps": (999, 856, 665, 399), "total_steps": 1000},
        {"timesteps": (999, 856, 665, 399), "total_steps": 1000, "use_randmid": True, "use_separate": False},
        {"min_timestep": 50, "margin": 3, "mid_gap": 70, "use_randmid": True},
    ],
    ids=str,
)
def test_both_methods_agree_for_the_other_options(change: dict[str, Any]) -> None:
    plain = iterate(reference, TDMConfig(seed=11), SCHEDULES["v_prediction"], 5, torch.float64)
    changed, _ = assert_same(TDMConfig(seed=11, **change), SCHEDULES["v_prediction"], 5)
    assert any(not torch.equal(plain.numbers[name], changed.numbers[name]) for name in plain.numbers)


LESS_WORK: list[dict[str, Any]] = [
    {"index_per": "iteration"},
    {"share_index": True},
    {"fake_updates": 3, "use_randmid": True},
    {"index_per": "iteration", "fake_updates": 2},
    {"index_per": "iteration", "share_index": True, "fake_updates": 2, "use_randmid": True},
    {"share_index": True, "fake_updates": 2, "cfg": 1.0},
    {"unify": (1, 2, 4)},
    {"unify": (4, 2), "index_per": "iteration", "share_index": True, "fake_updates": 2, "seed": 14},
]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("change", LESS_WORK, ids=str)
def test_both_methods_agree_where_work_is_saved(schedule: Schedule, change: dict[str, Any]) -> None:
    config = TDMConfig(**({"seed": 11} | change))
    plain, fast = assert_same(config, schedule, 3)
    assert (config.at(ITERATION).num_steps != 4) == (config.unify is not None)
    updates, steps = config.fake_updates, config.at(ITERATION).num_steps
    assert plain.counts["student"].samples == 3 * (steps + updates + 1)
    assert plain.counts["teacher"].samples == 3 * (updates + 2)
    assert fast.counts["teacher"] == ForwardCount(1, 3 if config.cfg == 1 else 6, 0)
    assert fast.counts["fake"] == plain.counts["fake"] == ForwardCount(updates + 1, 3 * (updates + 1), 3 * updates)
    draws = distill.draw(config.at(ITERATION), 3, ITERATION, OFFSET)
    rolled = [
        steps - (k if config.share_index else min(k, *[k_fake - 1 for k_fake in k_fakes]))
        for k, *k_fakes in zip(draws.student.steps, *[intervals.steps for intervals in draws.fake], strict=True)
    ]
    assert fast.counts["student"] == ForwardCount(max(rolled) + 1, sum(rolled) + 3, 3)
    assert draws.needed == tuple(range(steps, steps - max(rolled), -1))


def every_pair() -> Draws:
    """One sample for each (k_g, k_f) of four steps."""
    k_student, k_fake = zip(*product(range(1, 5), range(1, 5)), strict=True)
    return draws_of(TDMConfig(), k_student, k_fake)


def test_the_rollout_is_the_plain_trajectory_where_it_is_needed() -> None:
    schedule, config, draws = SCHEDULES["epsilon"], TDMConfig(), every_pair()
    student = make_roles(schedule, torch.float64).student
    conditioning, _ = make_conditions(16, torch.float64)
    latents = randn(16, SHAPE, seed=3, dtype=torch.float64)
    rolled = distill.rollout(student, latents, conditioning, schedule, config, draws)
    trajectory = reference.rollout(student, latents, conditioning, schedule, config, draws).trajectory
    for sample, intervals in (
        (rolled.student_sample, draws.student),
        (rolled.fake_samples[0], draws.fake[0]),
    ):
        wanted = torch.stack([trajectory[4 - k][b] for b, k in enumerate(intervals.steps)])
        torch.testing.assert_close(sample, wanted, rtol=1e-10, atol=1e-10)
    output = student(rolled.fake_samples[0], draws.fake[0].t_gen, conditioning)
    torch.testing.assert_close(rolled.fake_outputs[0], output, rtol=1e-10, atol=1e-10)
    assert not any(value.requires_grad for value in (rolled.student_sample, *rolled.fake_samples, *rolled.fake_outputs))


DRAW_CASES: list[dict[str, Any]] = [
    *[{"use_separate": separate, "use_randmid": randmid} for separate, randmid in product([True, False], repeat=2)],
    {"index_per": "iteration", "use_randmid": True},
    {"share_index": True, "use_randmid": True, "fake_updates": 3},
    {"index_per": "iteration", "share_index": True, "fake_updates": 2, "use_separate": False},
]


@pytest.mark.parametrize("nodes", [None, (999, 856, 665, 399)])
@pytest.mark.parametrize("change", DRAW_CASES, ids=str)
def test_draws_are_the_plain_loops(nodes: tuple[int, ...] | None, change: dict[str, Any]) -> None:
    total_steps = 900 if nodes is None else 1000
    config = TDMConfig(total_steps=total_steps, timesteps=nodes, seed=2**40 + 5, **change)
    fast, plain = distill.draw(config, 33, 5, 7), reference.draw(config, 33, 5, 7)
    part = distill.draw(config, 3, 5, 9, global_batch_size=40)
    for left, right, few in zip(
        (*fast.fake, fast.student), (*plain.fake, plain.student), (*part.fake, part.student), strict=True
    ):
        assert few.steps == left.steps[2:5] and torch.equal(torch.stack(few[:4]), torch.stack(left[:4])[:, 2:5])
        assert left.steps == right.steps == tuple(left.k.tolist())
        for ours, theirs in zip(left[:4], right[:4], strict=True):
            assert torch.equal(ours, theirs)
    assert (fast.fake[0].steps != fast.student.steps) or config.share_index
    assert not torch.equal(fast.fake[0].t, fast.student.t)
    assert len({tuple(intervals.t.tolist()) for intervals in fast.fake}) == config.fake_updates


def test_one_index_per_iteration_has_the_same_marginals() -> None:
    """All samples, whatever their place, have one (k_g, k_f); over iterations the pairs are uniform, so is each t."""
    config = TDMConfig(index_per="iteration", seed=8)
    pairs, places = torch.zeros(4, 4), []
    for iteration in range(1000):
        draws, other = distill.draw(config, 2, iteration), distill.draw(config, 1, iteration, 50)
        (k_student,), (k_fake,) = set(draws.student.steps), set(draws.fake[0].steps)
        assert (other.student.steps, other.fake[0].steps) == ((k_student,), (k_fake,))
        assert draws.needed == other.needed == tuple(range(4, min(k_student + 1, k_fake) - 1, -1))
        pairs[k_student - 1, k_fake - 1] += 1
        low = draws.student.t_mid.clamp(min=20)
        places.append((draws.student.t - low + 0.5) / (draws.student.t_gen - 10 - low))
    assert scipy.stats.chisquare(pairs.flatten().numpy()).pvalue > 1e-3
    histogram = torch.histc(torch.stack(places), bins=10, min=0, max=1)
    assert scipy.stats.chisquare(histogram.numpy()).pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack(places, dim=1))[0, 1])) < 4 / 1000**0.5


def test_unify_draws_the_number_of_steps_per_iteration() -> None:
    config = TDMConfig(unify=(1, 2, 4), index_per="iteration", seed=6)
    drawn = [config.at(iteration) for iteration in range(900)]
    assert {dataclasses.replace(one, num_steps=4) for one in drawn} == {config}
    assert drawn[:20] == [one.at(iteration) for iteration, one in enumerate(drawn[:20])]
    counts = [sum(one.num_steps == steps for one in drawn) for steps in (1, 2, 4)]
    assert sum(counts) == 900 and scipy.stats.chisquare(counts).pvalue > 1e-3
    other = [dataclasses.replace(config, seed=7).at(iteration).num_steps for iteration in range(20)]
    assert other != [one.num_steps for one in drawn[:20]]
    # No update's stream is the one that K comes from, so k given K is uniform still.
    pairs = torch.zeros(4, 4)
    for iteration, one in enumerate(drawn):
        if one.num_steps == 4:
            draws = distill.draw(one, 1, iteration)
            pairs[draws.student.steps[0] - 1, draws.fake[0].steps[0] - 1] += 1
    assert scipy.stats.chisquare(pairs.flatten().numpy()).pvalue > 1e-3
    streams = [distill.STUDENT_STREAM, *map(distill.fake_stream, range(distill.NUM_STEPS_STREAM - 1))]
    assert sorted(streams) == list(range(distill.NUM_STEPS_STREAM))
    assert TDMConfig(seed=3).at(5) == TDMConfig(seed=3)
    assert config.check() == TDMConfig().check() and TDMConfig(unify=(2, 1), num_steps=2).check() == [899, 449]


@pytest.mark.parametrize("method", [distill, reference])
def test_unify_tells_the_number_of_steps_to_student_and_fake_score_alone(method: ModuleType) -> None:
    for iteration in range(5):
        config = TDMConfig(unify=(1, 2, 4), share_index=method is distill, seed=6).at(iteration)
        roles = make_roles(SCHEDULES["flow"], torch.float32)
        told: dict[str, list[Tensor | None]] = {name: [] for name in Roles._fields}
        for name, role in zip(Roles._fields, roles, strict=True):
            role.register_forward_pre_hook(
                lambda _module, args, heard=told[name]: heard.append(args[2].tensors.get("num_steps"))
            )
        conditioning, unconditional = make_conditions(3, torch.float32)
        draws, latents = method.draw(config, 3, iteration), randn(3, SHAPE, seed=3)
        rolled = method.rollout(roles.student, latents, conditioning, roles.student.schedule, config, draws)
        forward: dict[str, Tensor] = {}
        if method is distill:
            forward["output"] = distill.student_forward(roles, rolled, conditioning, config, draws)
            rolled = rolled.sharing(forward["output"])
        method.fake_loss(roles, rolled, conditioning, config, draws, iteration)
        method.student_loss(roles, rolled, conditioning, unconditional, config, draws, iteration, **forward)
        assert told["teacher"] and all(heard is None for heard in told["teacher"])
        for heard in told["student"] + told["fake"]:
            assert heard is not None and heard.dtype == torch.int64 and set(heard.tolist()) == {config.num_steps}
        calls = len(draws.needed) + 1 if method is distill else config.num_steps + 2
        assert len(told["student"]) == calls and len(told["fake"]) == 2
        assert "num_steps" not in conditioning.tensors


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


@pytest.mark.parametrize(
    "change", [{}, {"share_index": True}, {"fake_updates": 2}, {"index_per": "iteration"}], ids=str
)
def test_ranks_make_the_same_calls_and_the_unsplit_update(change: dict[str, Any]) -> None:
    """A global batch of six on three ranks: equal calls although their samples need unequal steps, equal gradients."""
    schedule, config = SCHEDULES["v_prediction"], TDMConfig(seed=1, **change)
    conditioning, unconditional = make_conditions(6, torch.float64)
    idle = 0

    def run(first: int, last: int, iteration: int) -> tuple[Tensor, list[int]]:
        """Losses and gradients, times the share of the batch, and the sizes of the student's calls."""
        nonlocal idle
        roles, part = make_roles(schedule, torch.float64), conditioning[first:last]
        latents = randn(last - first, SHAPE, seed=3, sample_offset=first, dtype=torch.float64)
        draws = distill.draw(config, last - first, iteration, first, global_batch_size=6)
        calls: list[int] = []
        with roles.student.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0]))):
            rolled, output = distill.rollout(roles.student, latents, part, schedule, config, draws), None
            if config.share_index:
                output = distill.student_forward(roles, rolled, part, config, draws)
                rolled = rolled.sharing(output)
            losses = [
                distill.fake_loss(roles, rolled, part, config, draws, iteration, first, update=update)
                for update in range(config.fake_updates)
            ]
            losses.append(
                distill.student_loss(roles, rolled, part, unconditional, config, draws, iteration, first, output=output)
            )
        torch.stack(losses).sum().backward()
        own = set().union(*(range(4, k, -1) for k in draws.student.steps))
        if not config.share_index:
            own = own.union(*(range(4, k - 1, -1) for intervals in draws.fake for k in intervals.steps))
        assert own <= set(draws.needed) and len(calls) == len(draws.needed) + 1
        idle += len(set(draws.needed) - own)
        numbers = [torch.stack(losses).detach(), flat_gradient(roles.student), flat_gradient(roles.fake)]
        return torch.cat(numbers) * (last - first) / 6, calls

    for iteration in range(6):
        whole, calls = run(0, 6, iteration)
        parts = [run(first, first + 2, iteration) for first in (0, 2, 4)]
        assert {len(part_calls) for _, part_calls in parts} == {len(calls)}
        torch.testing.assert_close(sum(numbers for numbers, _ in parts), whole, rtol=1e-10, atol=1e-12)
    assert (idle > 0) == (config.index_per == "sample")


def test_without_guidance_the_teacher_is_asked_once() -> None:
    """Its answer stands for the one without the prompt: of that the loss reads 0 times a finite difference."""
    schedule, config = SCHEDULES["v_prediction"], TDMConfig(cfg=1.0)
    roles = make_roles(schedule, torch.float32)
    conditioning, unconditional = make_conditions(3, torch.float32)
    draws = distill.draw(config, 3, 0)
    rolled = distill.rollout(roles.student, randn(3, SHAPE, seed=3), conditioning, schedule, config, draws)

    def loss(unconditional: Conditioning, guidance: float) -> Tensor:
        changed = dataclasses.replace(config, cfg=guidance)
        return distill.student_loss(roles, rolled, conditioning, unconditional, changed, draws, 0)

    with count_forwards(roles.teacher) as teacher:
        once = loss(unconditional, 1.0)
    assert teacher == ForwardCount(calls=1, samples=3, trained_samples=0)
    # A guidance that float32 cannot tell from 1 takes the long way, whose batched call may round in another order.
    twice = loss(unconditional, 1 + 1e-12)
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=0)
    broken = Conditioning({name: tensor * math.nan for name, tensor in unconditional.tensors.items()})
    assert torch.equal(loss(broken, 1.0), once) and bool(loss(broken, 1 + 1e-12).isnan())
    for parameter in roles.teacher.parameters():
        parameter.fill_(math.nan)
    assert bool(loss(unconditional, 1.0).isnan())


def test_the_two_updates_see_different_noise() -> None:
    """With one draw of (k, t) for both, only their streams can tell the two noisy latents apart."""
    schedule, config, draws = SCHEDULES["flow"], TDMConfig(), every_pair()
    draws = Draws((draws.student,), draws.student)
    roles = make_roles(schedule, torch.float32)
    seen: list[Tensor] = []
    roles.fake.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    conditioning, unconditional = make_conditions(16, torch.float32)
    rolled = distill.rollout(roles.student, randn(16, SHAPE, seed=3), conditioning, schedule, config, draws)
    distill.fake_loss(roles, rolled, conditioning, config, draws, 0)
    distill.student_loss(roles, rolled, conditioning, unconditional, config, draws, 0)
    assert torch.equal(rolled.fake_samples[0], rolled.student_sample)
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
        ({"timesteps": (399, 665), "num_steps": 2}, r"must descend"),
        ({"cfg": math.inf}, r"cfg is inf"),
        ({"huber_c": 0.0}, r"huber_c is 0.0"),
        ({"snr_gamma": math.nan}, r"snr_gamma is nan"),
        ({"index_per": "batch"}, r"index_per is 'batch'; it must be one of sample, iteration"),
        ({"fake_updates": 0}, r"fake_updates is 0; it must be at least 1"),
        ({"unify": ()}, r"unify is \(\); it must hold different numbers of steps"),
        ({"unify": (4, 4)}, r"unify is \(4, 4\); it must hold different numbers of steps"),
        ({"unify": (1, 2)}, r"num_steps is 4, which unify \(1, 2\) does not train; it must be one of 1, 2"),
        ({"unify": (4, 7)}, r"num_steps is 7, which does not divide total_steps 900"),
        ({"unify": (4, 45)}, r"\(900, 45\).*no timestep left"),
        ({"unify": (4,), "timesteps": (999, 856, 665, 399), "total_steps": 1000}, r"unify is \(4,\), but timesteps"),
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


def test_draws_that_do_not_fit_are_refused() -> None:
    config = TDMConfig()
    for batch_size, offset, global_batch_size in ((0, 0, None), (2, 3, 4), (5, 0, 4), (1, -1, 4)):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}, sample_offset {offset}"):
            distill.draw(config, batch_size, 0, offset, global_batch_size=global_batch_size)
    unify = TDMConfig(unify=(1, 4))
    iteration = next(i for i in range(50) if unify.at(i).num_steps == 1)
    with pytest.raises(ValueError, match=rf"num_steps is 4, .* has 1; pass config.at\({iteration}\)"):
        distill.draw(unify, 2, iteration)

    shared, (conditioning, _) = TDMConfig(share_index=True), make_conditions(2, torch.float32)
    roles, latents = make_roles(SCHEDULES["flow"], torch.float32), torch.zeros(2, *SHAPE)
    arguments = (roles.student, latents, conditioning, SCHEDULES["flow"], shared)
    with pytest.raises(ValueError, match=r"share_index is set, but the draws' steps are"):
        distill.rollout(*arguments, draws_of(shared, [1, 2], [1, 3]))
    draws = distill.draw(shared, 2, 0)
    rolled = distill.rollout(*arguments, draws)
    with pytest.raises(ValueError, match=r"0 of 1 fake_outputs; .*rolled.sharing\(student_forward"):
        distill.fake_loss(roles, rolled, conditioning, shared, draws, 0)
    with pytest.raises(ValueError, match=r"update is 1; the draws have 1"):
        distill.fake_loss(roles, rolled, conditioning, shared, draws, 0, update=1)
    for steps in (torch.ones(2), torch.ones(1, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"k is torch.*; it must be int64 \[B\]"):
            intervals_at(steps, num_steps=4, total_steps=900, seed=0, iteration=0)
