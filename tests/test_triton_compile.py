"""Every Triton kernel compiles for sm_80 and sm_90, here without a GPU, and as it should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_COMPILE = """
import sys
import torch
import test_triton as cases
from op_cases import CASES, normal, results
from tdm_fast.ops import _dispatch
from triton_without_gpu import compiled_by, resources

architecture = int(sys.argv[1])
cases.DEVICE = "cpu"
# The tensors are the CPU's, since their addresses and shapes are all that a compiler sees of them.
_dispatch.unavailable = lambda backend, device_type: None
checked = set()


def check(launched, polynomials=False):
    for name, kernel in launched:
        if kernel.hash in checked:
            continue
        checked.add(kernel.hash)
        usage, ptx = resources(kernel), kernel.asm["ptx"]
        assert kernel.metadata.target.arch == architecture
        assert usage["STACK"] == usage["LOCAL"] == 0 and usage["REG"] < 255, (name, usage)
        # Latents are read and written 16 bytes at a time; nothing was contracted but the polynomials of the noise.
        if name not in ("_finish_kernel", "_log_weight_kernel", "_sample_intervals_kernel"):
            assert "ld.global.v4" in ptx and "st.global.v4" in ptx, name
        assert ("fma.rn.f32" in ptx) == (polynomials and name == "_renoise_kernel"), name
        assert "div.full" not in ptx and "sqrt.approx" not in ptx, name


for name, case in CASES.items():
    if "-flow" in name or "-epsilon" in name:
        continue  # other tables, the same kernels
    for dtypes in ([torch.float32], [torch.bfloat16, torch.float16]):
        latents = [normal((2, 4, 64, 64), dtypes[i % len(dtypes)], i) for i in range(case.latents)]
        check(compiled_by(lambda: results(case, latents, "triton"), architecture))

# What changes in every iteration compiles nothing new.
for launch in (
    lambda draw: cases.ops.sample_intervals(5, num_steps=4, total_steps=900, backend="triton", **draw),
    lambda draw: cases.fresh_noise((2, 4096), draw),
):
    kernels = []
    for value in (0, 1, 16, (1 << 31) + 5, (1 << 32) - 1):
        draw = {"seed": (value << 31) - 3, "iteration": value, "stream": value % 65536, "sample_offset": value}
        launched = compiled_by(lambda: launch(draw), architecture)
        check(launched, polynomials=True)
        kernels.append([kernel.hash for _, kernel in launched])
    assert kernels[0] and all(hashes == kernels[0] for hashes in kernels), kernels
print(f"{len(checked)} kernels compiled")
"""


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles(architecture: int, tmp_path: Path) -> None:
    """No spill and no stack frame; in a process of its own, whose kernels are not the interpreter's."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _COMPILE, str(architecture)],
        env={
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            **{"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "TRITON_CACHE_DIR": str(tmp_path)},
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 30
