"""Options of the benchmarks, which cases run, and what a result's JSON says about machine and commit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_cases
import pytest
import torch
from bench_timing import Settings, last_level_cache

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tdm_fast benchmarks")
    group.addoption("--matrix", choices=("default", "full", "tiny"), default="default", help="which cases to measure")
    group.addoption("--ops", default="", help="only these ops, separated by commas ('copy' is one)")
    group.addoption("--dtypes", default="", help="such as fp32,bf16; all three with --matrix=full, else without fp16")
    group.addoption("--warm", action="store_true", help="leave the caches as the round before left them")
    group.addoption("--seconds", type=float, default=0.4, help="time for the rounds of one case")
    group.addoption(
        "--compile-part",
        default="",
        metavar="I/N",
        help="measure nothing: fill torch.compile's cache with the I-th of N parts of what --matrix would compile",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config, kinds = metafunc.config, {"case": _cases, "copied": _copies, "draw": _draws}
    for name, (values, label) in ((name, kinds[name](config)) for name in kinds if name in metafunc.fixturenames):
        if values:
            metafunc.parametrize(name, values, ids=label)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the benchmarks that these options leave without a case."""
    empty = [item for item in items if item.path.parent == HERE and not hasattr(item, "callspec")]
    config.hook.pytest_deselected(items=empty)
    items[:] = [item for item in items if item not in empty]


def _names(config: pytest.Config, option: str, known: Sequence[str]) -> list[str]:
    names = [name for name in config.getoption(option).split(",") if name] or list(known)
    if unknown := [name for name in names if name not in known]:
        raise pytest.UsageError(f"{option} has {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def _ops(config: pytest.Config) -> list[str]:
    return _names(config, "--ops", [*bench_cases.OPS, "copy", "sample_intervals"])


def _dtypes(config: pytest.Config) -> list[str]:
    names, matrix = _names(config, "--dtypes", list(bench_cases.DTYPES)), config.getoption("--matrix")
    if matrix == "default" and not config.getoption("--dtypes"):
        names.remove("fp16")
    return names[:1] if matrix == "tiny" else names


def _cases(config: pytest.Config) -> tuple[list[Any], Callable[[Any], str]]:
    cases = bench_cases.latent_cases(config.getoption("--matrix"), DEVICE, _ops(config), _dtypes(config))
    if part := config.getoption("--compile-part"):
        index, count = (int(number) for number in part.split("/"))
        cases = [case for case in cases if case.provider.startswith("compile")][index - 1 :: count]
    return cases, str


def _copies(config: pytest.Config) -> tuple[list[Any], Callable[[Any], str]]:
    """The sizes of all latents that are measured, and one beyond the last-level cache per dtype."""
    cases = bench_cases.latent_cases(config.getoption("--matrix"), DEVICE, list(bench_cases.OPS), _dtypes(config))
    sizes = list(dict.fromkeys((case.latents, case.batch, case.dtype) for case in cases))
    sizes += [("large", 1, dtype) for dtype in _dtypes(config)]
    wanted = "copy" in _ops(config) and not config.getoption("--compile-part")
    return sizes if wanted else [], lambda size: f"copy-{size[0]}-B{size[1]}-{size[2]}"


def _draws(config: pytest.Config) -> tuple[list[Any], Callable[[Any], str]]:
    batches = (64,) if config.getoption("--matrix") == "tiny" else bench_cases.INTERVAL_BATCHES
    providers = ("torch", *bench_cases.ours("sample_intervals", DEVICE))
    draws = [(batch, provider) for batch in batches for provider in providers]
    wanted = "sample_intervals" in _ops(config) and not config.getoption("--compile-part")
    return draws if wanted else [], lambda draw: f"sample_intervals-B{draw[0]}-{draw[1]}"


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
