"""Context parallelism of the transformer: on 2 and on 4 ranks the numbers of one, and no byte more than announced."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator

import pytest
from context_jobs import jobs_on, run_jobs

from tdm_fast.models.context import Context

Outcomes = Callable[[int], list[dict[str, str]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    """What came of the jobs, rank by rank, for a number of ranks; run once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tdm_fast.train", "tdm_fast.sample", "tdm_fast.make_teacher"])  # as conftest.py
    found: dict[int, list[dict[str, str]]] = {}

    def run(ranks: int) -> list[dict[str, str]]:
        if ranks not in found:
            folder = tmp_path_factory.mktemp(f"{ranks}-ranks")
            processes = [context.Process(target=run_jobs, args=(rank, ranks, str(folder))) for rank in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(180)
                process.kill()
            files = [folder / f"{rank}.json" for rank in range(ranks)]
            found[ranks] = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        return found[ranks]

    yield run


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        pytest.param(ranks, name, marks=pytest.mark.slow if ranks == 4 or name == "exchanges" else ())
        for ranks in (2, 4)
        for name in jobs_on(ranks)
    ],
)
def test_on_ranks(outcomes: Outcomes, ranks: int, name: str) -> None:
    for rank, results in enumerate(outcomes(ranks)):
        assert results.get(name, "did not run, see the first that failed") == "passed", f"rank {rank}"


def test_rows_are_the_least() -> None:
    for ranks in (2, 4, 24):
        context = Context("name", ranks - 1, ranks)
        for tokens in (1, 45, 64, 21120):
            for unit in (1, 4, 16):
                rows = context.rows(tokens, unit)
                assert rows % unit == 0 and ranks * rows >= tokens > ranks * (rows - unit)
                shares = [Context("name", rank, ranks).own(tokens, rows) for rank in range(ranks)]
                assert [index for share in shares for index in range(tokens)[share]] == list(range(tokens))
