"""Attention: every path against the definition in float64, what it allocates, who runs what, and what is refused."""

from __future__ import annotations

import copy
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention as DiffusersAttention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdm_fast import attention, cli, notes, preflight
from tdm_fast.attention import attend, choose, kept_first, set_attention
from tdm_fast.config import parse_train
from tdm_fast.models import OpenSoraT2V_v1_3
from tdm_fast.models.denoiser import Roles
from tdm_fast.models.loading import load_pipeline
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.parallel import Compilations, apply_checkpointing, compile_blocks, compile_bound
from tdm_fast.schedule import Schedule
from tdm_fast.step import make_state
from tdm_fast.train import train

CPU = torch.device("cpu")
BATCH, QUERIES, KEYS, HEADS, DIM = 3, 13, 10, 4, 24

Given = dict[str, Any]
CASES: dict[str, Given] = {
    "all keys": {},
    "lengths": {"lengths": torch.tensor([10, 1, 6], dtype=torch.int32)},
    "lengths of groups": {"lengths": (10, 9, 9, 0)},
    "lengths of two groups": {"lengths": (3, 10)},
    "mask": {"mask": torch.rand(BATCH, 1, 1, KEYS, generator=torch.Generator().manual_seed(1)) > 0.5},
    "masks of groups": {"mask": torch.rand(BATCH, 2, 1, KEYS, generator=torch.Generator().manual_seed(3)) > 0.4},
    "one mask for all": {"mask": torch.arange(KEYS)[None, None, None] % 3 > 0},
}


def definition(query: Tensor, key: Tensor, value: Tensor, given: Given) -> Tensor:
    """Sample by sample, head by head, over a list of the keys that count."""
    outs = torch.empty_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            keep = torch.ones(key.shape[1], dtype=torch.bool, device=key.device)
            lengths, mask = given.get("lengths"), given.get("mask")
            if isinstance(lengths, tuple):
                keep[lengths[h * len(lengths) // query.shape[2]] or key.shape[1] :] = False
            elif lengths is not None:
                keep[int(lengths[b]) :] = False
            if mask is not None:
                keep = mask[b % mask.shape[0], h * mask.shape[1] // query.shape[2], 0]
            weights = (query[b, :, h] @ key[b, keep, h].T / query.shape[-1] ** 0.5).softmax(dim=-1)
            outs[b, :, h] = weights @ value[b, keep, h]
    return outs


def outcome(run: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of queries, keys and values, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = run(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).bfloat16()
    gradients = torch.autograd.grad(out, leaves, weights.to(dtype))
    return [x.detach().double() for x in (out, *gradients)]


def assert_as_exact_as_math(
    given: Given, backend: str, dtype: torch.dtype, device: torch.device = CPU, **sizes: int
) -> None:
    """At most twice math's own error in this precision, each the root of the mean square."""
    generator = torch.Generator().manual_seed(0)
    tokens, dim = {"queries": QUERIES, "keys": KEYS} | sizes, sizes.pop("dim", DIM)
    shapes = [(BATCH, tokens[name], HEADS, dim) for name in ("queries", "keys", "keys")]
    # Numbers that every dtype has, so that the exact result is of the same question.
    inputs = [torch.randn(shape, generator=generator).bfloat16().double().to(device) for shape in shapes]
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    exact = outcome(lambda *x: definition(*x, given), inputs, torch.float64)
    math = outcome(lambda *x: attend(*x, **given, backend="math"), inputs, dtype)
    found = outcome(lambda *x: attend(*x, **given, backend=backend), inputs, dtype)
    for gold, plain, ours in zip(exact, math, found, strict=True):
        assert float((ours - gold).norm()) <= 2 * float((plain - gold).norm())


# ---- kernels that a CPU lacks, by definitions that have their signatures


def varlen(query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Of packed `[tokens, heads, head_dim]`; gradients of keys that belong to no sequence are not numbers."""
    assert ends_q.dtype == ends_k.dtype == torch.int32 and query.is_contiguous() and key.is_contiguous()
    assert int(ends_q.diff().max()) <= max_q and int(ends_k.diff().max()) <= max_k
    key, value = (Garbage.apply(x, int(ends_k[-1])) for x in (key, value))
    parts = [
        definition(query[None, a:b], key[None, c:d], value[None, c:d], {})[0]
        for a, b, c, d in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    ]
    return torch.cat(parts)


class Garbage(torch.autograd.Function):
    """Leaves rows from `end` on without a gradient that anybody computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: int) -> Tensor:  # type: ignore[override]
        ctx.end = end
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone()
        gradient[ctx.end :] = torch.nan
        return gradient, None


def xformers_forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-sums in rows up to a multiple of 32, as one of its kernels has them; no output in order."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if bias is not None:
        assert bias.shape == scores.shape and bias.dtype == query.dtype and bias.stride(2) == 0
        assert bias.stride(0) * bias.itemsize % 16 == 0 and bias.untyped_storage().nbytes() < scores.nbytes
        scores = scores + bias
    out = torch.einsum("bhqk,bkhd->bhqd", scores.softmax(-1), value).transpose(1, 2)
    return out, F.pad(scores.logsumexp(-1).float(), (0, -query.shape[1] % 32), value=torch.nan)


def xformers_backward(
    grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    assert lse.shape[-1] == -(-query.shape[1] // 32) * 32
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5 + (0 if bias is None else bias)
    weights = (scores - lse[..., : query.shape[1], None]).exp().to(query.dtype)
    inner = torch.einsum("bqhd,bkhd->bhqk", grad, value) - (grad * output).sum(-1).transpose(1, 2)[..., None]
    inner = weights * inner / query.shape[-1] ** 0.5
    return (
        torch.einsum("bhqk,bkhd->bqhd", inner, key),
        torch.einsum("bhqk,bqhd->bkhd", inner, query),
        torch.einsum("bhqk,bqhd->bkhd", weights, grad),
    )


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's varlen attention, flash-attn and xformers, computed on the CPU."""
    flash_attn: Any = types.ModuleType("flash_attn")
    flash_attn.flash_attn_func = lambda q, k, v: torch.stack(
        [varlen(*x, *(torch.tensor([0, len(y)], dtype=torch.int32) for y in x[:2]), len(x[0]), len(x[1]))
         for x in zip(q.contiguous(), k.contiguous(), v.contiguous(), strict=True)]
    )  # fmt: skip
    flash_attn.flash_attn_varlen_func = varlen
    ops: Any = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention_forward_requires_grad = xformers_forward
    ops.memory_efficient_attention_backward = xformers_backward
    for name, module in {"flash_attn": flash_attn, "xformers.ops": ops}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_what_a_cpu_runs_is_as_exact_as_the_definition(backend: str, case: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_math(CASES[case], backend, dtype)
    if case == "all keys":
        assert_as_exact_as_math({}, backend, dtype, queries=70, keys=70)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["varlen", "flash", "flash4", "xformers"])
@pytest.mark.usefixtures("stand_ins")
def test_kernels_of_gpus_are_given_the_right_keys(backend: str, case: str) -> None:
    assert_as_exact_as_math(CASES[case], backend, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash", "flash4", "xformers"])
def test_what_a_gpu_runs_is_as_exact_as_the_definition(
    backend: str, case: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    cuda = torch.device("cuda")
    if attention.lacks(backend, cuda, dtype, (64,)):
        if backend != "varlen":
            with pytest.raises(ValueError, match=f"--attention {backend}: it needs"):
                choose(backend, nn.Linear(1, 1), cuda, dtype)  # type: ignore[arg-type]
        return
    if backend == "flash4":
        request.addfinalizer(torch.nn.attention.restore_flash_attention_impl)
        assert choose("flash4", nn.Linear(1, 1), cuda, dtype).backend == "flash4"
    assert_as_exact_as_math(CASES[case], backend, dtype, cuda, queries=333, dim=64)


def test_kept_keys_come_first_in_their_order() -> None:
    order, lengths = kept_first(torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).bool())
    assert order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]] and lengths.tolist() == [2, 4, 3]
    assert lengths.dtype == torch.int32


def test_xformers_op() -> None:
    query, key, value = (torch.randn(2, 5, 3, 8) for _ in range(3))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (query, key, value)]
        out, lse, rows = torch.ops.tdm_fast.xformers_attention(*fakes, None)
    assert out.shape == query.shape and lse.shape == (2, 3, 128) and rows.device == CPU


# ---- networks of this project


def model(**changes: Any) -> OpenSoraT2V_v1_3:
    """Two dense layers and two sparse ones, of either order; every weight matters."""
    settings: dict[str, Any] = {
        "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 6, "in_channels": 4, "patch_size": 2,
        "patch_size_t": 1, "caption_channels": 8, "activation_fn": "gelu-approximate", "sparse1d": True, "sparse_n": 2,
    }  # fmt: skip
    made = OpenSoraT2V_v1_3(**settings | changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return made


def call(size: tuple[int, int, int] = (3, 6, 10), masks: bool = True, video_mask: bool = False) -> dict[str, Tensor]:
    """45 tokens by default, so that sparse layers have padding; texts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn(2, 4, *size, generator=generator),
        "timestep": torch.rand(2, generator=generator) * 999,
        "encoder_hidden_states": torch.randn(2, 1, 5, 8, generator=generator),
    }
    if masks:
        given["encoder_attention_mask"] = torch.tensor([[[1, 1, 1, 0, 0]], [[0, 1, 0, 1, 1]]])
    if video_mask:
        given["attention_mask"] = torch.rand(2, *size, generator=generator) > 0.6
    return given


def results(network: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    output = network(**given).sample
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output.detach(), *torch.autograd.grad((weights * output).sum(), list(network.parameters()))]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    scale = max(float(x.abs().max()) for x in expected[1:])  # a key's bias has a gradient of rounding only
    for mine, wanted in zip(found, expected, strict=True):
        assert float((mine - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()) + 1e-7 * scale


@pytest.mark.parametrize("video_mask", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash", "flash4", "xformers"])
@pytest.mark.usefixtures("stand_ins")
def test_a_network_gives_the_same_with_every_backend(backend: str, video_mask: bool) -> None:
    network, given = model(), call(video_mask=video_mask)
    set_attention(network, "math")
    expected = results(network, given)
    set_attention(network, backend)
    assert_close(results(copy.deepcopy(network), given), expected)
    layers = [module for module in copy.deepcopy(network).modules() if hasattr(module, "attention_backend")]
    assert len(layers) == 8 and {layer.attention_backend for layer in layers} == {backend}


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf._base is None:
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return result


@pytest.mark.parametrize("video_mask", [False, True])
def test_no_mask_is_as_large_as_queries_times_keys(video_mask: bool) -> None:
    network, given = model(num_attention_heads=1), call((5, 34, 34), video_mask=video_mask)  # 1445 tokens, padded
    made = {}
    for backend in ("sdpa", "math"):
        set_attention(network, backend)
        with Largest() as largest:
            results(network, given)
        made[backend] = largest.elements
    tokens = 5 * 17 * 17
    assert made["math"] >= 2 * tokens**2
    assert made["sdpa"] <= 2 * 1448 * 6 * 6  # the feed-forward's activations, as without any mask
    set_attention(network, "sdpa")
    with Largest() as largest:
        results(network, call((5, 34, 34), masks=False))
    assert made["sdpa"] == largest.elements


@pytest.mark.parametrize(("backend", "checkpointing"), [("sdpa", "none"), ("xformers", "selective")])
@pytest.mark.usefixtures("stand_ins")
def test_blocks_compile_whole_with_lengths(backend: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    network, given = model(num_layers=3), call()
    monkeypatch.setattr("tdm_fast.parallel.blocks_of", lambda network: network.transformer_blocks[2:])  # the sparse one
    set_attention(network, backend)
    expected = results(network, given)
    apply_checkpointing(network, checkpointing)  # type: ignore[arg-type]
    denoiser = OpenSoraDenoiser(network, Schedule.ddpm(prediction_type="v_prediction"))
    compilations = Compilations(compile_bound(Roles(denoiser, denoiser, denoiser)), "aot_eager")
    compile_blocks(network, compilations)
    assert_close(results(network, given), expected)
    assert compilations.count == 1


# ---- networks of others


def processor_of(kind: str) -> type:
    """One as the package opensora's is: tokens first, biases of keys for every head, from its own module."""
    scope: dict[str, Any] = {"F": F, "torch": torch, "__name__": f"{kind}.modules"}
    exec(
        """
class OpenSoraAttnProcessor2_0:
    def __init__(self):
        self.calls = 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        heads, batch = attn.heads, hidden_states.shape[1]
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (F.dropout(x, 0.0).unflatten(2, (heads, -1)).permute(1, 2, 0, 3) for x in split)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=0.0, is_causal=False
        )
        return attn.to_out[0](out.permute(2, 0, 1, 3).flatten(2))
""",
        scope,
    )
    return scope["OpenSoraAttnProcessor2_0"]


@pytest.mark.parametrize("backend", ["varlen", "flash", "flash4", "xformers", "math"])
@pytest.mark.usefixtures("stand_ins")
def test_processors_of_opensora_call_attend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.ModuleList(
        DiffusersAttention(query_dim=12, heads=2, dim_head=6, processor=processor_of("opensora")()) for _ in range(2)
    ).double()
    x, text = torch.randn(7, 3, 12).double(), torch.randn(4, 3, 12).double()
    bias = (
        torch.zeros(3, 1, 1, 4).double().masked_fill(torch.rand(3, 1, 1, 4) > 0.5, -10000.0).repeat_interleave(2, dim=1)
    )
    bias[1] = -10000.0

    def run(modules: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = modules[1](modules[0](leaf), encoder_hidden_states=text, attention_mask=bias)
        return [
            out.detach(),
            *torch.autograd.grad(out.square().sum(), [leaf, *modules.parameters()], allow_unused=False),
        ]

    expected, before = run(network), type(network[0].processor)
    backends = []
    monkeypatch.setattr(
        attention, "attend", lambda *x, backend, **k: backends.append(backend) or attend(*x, backend=backend, **k)
    )
    set_attention(network, backend)
    assert_close(run(copy.deepcopy(network)), expected)
    assert backends == [backend] * 2
    set_attention(network, "sdpa")
    assert type(network[0].processor) is before and len(backends) == 2
    assert all(map(torch.equal, run(network), expected))


@pytest.mark.usefixtures("stand_ins")
def test_processors_of_diffusers_call_attend_compiled_too() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=6, in_channels=4, num_layers=1, cross_attention_dim=12, sample_size=4,
        caption_channels=8, norm_type="ada_norm_single",
    )  # fmt: skip
    given: dict[str, Any] = {
        "hidden_states": torch.randn(2, 4, 4, 4), "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip
    expected = network(**given).sample
    set_attention(network, "varlen")
    assert type(network.transformer_blocks[0].attn1.processor).__module__.startswith("diffusers.")
    set_attention(network, "xformers")
    assert attention.head_sizes(network) == (6,)
    torch.testing.assert_close(network(**given).sample, expected, rtol=1e-5, atol=1e-6)
    apply_checkpointing(network, "block")
    denoiser = OpenSoraDenoiser(network, Schedule.ddpm(prediction_type="v_prediction"))
    compile_blocks(network, Compilations(compile_bound(Roles(denoiser, denoiser, denoiser)), "aot_eager"))
    output = network(**given).sample
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    output.sum().backward()


def wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


@torch.no_grad()
def test_networks_that_dispatch_are_told_by_diffusers(caplog: pytest.LogCaptureFixture) -> None:
    network = wan()
    given = (torch.randn(1, 4, 2, 4, 4), torch.tensor([3]), torch.randn(1, 5, 8))
    expected, active = network(*given).sample, _AttentionBackendRegistry._active_backend
    processors = [block.attn1.processor for block in network.blocks]
    set_attention(network, "varlen")
    assert [processor._attention_backend for processor in processors] == [None]
    for backend, name in (("math", "_native_math"), ("flash4", "_native_flash"), ("sdpa", "native")):
        set_attention(network, backend)
        assert [processor._attention_backend for processor in processors] == [AttentionBackendName(name)]
        torch.testing.assert_close(network(*given).sample, expected, rtol=1e-5, atol=1e-6)
    assert _AttentionBackendRegistry._active_backend == active and not caplog.records


@torch.no_grad()
def test_what_dispatches_to_packages_has_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast norms give float32, which PyTorch's own casts and a package does not take."""
    network, dtypes = wan(), []

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dtypes.append({query.dtype, key.dtype, value.dtype})
        return attend(query, key, value)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.XFORMERS, kernel)
    names = {"query", "key", "value"}
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, AttentionBackendName.XFORMERS, names)
    monkeypatch.setattr("diffusers.models.attention_dispatch._CAN_USE_XFORMERS_ATTN", True)
    set_attention(network, "xformers")
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(1, 4, 2, 4, 4), torch.tensor([3]), torch.randn(1, 5, 8))
    assert dtypes == [{torch.bfloat16}] * 2


# ---- the choice


def test_auto_on_a_cpu_is_pytorchs_own() -> None:
    for name in ("auto", "sdpa"):
        choice = choose(name, model(), CPU, torch.float32)  # type: ignore[arg-type]
        assert choice.backend == "sdpa" and "head size 6, float32 on cpu; the others need CUDA" in choice.says
    assert choose("math", model(), CPU, torch.float32).backend == "math"


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        (
            "flash",
            r"the package flash-attn 2.7 or newer \(not installed\); bfloat16 or float16 \(the networks compute in",
        ),
        (
            "flash4",
            r"the package flash-attn-4 \(not installed\); .*head sizes that are multiples of 8 up to 128 \(here 6\)",
        ),
        ("xformers", r"the package xformers 0.0.29 or newer \(not installed\); head sizes that are multiples of 8"),
    ],
)
def test_what_cannot_run_is_refused_with_what_would(name: Any, lacks: str) -> None:
    start, end = (
        rf"^--attention {name}: it needs a CUDA device \(the run is on cpu\); ",
        "; what would do: auto, sdpa, math$",
    )
    with pytest.raises(ValueError, match=start + lacks + ".*" + end):
        choose(name, model(), CPU, torch.float32)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """As if there were a GPU of compute capability 9 and the packages that the test names."""
    packages: dict[str, str] = {}

    def version(package: str) -> str:
        if package in packages:
            return packages[package]
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", version)
    notes.say_once.cache_clear()
    yield packages


def test_the_choice_on_a_gpu(
    hopper: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda, bf16, fit, unfit = torch.device("cuda"), torch.bfloat16, model(attention_head_dim=24), model()
    assert choose("auto", fit, cuda, bf16).backend == "varlen"
    assert choose("auto", fit, cuda, torch.float32).backend == "sdpa"
    assert choose("auto", unfit, cuda, bf16).backend == "sdpa"
    assert not capsys.readouterr().err
    hopper |= {"flash-attn": "2.8.3", "xformers": "0.0.35", "flash-attn-4": "4.0.0b5"}
    with pytest.raises(ValueError, match=r"flash: it needs a package flash_attn that imports \(No module named"):
        choose("flash", unfit, cuda, bf16)  # said to be installed, and not there
    for module in ("flash_attn", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    assert choose("flash", unfit, cuda, bf16).backend == "flash"
    assert choose("xformers", fit, cuda, torch.float32).backend == "xformers"
    with pytest.raises(ValueError, match=r"xformers: it needs head sizes .*; what would do: auto, sdpa, flash, math"):
        choose("xformers", unfit, cuda, bf16)
    activated: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    assert choose("auto", fit, cuda, bf16).backend == choose("flash4", fit, cuda, bf16).backend == "flash4"
    assert set(activated) == {"FA4"}

    def broken(_: str) -> None:
        raise ImportError("No module named 'cutlass'")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", broken)
    with pytest.raises(ValueError, match=r"flash4: it needs a package flash-attn-4 that imports .*cutlass"):
        choose("flash4", fit, cuda, bf16)
    for _ in range(3):
        assert choose("auto", fit, cuda, bf16).backend == "varlen"
    assert capsys.readouterr().err.count("--attention auto: flash4 needs a package flash-attn-4 that imports") == 1


@pytest.mark.usefixtures("hopper")
def test_a_network_whose_attention_is_its_own_is_refused() -> None:
    class Strange:
        def __call__(self, attn: nn.Module, hidden_states: Tensor) -> Tensor:
            return hidden_states

    network = DiffusersAttention(query_dim=16, heads=2, dim_head=8, processor=Strange())
    assert choose("auto", network, torch.device("cuda"), torch.bfloat16).backend == "varlen"
    set_attention(network, "varlen")
    with pytest.raises(ValueError, match=r"math: it needs an attention of PyTorch's to take the place of .Strange has"):
        choose("math", network, torch.device("cuda"), torch.bfloat16)


def test_a_mask_for_each_query_is_refused_by_what_cannot_take_it() -> None:
    processor = processor_of("opensora")()
    network = DiffusersAttention(query_dim=12, heads=2, dim_head=6, processor=processor)
    set_attention(network, "math")
    with pytest.raises(ValueError, match=r"--attention math: OpenSoraAttnProcessor2_0 has .*a mask for each query"):
        network(torch.randn(4, 1, 12), attention_mask=torch.zeros(1, 2, 4, 4))


# ---- a run


def flags(teacher: Path, folder: Path, name: str) -> list[str]:
    return [
        *("--model", str(teacher), "--output_dir", str(folder / "run"), "--attention", name),
        *("--device", "cpu", "--num_eval_videos", "0", "--cfg", "1"),
    ]


def test_train_refuses_before_any_work(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdm_fast.train.load_parts", lambda *_, **__: pytest.fail("weights are read"))
    assert cli.main(["train", *flags(tiny_teacher, tmp_path, "flash")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("--attention flash: it needs a CUDA device (the run is on cpu)") == 1
    assert "what would do: auto, sdpa, math" in errors and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "state", "says"), [("auto", "ok", "sdpa, PyTorch's own"), ("flash4", "failed", "needs")]
)
def test_check_says_what_a_run_would_take(name: str, state: str, says: str, tiny_teacher: Path, tmp_path: Path) -> None:
    config = preflight.parse(flags(tiny_teacher, tmp_path, name))
    row = next(row for row in preflight.rows(config) if row.name == "attention")
    assert row.state == state and says in row.says and "6" in row.says


def test_every_network_of_a_run_is_told(tiny_teacher: Path, tmp_path: Path) -> None:
    config = parse_train(flags(tiny_teacher, tmp_path, "math"))
    state = make_state(load_pipeline(tiny_teacher).denoiser, config)
    layers = [m for network in state.networks.models() for m in network.modules() if hasattr(m, "attention_backend")]
    assert len(layers) == 3 * 3 * 2 and {layer.attention_backend for layer in layers} == {"math"}


@pytest.mark.slow
def test_samples_of_a_run_attend_as_its_networks_do(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def attended(query: Tensor, *arguments: Any, backend: str, **others: Any) -> Tensor:
        if not isinstance(query, FakeTensor):  # with which operations are counted, as PyTorch's own
            seen.add(backend)
        return attend(query, *arguments, backend=backend, **others)

    monkeypatch.setattr("tdm_fast.models.opensora_layers.attend", attended)
    short = "--max_train_steps 1 --train_batch_size 2 --lr_warmup_steps 0 --report_to none".split()
    train(parse_train([*flags(tiny_teacher, tmp_path, "math"), *short]))
    assert (tmp_path / "run" / "comparison.png").exists() and seen == {"math"}
