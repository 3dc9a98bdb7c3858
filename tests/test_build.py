"""The native build: what it made, how it is told what to make, and what it says when something is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools

from tdm_fast import native

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "kernels", "tdm_fast")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py, without a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def _build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` into `folder`."""
    env = {
        k: v for k, v in os.environ.items() if k not in ("CXX", "TDM_FAST_BUILD", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST")
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
    return subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True)


def test_build_info_tells_what_the_library_was_built_with() -> None:
    info = native.build_info()
    assert native.build_status("cpu") == native.build_status("build_info") == "built"
    assert info is not None
    assert info["torch_target"] == "2.11"
    assert re.search(r"\d+\.\d+", info["compiler"]) and "-std=c++17" in info["cxx_flags"]
    assert info["instruction_set"] in info["instruction_sets"].split()
    assert bool(info["cuda_architectures"]) == (native.build_status("cuda") == "built")


@pytest.mark.parametrize("backend", native.LIBRARIES)
def test_op_libraries_use_the_stable_abi_and_no_python(backend: str) -> None:
    """One file serves every Python and every torch from 2.11 on: it names no symbol of either but the stable C ones."""
    path = native.library_path(backend)
    if not path.is_file():
        assert native.build_status(native.LIBRARIES[backend]) != "built"
        return
    symbols = subprocess.run(["nm", "-D", str(path)], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[-1] for line in symbols.splitlines() if " U " in line}
    torch_symbols = {name for name in undefined if "torch" in name or "c10" in name or re.match(r"_ZNK?2at", name)}
    assert torch_symbols and all(name.startswith(("aoti_torch_", "torch_")) for name in torch_symbols)
    assert not [name for name in undefined if name.lstrip("_").startswith("Py")]
    needed = re.findall(r"NEEDED.*\[(.+)\]", subprocess.check_output(["readelf", "-d", str(path)], text=True))
    assert "libtorch_cpu.so" in needed and not [name for name in needed if "python" in name or "cudart" in name]


def test_kernels_are_installed_inside_the_package() -> None:
    spec = importlib.util.find_spec("tdm_fast.kernels.ode_step")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).read_text() == (ROOT / "kernels/ode_step.py").read_text()


def test_without_a_compiler_the_installation_is_pure_python_with_one_warning(tmp_path: Path) -> None:
    done = _build(tmp_path, PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "pure Python" in warnings[0] and "g++ or c++ or clang++ is not in PATH" in warnings[0]
    assert [path.name for path in (tmp_path / "tdm_fast").iterdir()] == ["_build.json"]
    assert "C++17 compiler" in json.loads((tmp_path / "tdm_fast/_build.json").read_text())["cpu"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"TDM_FAST_BUILD": "cpu", "PATH": "/nowhere"},
            "the cpu library needs a C++17 compiler: g++ or c++ or clang++",
        ),
        ({"TDM_FAST_BUILD": "cpu", "CXX": "no-such-compiler"}, "no-such-compiler is not in PATH"),
        ({"TDM_FAST_BUILD": "cpu", "CXX": "false"}, "a compiler that takes these sources; it failed"),
        ({"TDM_FAST_BUILD": "rocm"}, "TDM_FAST_BUILD is 'rocm'; it takes cpu, cuda, none"),
        ({"TDM_FAST_BUILD": "cpu", "MAX_JOBS": "many"}, "MAX_JOBS is 'many'"),
    ],
)
def test_errors_name_what_is_missing(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    done = _build(tmp_path, **environment)
    assert done.returncode != 0 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_left_out_on_request(tmp_path: Path) -> None:
    done = _build(tmp_path, TDM_FAST_BUILD="none")
    assert done.returncode == 0 and "WARNING" not in done.stderr
    assert json.loads((tmp_path / "tdm_fast/_build.json").read_text())["cpu"] == "TDM_FAST_BUILD=none left it out"


def test_number_of_compilers(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert script["max_jobs"]() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= script["max_jobs"]() <= (os.cpu_count() or 1)
    # 3 GiB free: one compiler, however many cores there are.
    monkeypatch.setitem(script["free_memory"].__globals__, "CGROUP", "/nowhere")
    monkeypatch.setattr(Path, "read_text", lambda self: "MemTotal: 99 kB\nMemAvailable:    3145728 kB\n")
    assert script["max_jobs"]() == 1


def test_memory_is_the_containers(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(script["free_memory"].__globals__, "CGROUP", str(tmp_path))
    (tmp_path / "memory.max").write_text("max\n")
    assert len(script["free_memory"]()) == 1
    (tmp_path / "memory.max").write_text(f"{5 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2 * 2**30}\n")
    assert script["free_memory"]()[1] == 3 * 2**30
    assert script["max_jobs"]() == 1


def test_nvcc_gets_the_compiler_behind_a_cache(script: dict[str, Any]) -> None:
    assert [script["host_compiler"](cxx) for cxx in ("g++", "/usr/bin/ccache clang++ -m64")] == ["g++", "clang++"]


def _fake_nvcc(folder: Path, architectures: str) -> str:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho {architectures}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def test_cuda_architectures(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    architectures: Callable[[str], list[str]] = script["cuda_architectures"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    new = _fake_nvcc(tmp_path, "compute_80 compute_90 compute_100")
    assert architectures(new) == ["8.0", "9.0", "10.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    assert architectures(new) == ["8.6", "9.0a+PTX"]
    assert script["gencode"](["8.6", "9.0a+PTX"]) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(script["Missing"], match="'Hopper'"):
        architectures(new)


def test_an_older_cuda_compiler_leaves_out_what_it_does_not_know(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert script["cuda_architectures"](_fake_nvcc(tmp_path, "compute_80 compute_90")) == ["8.0", "9.0+PTX"]


_USE = """
import importlib.util, torch
from tdm_fast import native
from tdm_fast.ops import ode_step
from tdm_fast.schedule import Schedule
assert importlib.util.find_spec("tdm_fast.kernels.ode_step")
step = torch.tensor([899, 674])
x = ode_step(torch.ones(2, 3), torch.ones(2, 3), schedule=Schedule.flow(), t=step, t_next=step - 225, backend="cpp")
print(native.library_path("cpp").parent, x.shape, native.build_info()["torch_target"])
"""


def _copy_source(target: Path) -> Path:
    target.mkdir()
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def _environment(folder: Path) -> tuple[str, Path]:
    """A virtual environment with everything that this one has, save tdm_fast; its Python and its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin/python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    for entry in Path(setuptools.__file__).parents[1].iterdir():
        own = site_packages / entry.name
        if not own.exists() and entry.suffix != ".pth" and not entry.name.startswith(("tdm_fast", "__editable__")):
            own.symlink_to(entry)
    return python, site_packages


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_every_way_to_install(kind: str, tmp_path: Path) -> None:
    """In a fresh environment, the build isolated, as pip does it by default."""
    source = _copy_source(tmp_path / "source")
    python, site_packages = _environment(tmp_path / "venv")
    target = [str(source)]
    if kind == "sdist":
        code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
        listing = subprocess.check_output([sys.executable, "-c", code], cwd=source, text=True)
        target = [str(tmp_path / listing.splitlines()[-1])]
    elif kind == "editable":
        target = ["--editable", str(source)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TDM_FAST_BUILD": "cpu"}
    subprocess.run([python, "-m", "pip", "install", "--no-deps", *target], check=True, cwd=tmp_path, env=environment)
    used = subprocess.check_output([python, "-c", _USE], cwd=tmp_path, text=True, env=environment)
    package = source / "tdm_fast" if kind == "editable" else site_packages / "tdm_fast"
    assert used == f"{package} torch.Size([2, 3]) 2.11\n"


# Two builds of the supported range: one for CUDA and one for the CPU alone, of different minor versions.
TORCH_BUILDS = ("2.13.0", "2.14.1")


@pytest.mark.slow
def test_a_library_runs_under_another_torch(tmp_path: Path) -> None:
    """Built here, beside this environment's torch; used in an environment that has another one, installed by pip."""
    here = importlib.metadata.version("torch").partition("+")[0]
    other = next(version for version in TORCH_BUILDS if version != here)
    source = _copy_source(tmp_path / "source")
    build = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(build, check=True, cwd=source, env=environment | {"TDM_FAST_BUILD": "cpu"})
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={other}", str(wheel), "pytest", "scipy"], check=True)
    code = "import torch, tdm_fast; print(torch.__version__, tdm_fast.__file__)"
    used = subprocess.check_output([python, "-c", code], cwd=tmp_path, text=True, env=environment)
    assert used.startswith(other) and str(tmp_path / "venv") in used
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("conftest.py", "__pycache__"))
    tests = [python, "-m", "pytest", "-q", "-c", "/dev/null", "test_native_ops.py", "-m", "not slow"]
    subprocess.run(tests, check=True, cwd=tmp_path / "tests", env=environment)
