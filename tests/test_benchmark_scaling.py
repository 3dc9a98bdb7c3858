"""The benchmarks of many ranks: the page is arithmetic on what was counted, and two ranks of this machine are timed."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from bench_step import MODELS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_page_is_arithmetic_on_what_was_counted() -> None:
    script = runpy.run_path(str(BENCHMARKS / "scaling"))
    forward, held = 4e14, 3e10
    counted = {
        "adapters": 1000,
        "operations": {roles: {"forward": forward, "trained": 3 * forward} for roles in ("full", "lora")},
        "ranks": {kind.held(): {"peak_bytes": held} for kind in (*script["ROWS"], *script["COUNT"])},
    }
    counted["ranks"][script["Kind"](512).held()]["peak_bytes"] = 79e9
    assert {kind.held() for kind in script["ROWS"]} <= {kind.held() for kind in script["COUNT"]}
    facts = script["Facts"](MODELS["2b-93x640x640"], counted)
    page = script["page"](facts)

    parameters = 2_771_981_600
    assert f"{parameters:,} parameters" in page and "38400 tokens" in page
    # Rollout, teacher and fake score once; fake update and student with their backwards; two reductions in fp32.
    block_share = 0.98
    gathered = 2 * parameters * (3 + 2 * (1 + block_share))
    total = gathered + 2 * 4 * parameters
    assert sum(facts.bytes(script["Kind"](8)).values()) == pytest.approx(total, rel=0.01)
    times = facts.times(script["Kind"](8), script["Cluster"]())
    assert times.compute == pytest.approx((11.75 + 2) * forward / 989e12 / 0.4)
    calls = 33 * 7 + 2 * 33
    assert times.nvlink == pytest.approx(7 / 8 * total / (0.8 * 450e9) + calls * 7 * 2e-6, rel=0.02)
    assert times.infiniband == 0 and times.bottleneck == "compute"
    assert f"| {times.compute:.2f} | {times.nvlink:.2f} | 0.00 |" in page
    assert page.count("**does not fit**") == 1


@pytest.mark.slow
def test_the_page_in_docs_is_made_of_what_is_kept_beside_it(tmp_path: Path) -> None:
    runpy.run_path(str(BENCHMARKS / "scaling"))["main"](["--output", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == (BENCHMARKS.parent / "docs" / "scaling.md").read_text()


@pytest.mark.slow
def test_two_ranks_are_timed(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "ranks"), "--model", "dry", "--rounds", "2", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads(next(tmp_path.glob("ranks-dry_*.json")).read_text())["rows"]
    assert [len(row["rounds"]) for row in rows] == [2] * 5
    alone, none, full, kept, context = (row["bytes"] for row in rows)
    assert alone == 0 < none < kept < full < context
    assert "| full, --context_parallel 2 | " in next(tmp_path.glob("ranks-dry_*.md")).read_text()
