"""Each family's denoiser calls its network as the family's own pipeline does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from tiny_networks import FAMILIES, HEIGHT, TEXT_TOKENS, WIDTH, denoiser, example
from torch import Tensor

from tdm_fast.models.cogvideox import rotary_tables
from tdm_fast.models.denoiser import Conditioning
from tdm_fast.models.roles import make_networks

COG_1_5 = {"patch_size_t": 2, "use_rotary_positional_embeddings": True, "patch_bias": False}


def stock_rotary(model: Any, latents: Tensor) -> Any:
    """The tables of CogVideoX's pipeline for latents `[B, T, C, H, W]`."""
    pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
    prepare: Any = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(pipeline, 8 * latents.shape[3], 8 * latents.shape[4], latents.shape[1], torch.device("cpu"))


def stock_call(name: str, model: Any, x_t: Tensor, timestep: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The call in the loop of the family's pipeline, for one timestep of all samples."""
    batch, states = len(x_t), tensors["encoder_hidden_states"]
    pixels = [8.0 * size for size in x_t.shape[-2:]]
    if name.startswith("pixart"):
        sizes = {"resolution": None, "aspect_ratio": None}
        if name == "pixart_alpha":
            sizes = {
                "resolution": torch.tensor([pixels]).repeat(batch, 1),
                "aspect_ratio": torch.tensor([pixels[0] / pixels[1]]).repeat(batch, 1),
            }
        mask = tensors.get("encoder_attention_mask")
        output = model(
            x_t, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=timestep.expand(batch),
            added_cond_kwargs=sizes,
        ).sample  # fmt: skip
        return output.chunk(2, dim=1)[0]
    if name == "sd15":
        return model(x_t, timestep, encoder_hidden_states=states).sample
    if name == "sdxl":
        ids = torch.tensor([[*pixels, 0, 0, *pixels]]).repeat(batch, 1)
        added = {"text_embeds": tensors["encoder_2_hidden_states"].squeeze(1), "time_ids": ids}
        return model(x_t, timestep, encoder_hidden_states=states, added_cond_kwargs=added).sample
    if name.startswith("sd3"):
        pooled = tensors["encoder_2_hidden_states"].squeeze(1)
        return model(x_t, states, pooled, timestep.expand(batch)).sample
    if name.startswith("cogvideox"):
        frames_first = x_t.permute(0, 2, 1, 3, 4)
        rotary = stock_rotary(model, frames_first) if model.config.use_rotary_positional_embeddings else None
        output = model(frames_first, states, timestep.expand(batch), image_rotary_emb=rotary).sample
        return output.permute(0, 2, 1, 3, 4)
    padded = torch.cat([states, states.new_zeros(batch, 512 - states.shape[1], states.shape[2])], dim=1)
    return model(x_t, timestep.expand(batch), padded).sample


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_call_is_the_pipelines(name: str) -> None:
    ours = denoiser(name)
    x_t, _, conditioning = example(name, 3)
    for index in (20, 700):
        expected = stock_call(name, ours.model, x_t, ours.schedule.timesteps[index], conditioning.tensors)
        found = ours(x_t, torch.full((3,), index), conditioning)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert float(found.std()) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_samples_do_not_see_each_other(name: str) -> None:
    ours = denoiser(name)
    x_t, t, conditioning = example(name, 3)
    alone = torch.cat([ours(x_t[i : i + 1], t[i : i + 1], conditioning[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(ours(x_t, t, conditioning), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_is_the_networks(name: str) -> None:
    """A frozen network in bf16, its fp32 parts aside, takes fp32 latents and text."""
    exact, teacher = denoiser(name), denoiser(name)
    make_networks(teacher, teacher_dtype=torch.bfloat16)
    x_t, t, conditioning = example(name, 2)
    found, expected = teacher(x_t, t, conditioning), exact(x_t, t, conditioning)
    assert found.dtype == torch.bfloat16
    assert float((found - expected).norm()) < 0.1 * float(expected.norm())


@torch.no_grad()
def test_cogvideox_1_5_has_patches_of_several_frames() -> None:
    ours = denoiser("cogvideox_5b", **COG_1_5)
    x_t, _, conditioning = example("cogvideox_5b", 2)
    expected = stock_call("cogvideox_5b", ours.model, x_t, torch.tensor(500), conditioning.tensors)
    torch.testing.assert_close(ours(x_t, torch.full((2,), 500), conditioning), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"use_rotary_positional_embeddings": True}, COG_1_5], ids=["1.0", "1.5"])
@pytest.mark.parametrize("size", [(2, 4, 6), (5, 4, 4), (4, 2, 6), (3, 4, 2)])
def test_rotary_tables_are_the_pipelines(options: dict[str, Any], size: tuple[int, int, int]) -> None:
    model = denoiser("cogvideox_5b", **options).model
    for ours, theirs in zip(
        rotary_tables(model.config, *size), stock_rotary(model, torch.empty(1, size[0], 4, *size[1:])), strict=True
    ):
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart_alpha", "wan"])
def test_what_a_mask_hides_is_not_seen(name: str) -> None:
    ours = denoiser(name)
    x_t, t, conditioning = example(name, 2)
    states = conditioning.tensors["encoder_hidden_states"]
    mask = torch.ones(states.shape[:2], dtype=torch.int64)
    full = ours(x_t, t, Conditioning({**conditioning.tensors, "encoder_attention_mask": mask}))
    torch.testing.assert_close(full, ours(x_t, t, conditioning), rtol=0, atol=1e-6)
    mask[0, 2:] = 0
    hidden = ours(x_t, t, Conditioning({**conditioning.tensors, "encoder_attention_mask": mask}))
    shorter = ours(x_t[:1], t[:1], Conditioning({"encoder_hidden_states": states[:1, :2]}))
    torch.testing.assert_close(hidden[:1], shorter, rtol=1e-4, atol=1e-5)
    assert float((hidden - full)[0].abs().max()) > 1e-3
    other = Conditioning(
        {"encoder_hidden_states": states + 9 * (mask == 0)[:, :, None], "encoder_attention_mask": mask}
    )
    torch.testing.assert_close(ours(x_t, t, other), hidden, rtol=0, atol=1e-6)


@torch.no_grad()
def test_pixart_alpha_is_told_the_size() -> None:
    ours = denoiser("pixart_alpha")
    given = []
    ours.model.register_forward_pre_hook(lambda _m, _a, k: given.append(k["added_cond_kwargs"]), with_kwargs=True)
    ours(*example("pixart_alpha", 2))
    assert given[0]["resolution"].tolist() == [[8 * HEIGHT, 8 * WIDTH]] * 2
    assert given[0]["aspect_ratio"].tolist() == [[pytest.approx(HEIGHT / WIDTH)]] * 2


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "cogvideox_2b", "cogvideox_5b"])
def test_a_mask_is_refused_where_the_network_takes_none(name: str) -> None:
    ours = denoiser(name)
    x_t, t, conditioning = example(name, 2)
    mask = {"encoder_attention_mask": torch.ones(2, TEXT_TOKENS)}
    assert not ours.takes_mask
    with pytest.raises(ValueError, match=r"has an encoder_attention_mask, and \w+ takes none"):
        ours(x_t, t, Conditioning({**conditioning.tensors, **mask}))


def test_conditioning_that_a_network_cannot_take_is_refused() -> None:
    states = torch.zeros(1, 513, 8)
    for name, text, says in (
        ("sdxl", states[:, :6], "holds encoder_hidden_states; UNet2DConditionModel also takes a pooled embedding"),
        ("sd3", states[:, :6], "SD3Transformer2DModel also takes a pooled embedding, encoder_2_hidden_states"),
        ("cogvideox_2b", states[:, :5], "have 5 tokens; this network's table of positions is for 6"),
        ("wan", states, "have 513 tokens; Wan takes at most 512"),
    ):
        x_t, t, _ = example(name, 1)
        with pytest.raises(ValueError, match=says):
            denoiser(name)(x_t, t, Conditioning({"encoder_hidden_states": text}))
    unet = denoiser("sd15")
    unet.model.register_to_config(addition_embed_type="image")
    with pytest.raises(ValueError, match="addition_embed_type is 'image'; known are null"):
        unet(*example("sd15", 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_none_of_them_can_be_told_its_number_of_steps(name: str) -> None:
    with pytest.raises(ValueError, match=r"unify: a .* cannot be told its number of steps; leave it out"):
        make_networks(denoiser(name), unify=(2, 4))
