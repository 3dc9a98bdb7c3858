"""Context parallelism of the transformer: on 2 and on 4 ranks the numbers of one, and no byte more than announced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from context_jobs import JOBS, run_jobs
from rank_runs import forkserver

from tdm_fast.models.context import Context


@pytest.mark.parametrize(
    "name", [name if name == "2 ranks" else pytest.param(name, marks=pytest.mark.slow) for name in JOBS]
)
def test_on_ranks(name: str, tmp_path: Path) -> None:
    """All jobs of one start of the ranks, which is what takes long; the first that fails is the last that is run."""
    ranks, context = int(name[0]), forkserver()
    processes = [context.Process(target=run_jobs, args=(rank, ranks, name, str(tmp_path))) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    files = [tmp_path / f"{rank}.json" for rank in range(ranks)]
    found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    for rank, results in enumerate(found):
        failed = {job: results.get(job, "did not run") for job in JOBS[name] if results.get(job) != "passed"}
        assert not failed, f"rank {rank}: {next(iter(failed))}: {next(iter(failed.values()))}"


def test_rows_are_the_least() -> None:
    for ranks in (2, 4, 24):
        context = Context("name", ranks - 1, ranks)
        for tokens in (1, 45, 64, 21120):
            for unit in (1, 4, 16):
                rows = context.rows(tokens, unit)
                assert rows % unit == 0 and ranks * rows >= tokens > ranks * (rows - unit)
                shares = [Context("name", rank, ranks).own(tokens, rows) for rank in range(ranks)]
                assert [index for share in shares for index in range(tokens)[share]] == list(range(tokens))
