"""The benchmark of the step on a network of nothing: what is measured is the same work from the same draws."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_step import LADDER, MEMORY, MODELS, PAIRS, Runner, chosen_iterations, ladder_of, make_config
from torch.utils._python_dispatch import TorchDispatchMode

from tdm_fast.distill import draw, rolled_samples

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "step"


@pytest.mark.parametrize(("share", "steps"), [(False, 2.75), (True, 1.5)])
def test_the_chosen_iterations_are_the_average_one(share: bool, steps: float) -> None:
    rung = LADDER[-1] if share else LADDER[1]
    config = make_config(rung, MODELS["dry"]).tdm
    draws = [draw(config, 1, iteration) for iteration in chosen_iterations(config)]
    assert sum(rolled_samples(config, one) for one in draws) / len(draws) == steps
    assert sorted(one.student.steps[0] for one in draws) == [1, 2, 3, 4] and len(PAIRS) == 4


def test_rungs_do_the_same_to_the_networks() -> None:
    """One iteration of the reference and of ours leave the same student, to rounding."""
    plain, ours = (Runner(rung, MODELS["dry"], "cpu", ema=False) for rung in (LADDER[0], LADDER[3]))
    for runner in (plain, ours):
        runner.iterate(chosen_iterations(runner.config.tdm)[1])
    theirs = plain.state.networks.trainable("fake")
    for name, parameter in ours.state.networks.trainable("fake").items():
        # AdamW's first step is the rate times the gradient's sign: what is no gradient but rounding may go either way.
        moved = (parameter - theirs[name]).abs() > 1e-6
        assert moved.float().mean() < 0.2 or name.endswith("to_k.bias"), name


class ProductTypes(TorchDispatchMode):
    """The types that matrix products are of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen[args[-1].dtype] += 1
        return func(*args, **(kwargs or {}))


def test_both_sides_compute_in_the_same_type() -> None:
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        for rung in (LADDER[0], LADDER[1]):
            lower = replace(rung, networks={"mixed_precision": precision})
            runner = Runner(lower, MODELS["dry"], "cpu", ema=False)
            with ProductTypes() as products:
                runner.iterate(0)
            assert set(products.seen) == {dtype}, rung.name


def test_a_model_that_fills_a_device_has_a_ladder_of_its_own() -> None:
    """Every rung of the 2B model, the reference too: 8-bit AdamW, no average, block checkpointing."""
    rungs = ladder_of(MODELS["2b"])
    assert [rung.name for rung in rungs][-2:] == ["shared index", "lora roles, rank 32"]
    for rung in rungs[:-1]:
        config = make_config(rung, MODELS["2b"])
        assert config.optimiser.use_8bit_adam and not config.optimiser.use_ema
        assert config.networks.activation_checkpointing == "block"
    kinds = {rung.name: make_config(rung, MODELS["2b"]).networks.activation_checkpointing for rung in MEMORY}
    assert set(kinds.values()) == {"none", "selective", "block"}


@pytest.mark.slow
def test_the_script_writes_its_table(tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    flags = ["--model", "dry", "--device", "cpu", "--rounds", "1", "--rungs", "0,1,3", "--roles", "full"]
    assert main([*flags, "--output", str(tmp_path)]) == 0
    found = next(tmp_path.glob("step-dry_*.json"))
    data = json.loads(found.read_text())
    assert [row["rung"] for row in data["ladder"]] == ["reference", "no wasted forwards", "fused AdamW"]
    assert data["ladder"][1]["flops"] < data["ladder"][0]["flops"]
    assert data["ladder"][1]["peak_bytes"] < data["ladder"][0]["peak_bytes"]
    table = found.with_suffix(".md").read_text()
    assert "| reference | " in table and "| full, block | " in table
    assert found.with_suffix(".png").stat().st_size > 0


@pytest.mark.slow
def test_an_estimate_is_written_without_running(tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["--model", "dry", "--estimate", "--roles", "full", "--output", str(tmp_path)]) == 0
    data = json.loads(next(tmp_path.glob("estimate-dry_*.json")).read_text())
    peaks = {row["rung"]: row["peak_bytes"] for row in data["estimate"]}
    assert len(peaks) == 3
    assert peaks["full, block"] < peaks["full, selective"] < peaks["full, none"]
