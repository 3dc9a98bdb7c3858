"""Options of the benchmarks, which cases run, and what a result's JSON says about machine and commit."""

from __future__ import annotations

import os
import sys
from typing import Any

import bench_cases
import pytest
import torch
from bench_timing import Settings, last_level_cache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tdm_fast benchmarks")
    group.addoption("--matrix", choices=("default", "full", "tiny"), default="default", help="which cases to measure")
    group.addoption("--ops", default="", help="only these ops, separated by commas ('copy' is one)")
    group.addoption("--dtypes", default="fp32,bf16", help="of fp32, bf16, fp16, separated by commas")
    group.addoption("--warm", action="store_true", help="leave the caches as the round before left them")
    group.addoption("--seconds", type=float, default=0.4, help="time for the rounds of one case")
    group.addoption(
        "--compile-part",
        default="",
        metavar="I/N",
        help="measure nothing: fill torch.compile's cache with the I-th of N parts of what --matrix would compile",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    names = [name for name in option("--ops").split(",") if name] or [*bench_cases.OPS, "copy", "sample_intervals"]
    dtypes = ["fp32"] if option("--matrix") == "tiny" else [name for name in option("--dtypes").split(",") if name]
    for given, known in ((names, [*bench_cases.OPS, "copy", "sample_intervals"]), (dtypes, list(bench_cases.DTYPES))):
        if unknown := sorted(set(given) - set(known)):
            raise pytest.UsageError(f"{', '.join(unknown)}: unknown; there are {', '.join(known)}")
    part = option("--compile-part")
    if "case" in metafunc.fixturenames:
        cases = bench_cases.latent_cases(option("--matrix"), DEVICE, names, dtypes)
        if part:
            index, count = (int(number) for number in part.split("/"))
            cases = [case for case in cases if case.provider.startswith("compile")][index - 1 :: count]
        metafunc.parametrize("case", cases, ids=str)
    if "copied" in metafunc.fixturenames:
        sizes = sorted({(case.latents, case.batch, case.dtype) for case in _all(option("--matrix"), dtypes)})
        sizes += [("large", 1, dtype) for dtype in dtypes]
        wanted = "copy" in names and not part
        metafunc.parametrize("copied", sizes if wanted else [], ids=lambda size: f"copy-{size[0]}-B{size[1]}-{size[2]}")
    if "draw" in metafunc.fixturenames:
        batches = (64,) if option("--matrix") == "tiny" else bench_cases.INTERVAL_BATCHES
        draws = [(size, name) for size in batches for name in ("torch", *bench_cases.ours("sample_intervals", DEVICE))]
        wanted = "sample_intervals" in names and not part
        metafunc.parametrize("draw", draws if wanted else [], ids=lambda d: f"sample_intervals-B{d[0]}-{d[1]}")


def _all(matrix: str, dtypes: list[str]) -> list[bench_cases.Case]:
    return bench_cases.latent_cases(matrix, DEVICE, list(bench_cases.OPS), dtypes)


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    cold = not pytestconfig.getoption("--warm")
    if pytestconfig.getoption("--matrix") == "tiny":
        return Settings(seconds=0.02, min_rounds=2, max_rounds=5, cold=cold)
    return Settings(seconds=pytestconfig.getoption("--seconds"), min_rounds=5, max_rounds=100, cold=cold)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the machine's name on its network is nobody's business
    cpu = machine_info.get("cpu", {})
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu.get("brand_raw", machine_info["machine"])
    machine_info.update(
        device=name,
        device_type=DEVICE,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        last_level_cache=last_level_cache(DEVICE),
        caches="warm" if config.getoption("--warm") else "cold",
        command=" ".join(["pytest", *sys.argv[1:]]),
    )


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Statistics are kept, single rounds are not: results are committed."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        entry["params"] = None
        entry["options"] = None
