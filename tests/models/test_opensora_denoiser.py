"""One tensor of text or a list of two, as the network takes them; a second encoder that goes nowhere is said once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdm_fast.models.denoiser import Conditioning
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser, takes_two
from tdm_fast.notes import say_once
from tdm_fast.schedule import Schedule


class Network(nn.Module):
    """Notes what text it is called with."""

    def __init__(self, caption_channels: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(caption_channels=caption_channels)
        self.given: tuple[Any, Any] | None = None

    def forward(
        self, x: Tensor, t: Tensor, text: Any, *, attention_mask: None, encoder_attention_mask: Any, return_dict: bool
    ) -> tuple[Tensor]:
        self.given = text, encoder_attention_mask
        return (x,)


FIRST, SECOND = torch.randn(2, 3, 4), torch.randn(2, 1, 6)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
ONE = {"encoder_hidden_states": FIRST, "encoder_attention_mask": MASK}
TWO = ONE | {"encoder_2_hidden_states": SECOND}


def called(network: Network, tensors: dict[str, Tensor]) -> tuple[Any, Any]:
    denoiser = OpenSoraDenoiser(network, Schedule.ddpm(prediction_type="v_prediction"))
    denoiser(torch.zeros(2, 8, 1, 2, 2), torch.tensor([5, 7]), Conditioning(tensors))
    assert network.given is not None
    return network.given


def test_a_network_of_two_encoders_gets_lists() -> None:
    network = Network([4, 6])
    assert takes_two(network) and not takes_two(Network(4)) and not takes_two(nn.Linear(1, 1))
    states, masks = called(network, TWO)
    assert torch.equal(states[0], FIRST[:, None]) and torch.equal(states[1], SECOND[:, None])
    assert torch.equal(masks[0], MASK[:, None]) and masks[1] is None
    _, masks = called(network, TWO | {"encoder_2_attention_mask": MASK[:, :1]})
    assert torch.equal(masks[1], MASK[:, None, :1])
    with pytest.raises(ValueError, match=r"Network takes the states of two text encoders .* --text_encoder_name_2"):
        called(network, ONE)


def test_a_network_of_one_encoder_gets_a_tensor_and_the_second_is_said_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say_once.cache_clear()
    states, mask = called(Network(4), ONE)
    assert torch.equal(states, FIRST[:, None]) and torch.equal(mask, MASK[:, None])
    assert capsys.readouterr().err == ""
    for _ in range(3):
        states, _ = called(Network(4), TWO)
        assert torch.equal(states, FIRST[:, None])
    assert capsys.readouterr().err == "note: Network takes one text encoder's states; the second encoder is not used\n"
    say_once.cache_clear()
    monkeypatch.setenv("RANK", "1")
    called(Network(4), TWO)
    assert capsys.readouterr().err == ""
    say_once.cache_clear()
