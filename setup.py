"""Builds the native code: two op libraries without Python in them, and the optional module `tdm_fast._build_info`.

    tdm_fast/_C_cpu.so     csrc/*.cpp + csrc/cpu/*.cpp, the latter once per instruction set
    tdm_fast/_C_cuda.so    csrc/*.cpp + csrc/cuda/*.cu, where nvcc and a CUDA build of torch are
    tdm_fast/_build.json   for each of the three: "built", or why it was not

Environment: TDM_FAST_BUILD=cpu|cuda|none builds the CPU library, both, or nothing, and fails when it cannot (unset:
what the machine can build; the rest is left out, and what is missing is named). CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST
and MAX_JOBS as usual.

Why the compilers are called directly and torch is no build requirement: the sources use torch's stable ABI, which is
a megabyte of headers and no more. With torch in build-system.requires, pip's isolated build would unpack a second
torch of 5 GB beside the one it installs: a minute, where fetching the headers takes two seconds. And
torch.utils.cpp_extension would give nvcc torch's headers, of which the kernels need none. So the headers come from
the torch that is importable, else from the one in the installing environment, else out of the wheel that the
installation downloads anyway. Nothing of torch is needed for linking either: the libraries name libtorch_cpu.so as
needed, and find it loaded.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_REQUIREMENT = "torch>=2.11"
TORCH_TARGET = "0x020b000000000000"  # 2.11: the first version whose stable ABI has all that csrc/ uses
HEADER_FOLDERS = ("csrc/stable/", "csrc/inductor/aoti_torch/", "headeronly/")
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
CGROUP = "/sys/fs/cgroup"
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall"]
# Every operation rounds as written; without errno and floating-point traps, roots and choices become vectors.
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-lineinfo"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_FLAGS = {"default": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}
# The first two: GCC 12's own AVX-512 headers. The third: a vector register as a template argument.
X86_WARNINGS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-ignored-attributes"]


class Missing(Exception):
    """Something that the build needs is not there, or does not work; the text names it."""


@dataclass
class Torch:
    """Where the stable ABI's headers lie, and which torch they belong to."""

    include: Path
    version: str
    cuda: str | None


@dataclass
class Result:
    """What a library was built with; the texts go into build_info()."""

    compiler: str = ""
    flags: str = ""
    targets: str = ""


def requested_build() -> str:
    build = os.environ.get("TDM_FAST_BUILD", "").strip().lower()
    if build not in ("", "cpu", "cuda", "none"):
        raise SystemExit(f"TDM_FAST_BUILD is {build!r}; it takes cpu, cuda, none, or nothing")
    return build


def find_torch(scratch: Path) -> Torch:
    """The stable ABI's headers: of an installed torch, else out of the wheel that pip would install."""
    for folder in [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), str(scratch)]:
        package = Path(folder or ".") / "torch"
        if (package / "version.py").is_file() and (package / "include/torch/csrc/stable").is_dir():
            torch = describe_torch(package)
            if tuple(int(part) for part in torch.version.split(".")[:2]) >= (2, 11):
                return torch
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    done = subprocess.run([*command, "--dest", str(scratch), TORCH_REQUIREMENT], capture_output=True, text=True)
    wheels = list(scratch.glob("torch-*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise Missing(f"torch's headers: {TORCH_REQUIREMENT} is not installed here, nor could pip fetch it ({last})")
    prefixes = tuple(f"torch/include/torch/{folder}" for folder in HEADER_FOLDERS)
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(
            scratch, [name for name in wheel.namelist() if name.startswith((*prefixes, "torch/version.py"))]
        )
    wheels[0].unlink()
    return describe_torch(scratch / "torch")


def describe_torch(package: Path) -> Torch:
    version_py = (package / "version.py").read_text()
    version = re.search(r"__version__ = ['\"]([^'\"]+)", version_py)
    cuda = re.search(r"^cuda\b.*= ['\"]([^'\"]+)", version_py, re.MULTILINE)
    return Torch(package / "include", version[1] if version else "0.0", cuda[1] if cuda else None)


def find_cxx() -> str:
    if platform.system() not in ("Linux", "Darwin"):
        raise Missing(f"a build for {platform.system()}: the native code is built with GCC or Clang on Linux and macOS")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in names:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise Missing(f"a C++17 compiler: {' or '.join(names)} is not in PATH (Debian and Ubuntu: apt install g++)")


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if (Path(home) / "bin/nvcc").is_file():
            return str(Path(home) / "bin/nvcc")
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise Missing("the CUDA compiler: nvcc is not in CUDA_HOME/bin, PATH or /usr/local/cuda/bin")
    return found


def cuda_architectures(nvcc: str) -> list[str]:
    """The architectures to compile for, such as ["8.0", "9.0", "10.0+PTX"]."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    architectures = re.split(r"[;,\s]+", (named or CUDA_ARCHITECTURES).strip("; "))
    for architecture in architectures:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture):
            raise Missing(f"a CUDA architecture {architecture!r}: TORCH_CUDA_ARCH_LIST takes the like of 8.0;9.0+PTX")
    if named:
        return architectures
    # An older nvcc does not know the newest default; PTX of the newest that it does know runs there all the same.
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [a for a in architectures if f"compute_{_digits(a)}" in listing.split()]
    if not known:
        raise Missing(f"a CUDA compiler for {CUDA_ARCHITECTURES}: {nvcc} is none; name others in TORCH_CUDA_ARCH_LIST")
    return [*known[:-1], known[-1].removesuffix("+PTX") + "+PTX"]


def _digits(architecture: str) -> str:
    return architecture.removesuffix("+PTX").replace(".", "")


def gencode(architectures: Sequence[str]) -> list[str]:
    flags = []
    for architecture in architectures:
        digits = _digits(architecture)
        flags.append(f"-gencode=arch=compute_{digits},code=sm_{digits}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{digits},code=compute_{digits}")
    return flags


def max_jobs() -> int:
    """MAX_JOBS, else one compiler per core that has 2 GiB of free memory."""
    named = os.environ.get("MAX_JOBS", "")
    if named:
        if not named.isdigit() or int(named) < 1:
            raise SystemExit(f"MAX_JOBS is {named!r}; it takes a number of compilers to run at once, 1 or more")
        return int(named)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(free // 2**31 for free in free_memory())]))


def free_memory() -> list[int]:
    """Bytes that the machine and, in a container, the control group have left; what is not known is left out."""
    free = []
    meminfo, limit, used = (Path(p) for p in ("/proc/meminfo", f"{CGROUP}/memory.max", f"{CGROUP}/memory.current"))
    if meminfo.is_file() and (available := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free.append(int(available[1]) * 1024)
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        free.append(int(most) - int(used.read_text()))
    return free


def host_compiler(cxx: str) -> str:
    """The compiler in a CXX such as "ccache g++ -m64", which nvcc wants alone."""
    return next(word for word in shlex.split(cxx) if Path(word).name not in ("ccache", "sccache", "distcc"))


def run(command: Sequence[str | Path]) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise Missing(f"a compiler that takes these sources; it failed:\n  {shlex.join(words)}\n{done.stdout}")
    sys.stdout.write(done.stdout)


def run_all(commands: Sequence[Sequence[str | Path]]) -> None:
    with ThreadPoolExecutor(max_jobs()) as pool:
        list(pool.map(run, commands))


def compiler_version(command: str, line: int = 0) -> str:
    done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True)
    return done.stdout.splitlines()[line]


def binding_commands(cxx: str, torch: Torch, objects: Path, key: str, flags: Sequence[str]) -> list[list[str | Path]]:
    """Compile the bindings, csrc/*.cpp, for the library of dispatch key `key`."""
    define = [f"-DTDM_FAST_NAMESPACE=tdm_fast_{key.lower()}", f"-DTDM_FAST_KEY={key}", *flags]
    define += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", str(torch.include)]
    sources = sorted(set(CSRC.glob("*.cpp")) - {CSRC / "build_info.cpp"})
    return [[*shlex.split(cxx), *CXX_FLAGS, *define, "-c", s, "-o", objects / f"{key}_{s.stem}.o"] for s in sources]


def link(cxx: str, objects: Sequence[Path], needed: Sequence[str], scratch: Path, target: Path, *flags: str) -> None:
    """Link a library that finds torch's symbols in the already loaded libraries `needed`."""
    compiler = shlex.split(cxx)
    if platform.system() == "Darwin":
        run([*compiler, "-shared", "-undefined", "dynamic_lookup", *objects, "-o", target])
        return
    # Empty stand-ins with torch's library names: at run time the loader finds the names among what `import torch`
    # loaded.
    for name in needed:
        soname = f"-Wl,-soname,lib{name}.so"
        run([*compiler, "-shared", "-x", "c", os.devnull, soname, "-o", scratch / f"lib{name}.so"])
    libraries = [f"-L{scratch}", "-Wl,--no-as-needed", *(f"-l{name}" for name in needed), *flags]
    run([*compiler, "-shared", "-s", *objects, *libraries, "-Wl,--exclude-libs,ALL", "-o", target])


def build_cpu(scratch: Path, target: Path) -> Result:
    cxx, torch = find_cxx(), find_torch(scratch)
    targets = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"default": []}
    commands = binding_commands(cxx, torch, scratch, "CPU", ["-Wno-unknown-pragmas"])
    for name, flags in targets.items():
        options = [*CXX_FLAGS, *flags, *X86_WARNINGS, f"-DTDM_FAST_ISA=isa_{name}", "-isystem", str(torch.include)]
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            commands.append([*shlex.split(cxx), *options, "-c", source, "-o", scratch / f"{name}_{source.stem}.o"])
    run_all(commands)
    link(cxx, [Path(c[-1]) for c in commands], ["torch_cpu"], scratch, target)
    return Result(compiler_version(cxx), " ".join(CXX_FLAGS), " ".join(targets))


def build_cuda(scratch: Path, target: Path) -> Result:
    nvcc, cxx, torch = find_nvcc(), find_cxx(), find_torch(scratch)
    if torch.cuda is None:
        raise Missing(f"a CUDA build of torch: torch {torch.version} is built without CUDA")
    architectures = cuda_architectures(nvcc)
    flags = [*NVCC_FLAGS, *gencode(architectures)]
    commands = binding_commands(cxx, torch, scratch, "CUDA", ["-DTDM_FAST_CUDA_LIBRARY", "-DUSE_CUDA"])
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        output = scratch / f"{source.stem}.cu.o"
        commands.append([nvcc, *flags, "-ccbin", host_compiler(cxx), "-c", source, "-o", output])
    run_all(commands)
    # The CUDA runtime goes in statically: then the library does not care which CUDA release torch brings.
    folders = [f"-L{folder}" for folder in _cuda_library_folders(nvcc)]
    runtime = [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link(cxx, [Path(c[-1]) for c in commands], ["torch_cpu", "torch_cuda"], scratch, target, *runtime)
    return Result(compiler_version(nvcc, line=-1), " ".join(flags), ";".join(architectures))


def _cuda_library_folders(nvcc: str) -> list[Path]:
    """Where nvcc's own dry run says that its libraries are: nvcc in PATH may be a wrapper script."""
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    home = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    folders = [home / "lib64", home / "lib", home / f"targets/{platform.machine()}-linux/lib"]
    if not any((folder / "libcudart_static.a").is_file() for folder in folders):
        raise Missing(f"the CUDA runtime: libcudart_static.a is not in {home}/lib64")
    return [folder for folder in folders if folder.is_dir()]


def build_info(target: Path, torch_headers: str, cpu: Result, cuda: Result) -> None:
    try:
        import pybind11
    except ImportError:
        raise Missing("pybind11: it is not in the build environment") from None
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").is_file():
        raise Missing(f"Python's headers: Python.h is not in {include} (Debian and Ubuntu: apt install python3-dev)")
    values = {
        "COMPILER": cpu.compiler,
        "CXX_FLAGS": cpu.flags,
        "INSTRUCTION_SETS": cpu.targets,
        "CUDA_COMPILER": cuda.compiler,
        "CUDA_FLAGS": cuda.flags,
        "CUDA_ARCHITECTURES": cuda.targets,
        "TORCH_HEADERS": torch_headers,
        "TORCH_TARGET": ".".join(str(int(TORCH_TARGET[i : i + 2], 16)) for i in (2, 4)),
    }
    cxx = find_cxx()
    flags = [*CXX_FLAGS, *(f'-DTDM_FAST_{name}="{value}"' for name, value in values.items())]
    flags += ["-isystem", include, "-isystem", pybind11.get_include(), "-shared"]
    flags += ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-s"]
    run([*shlex.split(cxx), *flags, CSRC / "build_info.cpp", "-o", target])


class BuildNative(build_ext):
    """Builds all three into the package's folder: the source tree's when editable or in place, else the build's."""

    def run(self) -> None:
        in_source = self.inplace or getattr(self, "editable_mode", False)
        self.package = ROOT / "tdm_fast" if in_source else Path(self.build_lib) / "tdm_fast"
        self.package.mkdir(parents=True, exist_ok=True)
        for old in self.outputs():
            old.unlink(missing_ok=True)
        self.status: dict[str, str] = {}
        build = requested_build()
        with tempfile.TemporaryDirectory(prefix="tdm_fast_build_") as folder:
            self.build_all(Path(folder), build)
        (self.package / "_build.json").write_text(json.dumps(self.status, indent=2) + "\n")

    def build_all(self, scratch: Path, build: str) -> None:
        wanted = {"": ("cpu", "cuda"), "cpu": ("cpu",), "cuda": ("cpu", "cuda"), "none": ()}[build]
        results = {"cpu": Result(), "cuda": Result()}
        for name, builder in (("cpu", build_cpu), ("cuda", build_cuda)):
            if name not in wanted:
                self.status[name] = f"TDM_FAST_BUILD={build} left it out"
                continue
            try:
                results[name] = builder(scratch, self.package / f"_C_{name}.so")
                self.status[name] = "built"
            except Missing as missing:
                if build:
                    message = f"tdm_fast: TDM_FAST_BUILD={build}, but the {name} library needs {missing}"
                    raise SystemExit(message) from None
                self.status[name] = f"the build needs {missing}"
        if not wanted or self.status["cpu"] != "built":
            self.status["build_info"] = "built with the cpu library only"
        else:
            try:
                suffix = sysconfig.get_config_var("EXT_SUFFIX")
                headers = find_torch(scratch).version
                build_info(self.package / f"_build_info{suffix}", headers, results["cpu"], results["cuda"])
                self.status["build_info"] = "built"
            except Missing as missing:
                self.status["build_info"] = f"the build needs {missing}"
        if self.status["cpu"] != "built" and not build:
            print(f"WARNING: tdm_fast is installed as pure Python: {self.status['cpu']}", file=sys.stderr)

    def outputs(self) -> list[Path]:
        names = ["_C_cpu.so", "_C_cuda.so", "_build.json", f"_build_info{sysconfig.get_config_var('EXT_SUFFIX')}"]
        return [self.package / name for name in names]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.outputs() if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # tdm_fast/kernels is a link to kernels/ for runs from the source tree; the installed package gets the files
    # themselves, also where links do not survive.
    packages=sorted({*find_packages(ROOT, include=["tdm_fast", "tdm_fast.*"]), "tdm_fast.kernels"}),
    package_dir={"tdm_fast": "tdm_fast", "tdm_fast.kernels": "kernels"},
    # The sources are BuildNative's affair; the entry tells setuptools that the wheel is for this platform.
    ext_modules=[Extension("tdm_fast._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
