"""What an iteration is said to cost, against the forwards that it makes over every draw."""

from __future__ import annotations

from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_roles import SCHEDULES, SHAPE, draws_of, make_conditions, make_roles
from torch import Tensor

from tdm_fast import distill, reference
from tdm_fast.cost import Cost, expected_forwards, reference_forwards
from tdm_fast.distill import Draws, TDMConfig
from tdm_fast.models.denoiser import count_forwards
from tdm_fast.philox import randn


def every_draw(config: TDMConfig, batch_size: int) -> list[Draws]:
    """All draws of k that a global batch can have, each as likely as any other."""
    indices = batch_size if config.index_per == "sample" else 1
    updates = 1 if config.share_index else 1 + config.fake_updates
    found = []
    for values in product(range(1, config.num_steps + 1), repeat=indices * updates):
        ks = [values[update * indices :][:indices] * (batch_size // indices) for update in range(updates)]
        k_fakes = ks[:1] * config.fake_updates if config.share_index else ks[1:]
        found.append(draws_of(config, ks[0], *k_fakes))
    return found


def counted(method: ModuleType, config: TDMConfig, batch_size: int, backward: float) -> Cost:
    """The average, over every draw, of what one iteration's parts were seen to make."""
    schedule = SCHEDULES["flow"]
    roles = make_roles(schedule, torch.float32)
    conditioning, unconditional = make_conditions(batch_size, torch.float32)
    latents, draws_of_all = randn(batch_size, SHAPE, seed=3), every_draw(config, batch_size)
    costs, calls = torch.zeros(3), torch.zeros(2)
    for draws in draws_of_all:
        forward: dict[str, Tensor] = {}
        with (
            count_forwards(roles.student) as student,
            count_forwards(roles.teacher) as teacher,
            count_forwards(roles.fake) as fake,
        ):

            def so_far(counts: tuple[Any, ...] = (student, teacher, fake)) -> float:
                return sum(count.samples + backward * count.trained_samples for count in counts) / batch_size

            rolled = method.rollout(roles.student, latents, conditioning, schedule, config, draws)
            after_rollout = so_far()
            calls[0] += student.calls
            if config.share_index and method is distill:
                forward["output"] = distill.student_forward(roles, rolled, conditioning, config, draws)
                rolled = rolled.sharing(forward["output"])
            before_fake = so_far()
            for update in range(config.fake_updates):
                method.fake_loss(roles, rolled, conditioning, config, draws, 0, update=update)
            after_fake = so_far()
            method.student_loss(roles, rolled, conditioning, unconditional, config, draws, 0, **forward)
            fake_cost = after_fake - before_fake
            costs += torch.tensor([after_rollout, fake_cost, so_far() - after_rollout - fake_cost])
            calls[1] += student.calls + teacher.calls + fake.calls
    return Cost(*(torch.cat((costs, calls)).double() / len(draws_of_all)).tolist())


CASES: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({"num_steps": 2}, 3),
    ({"num_steps": 3, "share_index": True}, 3),
    ({"fake_updates": 2}, 1),
    ({"num_steps": 2, "fake_updates": 2}, 2),
    ({"index_per": "iteration"}, 2),
    ({"index_per": "iteration", "share_index": True, "fake_updates": 3, "cfg": 1.0}, 2),
    ({"num_steps": 1}, 2),
]


@pytest.mark.parametrize(("change", "batch_size"), CASES)
def test_the_formula_is_what_is_counted(change: dict[str, Any], batch_size: int) -> None:
    config = TDMConfig(**change)
    for roles, share, backward in (("full", 0.3, 2.0), ("lora", 0.0, 1.0), ("lora", 0.25, 1.25)):
        for method, cost in (
            (distill, expected_forwards(config, batch_size, roles, attention_share=share)),
            (reference, reference_forwards(config, roles, attention_share=share)),
        ):
            assert cost == pytest.approx(counted(method, config, batch_size, backward), rel=1e-6)


def test_costs_are_those_of_the_method() -> None:
    """The public demo's 15 F and what is left of them, by hand for K = 4."""

    def total(**change: Any) -> float:
        return expected_forwards(TDMConfig(**change), 1).total

    assert reference_forwards(TDMConfig()).total == 4 + 5 + 6 == 15
    assert expected_forwards(TDMConfig(), 1)[:3] == (2.75, 3, 6)
    assert (total(), total(share_index=True), total(cfg=1.0)) == (11.75, 10.5, 10.75)
    assert (total(num_steps=1), total(fake_updates=2)) == (10, 15.21875)
    assert expected_forwards(TDMConfig(), 1, "lora").total == 9.75
    assert expected_forwards(TDMConfig(share_index=True), 1, "lora").total == 8.5
    calls = [expected_forwards(TDMConfig(), size).rollout_calls for size in (8, 32)]
    assert calls == pytest.approx([3.90, 4.00], abs=5e-3)
    assert expected_forwards(TDMConfig(), 32).critical_path == pytest.approx(13, abs=5e-3)
    assert expected_forwards(TDMConfig(), 32).total == 11.75
    once = expected_forwards(TDMConfig(index_per="iteration"), 32)
    assert once.critical_path == once.total == 11.75 and once.calls == 2.75 + 4


def test_unify_costs_the_average_over_its_numbers_of_steps() -> None:
    unify = TDMConfig(unify=(1, 2, 4), fake_updates=2)
    for cost in (lambda config: expected_forwards(config, 3), reference_forwards):
        single = [cost(TDMConfig(num_steps=steps, fake_updates=2)) for steps in (1, 2, 4)]
        assert cost(unify) == pytest.approx([sum(values) / 3 for values in zip(*single, strict=True)])


def test_costs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size is 0"):
        expected_forwards(TDMConfig(), 0)
    with pytest.raises(ValueError, match=r"roles is 'half'; it must be one of full, lora"):
        expected_forwards(TDMConfig(), 1, "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"attention_share is 1\.5"):
        reference_forwards(TDMConfig(), attention_share=1.5)
