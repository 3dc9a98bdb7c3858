"""Conditioning is a batch of tensors; a Denoiser maps timesteps, trims variance channels and checks shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdm_fast.models.denoiser import Conditioning, Denoiser, count_forwards
from tdm_fast.schedule import Schedule


def prompts(batch_size: int, length: int, mask: bool = False) -> Conditioning:
    tensors = {"encoder_hidden_states": torch.arange(batch_size * length * 2.0).view(batch_size, length, 2) + 1}
    if mask:
        tensors["encoder_attention_mask"] = torch.ones(batch_size, length, dtype=torch.bool)
    return Conditioning(tensors)


def test_index_length_and_move() -> None:
    conditioning = prompts(4, 3, mask=True)
    assert len(conditioning) == 4
    states = conditioning.tensors["encoder_hidden_states"]
    for index in (slice(1, 3), torch.tensor([3, 0]), [2, 2], torch.tensor([True, False, True, False])):
        assert torch.equal(conditioning[index].tensors["encoder_hidden_states"], states[index])
    moved = conditioning.to("cpu", torch.float64)
    assert moved.tensors["encoder_hidden_states"].dtype == torch.float64
    assert moved.tensors["encoder_attention_mask"].dtype == torch.bool
    assert conditioning.to("meta").tensors["encoder_hidden_states"].device.type == "meta"


def test_expand() -> None:
    assert torch.equal(prompts(1, 3).expand(5).tensors["encoder_hidden_states"][4], torch.arange(1.0, 7).view(3, 2))
    conditioning = prompts(5, 3)
    assert conditioning.expand(5) is conditioning
    with pytest.raises(ValueError, match="has 2 samples; it must have 1 or 5"):
        prompts(2, 3).expand(5)


def test_cat_of_one_length_needs_no_mask() -> None:
    joined = Conditioning.cat([prompts(2, 3), prompts(1, 3)])
    assert list(joined.tensors) == ["encoder_hidden_states"]
    assert joined.tensors["encoder_hidden_states"].shape == (3, 3, 2)


def test_cat_pads_to_the_longest_and_masks_the_padding() -> None:
    joined = Conditioning.cat([prompts(2, 3), prompts(1, 5)])
    assert joined.tensors["encoder_attention_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5]
    states = joined.tensors["encoder_hidden_states"]
    assert torch.equal(states[:2, :3], prompts(2, 3).tensors["encoder_hidden_states"])
    assert not states[:2, 3:].any()


def test_cat_gives_a_mask_to_the_part_that_has_none() -> None:
    with_mask = Conditioning({**prompts(1, 3).tensors, "encoder_attention_mask": torch.tensor([[1.0, 1.0, 0.0]])})
    joined = Conditioning.cat([with_mask, prompts(1, 3)])
    assert joined.tensors["encoder_attention_mask"].tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    assert joined.tensors["encoder_attention_mask"].dtype == torch.float32


def test_bad_conditioning_names_itself() -> None:
    with pytest.raises(ValueError, match=r"batch sizes \{'a': 1, 'b': 2\}"):
        Conditioning({"a": torch.zeros(1), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="at least one tensor"):
        Conditioning({})
    with pytest.raises(ValueError, match="must hold the same tensors"):
        Conditioning.cat([Conditioning({"a": torch.zeros(1)}), Conditioning({"b": torch.zeros(1)})])
    with pytest.raises(ValueError, match="pooled has shapes"):
        Conditioning.cat([Conditioning({"pooled": torch.zeros(1, 2)}), Conditioning({"pooled": torch.zeros(1, 3)})])


class Echo(nn.Module):
    """Writes the timestep that it is told into every channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x_t: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        shift = torch.arange(self.channels, dtype=x_t.dtype).view(1, -1, 1)
        return (timestep.to(x_t.dtype).view(-1, 1, 1) + shift) * torch.ones(1, 1, x_t.shape[2])


@pytest.mark.parametrize("schedule", [Schedule.ddpm(), Schedule.flow(shift=3.0)])
@pytest.mark.parametrize("channels", [2, 4])
def test_denoiser_maps_the_timestep_and_takes_the_first_half_of_the_channels(schedule: Schedule, channels: int) -> None:
    t = torch.tensor([0, 500, 999])
    output = Denoiser(Echo(channels), schedule)(torch.zeros(3, 2, 4), t, prompts(3, 1))
    assert output.shape == (3, 2, 4)
    torch.testing.assert_close(output[:, 0, 0], schedule.timesteps[t].float())
    torch.testing.assert_close(output[:, 1, 0], schedule.timesteps[t].float() + 1)


def test_denoiser_refuses_what_does_not_fit() -> None:
    x_t, t = torch.zeros(3, 2, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"output has shape \(3, 3, 4\)"):
        Denoiser(Echo(3), Schedule.ddpm())(x_t, t, prompts(3, 1))
    with pytest.raises(ValueError, match="x_t has 3 samples"):
        Denoiser(Echo(2), Schedule.ddpm())(x_t, t, prompts(2, 1))


def test_count_forwards_counts_inside_the_block_only() -> None:
    denoiser = Denoiser(Echo(2), Schedule.ddpm())
    x_t, t = torch.zeros(3, 2, 4), torch.zeros(3, dtype=torch.int64)
    with count_forwards(denoiser) as count:
        denoiser(x_t, t, prompts(3, 1))
        denoiser(x_t[:1], t[:1], prompts(1, 1))
    denoiser(x_t, t, prompts(3, 1))
    assert (count.calls, count.samples, count.trained_samples) == (2, 4, 0)
