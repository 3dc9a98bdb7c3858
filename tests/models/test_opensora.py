"""Open-Sora Plan v1.3's transformer: layout of its weights, attention, masks, training features, refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_fast.models.denoiser import Conditioning
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.models.opensora_layers import SelfAttention, TokenLayout, apply_rotary, rotary_tables
from tdm_fast.schedule import Schedule

DATA = Path(__file__).parent / "data"
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "patch_size": 2,
    "patch_size_t": 1,
    "caption_channels": 10,
    "activation_fn": "gelu-approximate",
    "sparse1d": True,
    "sparse_n": 2,
}


def small_model(**changes: Any) -> OpenSoraT2V_v1_3:
    """A model whose every weight matters: as initialised, its output and its text attention would be zero."""
    model = OpenSoraT2V_v1_3(**SMALL | changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def call(batch: int = 3, size: tuple[int, int, int] = (3, 6, 4), length: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 8, *size, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 999,
        "encoder_hidden_states": torch.randn(batch, 1, length, 10, generator=generator),
    }


def close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> bool:
    return bool((actual - expected).abs().max() <= relative * expected.abs().max())


# ---- the published weights fit


def test_keys_and_shapes_of_the_published_2b_model() -> None:
    published = json.loads((DATA / "opensora_v1_3_2b_keys.json").read_text())
    with torch.device("meta"):
        model = OpenSoraT2V_v1_3(**published["constructor"])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published["keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published["parameters"] == 2_771_981_600


def test_save_and_load(tmp_path: Path) -> None:
    model = small_model(norm_elementwise_affine=True, attention_bias=False, interpolation_scale_t=2.0)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "OpenSoraT2V_v1_3"
    loaded = OpenSoraT2V_v1_3.from_pretrained(tmp_path)
    assert loaded.config.sparse_n == 2 and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(**call()).sample, model(**call()).sample)
    half = OpenSoraT2V_v1_3.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half(**call()).sample.dtype == torch.bfloat16


def test_a_new_model_predicts_zero_and_learns_in_every_weight() -> None:
    model = OpenSoraT2V_v1_3(**SMALL)
    assert not model(**call()).sample.any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # what starts at zero blocks gradients for a step
        optimizer.zero_grad()
        (model(**call()).sample - 1).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if "to_k.bias" not in name)


# ---- attention, against computations of another kind in float64


def rotate_by_complex_numbers(x: Tensor, size: tuple[int, int, int], scales: tuple[float, float, float]) -> Tensor:
    """RoPE3D of ``x [B, N, heads, head_dim]`` in complex128, token by token."""
    part = x.shape[-1] // 3
    frequencies = 10_000.0 ** (-2 * torch.arange(part // 2, dtype=torch.float64) / part)
    out = torch.empty_like(x, dtype=torch.float64)
    for token in range(x.shape[1]):
        frame, rest = divmod(token, size[1] * size[2])
        for axis, position in enumerate((frame, *divmod(rest, size[2]))):
            features = x[:, token, :, axis * part : (axis + 1) * part].double()
            numbers = torch.complex(features[..., : part // 2], features[..., part // 2 :])
            numbers = numbers * torch.exp(1j * frequencies * (position / scales[axis]))
            out[:, token, :, axis * part : (axis + 1) * part] = torch.cat((numbers.real, numbers.imag), dim=-1)
    return out


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.5)])
def test_rope_is_a_complex_rotation_on_each_axis(scales: tuple[float, float, float]) -> None:
    size = (3, 5, 4)
    x = torch.randn(2, 60, 2, 18)
    tables = rotary_tables(size, 18, scales, CPU)
    expected = rotate_by_complex_numbers(x, size, scales)
    assert (apply_rotary(x, *tables) - expected).abs().max() <= 1e-6 * x.abs().max()


def test_rope_keeps_far_positions_exact_in_bfloat16() -> None:
    size = (1, 1, 500)
    x = torch.randn(1, 500, 1, 96, dtype=torch.bfloat16)
    rotated = apply_rotary(x, *rotary_tables(size, 96, (1.0, 1.0, 1.0), CPU))
    assert rotated.dtype == torch.bfloat16
    expected = rotate_by_complex_numbers(x, size, (1.0, 1.0, 1.0))
    # One rounding of the result: half a unit in the last of bfloat16's 8 places.
    assert ((rotated - expected).abs() <= 2.0**-8 * expected.abs() + 1e-5).all()


def attention_with_explicit_mask(module: SelfAttention, x: Tensor, sees: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Self-attention in float64 with a dense ``sees [B, N, N]`` (query, key)."""
    heads, head_dim = module.heads, x.shape[-1] // module.heads

    def project(linear: nn.Linear) -> Tensor:
        bias = 0 if linear.bias is None else linear.bias.double()
        return (x.double() @ linear.weight.double().T + bias).unflatten(-1, (heads, head_dim))

    query, key = (rotate_by_complex_numbers(project(linear), size, (1, 1, 1)) for linear in (module.to_q, module.to_k))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(head_dim)
    weights = scores.masked_fill(~sees.unsqueeze(1), -math.inf).softmax(dim=-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, project(module.to_v)).flatten(2)
    return mixed @ module.to_out[0].weight.double().T + module.to_out[0].bias.double()


def in_same_subsequence(tokens: int, n: int, odd_layer: bool) -> Tensor:
    groups = [(token // n) % n if odd_layer else token % n for token in range(tokens)]
    return torch.tensor([[a == b for b in groups] for a in groups])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("odd_layer", [False, True])
@pytest.mark.parametrize(
    ("n", "size"), [(1, (2, 3, 3)), (2, (2, 4, 4)), (2, (3, 3, 5)), (4, (2, 4, 4)), (4, (3, 3, 5))]
)
@torch.no_grad()
def test_skiparse_is_attention_with_an_explicit_mask(
    n: int, size: tuple[int, int, int], odd_layer: bool, masked: bool
) -> None:
    torch.manual_seed(0)
    tokens = math.prod(size)
    module = SelfAttention(24, heads=2, bias=True, dropout=0.0)
    x = 3 * torch.randn(2, tokens, 24)
    layout = TokenLayout.build(*rotary_tables(size, 12, (1, 1, 1), CPU), n, odd_layer)
    sees = in_same_subsequence(tokens, n, odd_layer).expand(2, -1, -1)
    keep = torch.ones(2, tokens, dtype=torch.bool)
    if masked:
        keep = torch.rand(2, tokens) > 0.3
        layout = layout.with_mask(keep)
        sees = sees & keep.unsqueeze(1)
    else:
        assert layout.mask is None and (layout.lengths is None) == (tokens % n**2 == 0)
    expected = attention_with_explicit_mask(module, x, sees, size)
    output = layout.restore(module(layout.arrange(x), layout))
    assert output.isfinite().all()
    assert close(output[keep], expected[keep])  # a masked token's own output is nobody's input


def test_layers_of_a_model_alternate_between_both_orders() -> None:
    kinds = OpenSoraT2V_v1_3(**SMALL | {"num_layers": 33, "sparse_n": 4})._layout_kinds
    assert kinds[:5] == [(1, False), (1, False), (4, False), (4, True), (4, False)]
    assert kinds[28:] == [(4, False), (4, True), (1, False), (1, False), (1, False)]
    assert set(OpenSoraT2V_v1_3(**SMALL | {"sparse1d": False, "sparse_n": 4})._layout_kinds) == {(1, False)}


# ---- batches and masks


@pytest.mark.parametrize("sparse_n", [2, 4])
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(sparse_n: int) -> None:
    model, arguments = small_model(sparse_n=sparse_n), call(size=(3, 6, 6))
    together = model(**arguments).sample
    for index in range(3):
        alone = model(**{name: value[index : index + 1] for name, value in arguments.items()}).sample
        assert close(together[index : index + 1], alone)
    assert not close(together[0], together[1], relative=0.1)


@torch.no_grad()
def test_masked_text_does_not_matter_and_the_rest_does() -> None:
    model, arguments = small_model(), call()
    mask = torch.ones(3, 1, 5)
    mask[:, :, 3:] = 0
    masked = model(**arguments, encoder_attention_mask=mask).sample
    text = arguments["encoder_hidden_states"]
    shorter = model(**arguments | {"encoder_hidden_states": text[:, :, :3]}).sample
    poisoned = text.clone()
    poisoned[:, :, 3:] = 1e4
    assert close(masked, shorter)
    poisoned_output = model(**arguments | {"encoder_hidden_states": poisoned}, encoder_attention_mask=mask).sample
    assert torch.equal(poisoned_output, masked)
    assert not close(model(**arguments).sample, masked, relative=1e-2)


@torch.no_grad()
def test_masked_latents_do_not_matter_and_the_rest_does() -> None:
    model, arguments = small_model(), call(size=(3, 6, 6))
    mask = torch.ones(3, 3, 6, 6)
    mask[:, 2] = 0
    mask[:, :, 5] = 0  # the last row's patches still count: their other half is kept
    masked = model(**arguments, attention_mask=mask).sample
    poisoned = dict(arguments, hidden_states=arguments["hidden_states"].clone())
    poisoned["hidden_states"][:, :, 2] = 1e3
    assert torch.equal(model(**poisoned, attention_mask=mask).sample[:, :, :2], masked[:, :, :2])
    assert not close(model(**arguments).sample[:, :, :2], masked[:, :, :2], relative=1e-3)
    half_row = dict(arguments, hidden_states=arguments["hidden_states"].clone())
    half_row["hidden_states"][:, :, :2, 5] += 1
    assert not close(model(**half_row, attention_mask=mask).sample[:, :, 0, :4], masked[:, :, 0, :4], relative=1e-3)


@pytest.mark.parametrize("size", [(3, 6, 4), (3, 6, 6)])
@torch.no_grad()
def test_no_mask_is_the_mask_that_keeps_everything(size: tuple[int, int, int]) -> None:
    model, arguments = small_model(), call(size=size)
    ones = model(**arguments, attention_mask=torch.ones(3, *size), encoder_attention_mask=torch.ones(3, 1, 5)).sample
    assert close(model(**arguments).sample, ones)


@torch.no_grad()
def test_without_masks_attention_is_called_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor | None] = []

    def recording(*args: Tensor, attn_mask: Tensor | None, attend: Any = F.scaled_dot_product_attention) -> Tensor:
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    small_model()(**call(size=(4, 6, 4)))  # 24 tokens, a multiple of 2²
    assert masks == [None] * 8
    masks.clear()
    small_model()(**call(size=(3, 6, 6)))  # 27 tokens: the sparse layers do not see their padding
    assert masks == [None] * (4 + 2 * 3)  # of two lengths a call each


def test_fully_masked_samples_stay_finite() -> None:
    model, arguments = small_model(), call(size=(3, 6, 6))
    masks = {"attention_mask": torch.ones(3, 3, 6, 6), "encoder_attention_mask": torch.ones(3, 1, 5)}
    for mask in masks.values():
        mask[1] = 0
    output = model(**arguments, **masks).sample
    output.sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- sizes, training, compilation


@torch.no_grad()
def test_an_odd_row_and_column_are_dropped() -> None:
    model, arguments = small_model(), call(size=(2, 7, 5))
    even = arguments | {"hidden_states": arguments["hidden_states"][..., :6, :4]}
    output = model(**arguments).sample
    assert output.shape == (3, 8, 2, 6, 4)
    assert torch.equal(output, model(**even).sample)


@torch.no_grad()
def test_call_conventions() -> None:
    model, arguments = small_model(out_channels=6), call()
    (sample,) = model(**arguments, return_dict=False)
    assert sample.shape == (3, 6, 3, 6, 4)
    assert torch.equal(sample, model(*arguments.values(), None, None, True).sample)
    assert torch.equal(sample, model(**arguments, pooled_projections=torch.ones(3, 1, 7)).sample)
    whole = arguments | {"timestep": torch.tensor([3, 500, 999])}
    assert torch.equal(model(**whole).sample, model(**whole | {"timestep": whole["timestep"].float()}).sample)
    assert not torch.equal(model(**whole).sample, model(**whole | {"timestep": whole["timestep"] + 0.5}).sample)


def test_checkpointing_gives_the_same_gradients() -> None:
    model = small_model(sparse_n=4)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        handle = model.transformer_blocks[2].register_forward_pre_hook(count)
        arguments = call()
        arguments["hidden_states"].requires_grad_()
        model.zero_grad()
        model(**arguments).sample.square().mean().backward()
        handle.remove()
        assert calls == 1 + checkpointing
        gradients.append(
            [arguments["hidden_states"].grad, *(parameter.grad.clone() for parameter in model.parameters())]
        )
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


def test_layouts_made_in_inference_mode_serve_training() -> None:
    model = small_model()
    with torch.inference_mode():
        model(**call(size=(3, 6, 6)))
    model(**call(size=(3, 6, 6))).sample.sum().backward()


def test_layouts_of_many_sizes_do_not_pile_up() -> None:
    model = small_model(num_layers=1)
    for width in range(2, 60, 2):
        layouts = model._layouts((1, 1, width), CPU)
        assert model._layouts((1, 1, width), CPU) is layouts
    assert len(model._layout_cache) <= 16


@torch.no_grad()
def test_autocast() -> None:
    model, arguments = small_model(), call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(**arguments).sample
    full = model(**arguments).sample
    assert (half - full).square().mean() < 1e-2 * full.square().mean()


# ---- the denoiser


@torch.no_grad()
def test_denoiser_calls_the_model_its_own_way() -> None:
    model, arguments = small_model(), call()
    schedule = Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    denoiser = OpenSoraDenoiser(model, schedule)
    text, latents = arguments["encoder_hidden_states"][:, 0], arguments["hidden_states"]
    t = torch.tensor([0, 449, 999])
    expected = model(latents, t, text.unsqueeze(1)).sample
    assert torch.equal(denoiser(latents, t, Conditioning({"encoder_hidden_states": text})), expected)
    # Texts of different lengths, joined: each sample as if it were alone.
    parts = [Conditioning({"encoder_hidden_states": text[i : i + 1, : i + 2]}) for i in range(3)]
    joined = denoiser(latents, t, Conditioning.cat(parts))
    for i, part in enumerate(parts):
        assert close(joined[i : i + 1], denoiser(latents[i : i + 1], t[i : i + 1], part))


# ---- refusals


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_states", torch.zeros(3, 7, 3, 6, 4), r"hidden_states .*\(3, 7, 3, 6, 4\).*\[B, 8, T, H, W\]"),
        ("hidden_states", torch.zeros(3, 8, 3, 6), r"hidden_states .*\[B, 8, T, H, W\]"),
        ("hidden_states", torch.zeros(3, 8, 3, 6, 1), r"hidden_states .*patch size 2"),
        ("hidden_states", torch.zeros(3, 8, 0, 6, 4), r"hidden_states .*\(3, 8, 0, 6, 4\)"),
        ("timestep", torch.tensor(5), r"timestep .*\(\).*\[3\]"),
        ("timestep", torch.zeros(2), r"timestep .*\(2,\).*\[3\]"),
        ("encoder_hidden_states", torch.zeros(3, 1, 5, 12), r"encoder_hidden_states .*caption_channels is 10"),
        ("encoder_hidden_states", torch.zeros(3, 5, 10), r"encoder_hidden_states .*\[3, 1, L, 10\]"),
        ("encoder_hidden_states", torch.zeros(3, 1, 0, 10), r"encoder_hidden_states .*\(3, 1, 0, 10\)"),
        ("encoder_hidden_states", torch.zeros(2, 1, 5, 10), r"encoder_hidden_states .*\(2, 1, 5, 10\)"),
        ("attention_mask", torch.zeros(3, 3, 6, 5), r"attention_mask .*\[3, 3, 6, 4\] or None"),
        ("encoder_attention_mask", torch.zeros(3, 5), r"encoder_attention_mask .*\[3, 1, 5\] or None"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model()(**call() | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_head_dim": 88}, "attention_head_dim is 88.*multiple of 6"),
        ({"cross_attention_dim": 30}, "cross_attention_dim is 30.*must be 24"),
        ({"patch_size_t": 2}, "patch_size_t is 2.*only 1"),
        ({"patch_size": None}, "patch_size is None"),
        ({"in_channels": None}, "in_channels is None"),
        ({"caption_channels": None}, "caption_channels is None"),
        ({"sparse_n": 0}, "sparse_n is 0.*at least 1"),
        ({"interpolation_scale_h": 0.0}, "interpolation_scale_h is 0.0.*above 0"),
        ({"activation_fn": "rellu"}, "activation_fn is 'rellu'.*gelu-approximate"),
        ({"num_layers": 0}, "num_layers is 0.*at least 1"),
    ],
)
def test_configurations_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenSoraT2V_v1_3(**SMALL | changes)
