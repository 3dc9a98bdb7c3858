"""Counter-based numbers: published vectors, an integer implementation in Python, and what a draw may depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch

from tdm_fast.philox import Purpose, bounded, philox4x32, randn, random_integers, uniform

# Random123's tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    for index in range(10):
        k0, k1 = (key[0] + index * 0x9E3779B9) % 2**32, (key[1] + index * 0xBB67AE85) % 2**32
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_published_vectors(counter: str, key: str, result: str) -> None:
    low, high = words(key)
    assert philox4x32(torch.tensor(words(counter)), (low, high)).tolist() == words(result)


def test_counter_layout_element_by_element() -> None:
    seed, iteration, stream, offset = 0x0123456789ABCDEF, 70_000, 3, 2**32 - 2
    drawn = random_integers(
        (3, 3), 4, seed=seed, iteration=iteration, stream=stream, purpose=Purpose.SPLIT, sample_offset=offset
    )
    assert drawn.shape == (4, 3, 3) and drawn.dtype == torch.int64
    key = [seed % 2**32, seed >> 32]
    for sample, values in enumerate(drawn.flatten(1).tolist()):
        for element, value in enumerate(values):
            counter = [element // 4, (offset + sample) % 2**32, iteration, stream | Purpose.SPLIT << 16]
            assert value == python_philox(counter, key)[element % 4]


def test_normals_are_box_muller_in_float64() -> None:
    drawn = randn(2, (7,), seed=5, iteration=9, dtype=torch.float64)
    raw = random_integers((8,), 2, seed=5, iteration=9)
    for values, integers in zip(drawn.tolist(), raw.tolist(), strict=True):
        expected = []
        for first, second in zip(integers[0::2], integers[1::2], strict=True):
            radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
            angle = 2 * math.pi * (second + 0.5) / 2**32
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
        assert values == pytest.approx(expected[:7], rel=1e-13, abs=1e-13)
    assert torch.equal(randn(2, (7,), seed=5, iteration=9), drawn.float())


@pytest.mark.parametrize("draw", [randn, uniform])
def test_a_number_depends_on_its_counter_alone(draw: Callable[..., torch.Tensor]) -> None:
    whole = draw(5, (2, 3), seed=1, iteration=4, stream=1)
    split = torch.cat(
        [
            draw(2, (2, 3), seed=1, iteration=4, stream=1),
            draw(3, (2, 3), seed=1, iteration=4, stream=1, sample_offset=2),
        ]
    )
    assert torch.equal(whole, split)
    on_device = draw(5, (2, 3), seed=torch.tensor(1), iteration=torch.tensor(4), stream=1)
    assert torch.equal(whole, on_device)
    # A longer sample starts with the shorter one's numbers.
    assert torch.equal(draw(5, (11,), seed=1, iteration=4, stream=1)[:, :6], whole.flatten(1))


def test_every_part_of_the_counter_and_both_halves_of_the_seed_matter() -> None:
    base: dict[str, Any] = {"seed": 1, "iteration": 2, "stream": 0, "purpose": Purpose.NOISE, "sample_offset": 0}
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 2},
        {"seed": 1 + 2**32},
        {"iteration": 3},
        {"stream": 1},
        {"purpose": Purpose.RENOISE},
    ]
    changes += [{"sample_offset": 1000}, {"seed": -1}]
    drawn = [random_integers((64,), 3, **{**base, **change}) for change in changes]
    everything = torch.cat([values.flatten() for values in drawn])
    # 1536 words of 32 bits: a chance meeting has probability 3e-4; a shared counter would give dozens.
    assert len(everything.unique()) == len(everything)
    negative = random_integers((64,), 3, **{**base, "seed": torch.tensor(-1)})
    assert torch.equal(negative, drawn[-1])


def test_distributions() -> None:
    normals = randn(8, (12_500,), seed=11).double().flatten()
    assert scipy.stats.kstest(normals.numpy(), "norm").pvalue > 1e-3
    assert abs(float(normals.mean())) < 4 / math.sqrt(len(normals))
    numbers = uniform(8, (12_500,), seed=11).double().flatten()
    assert scipy.stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-3
    pair = torch.corrcoef(randn(2, (50_000,), seed=11))[0, 1]
    assert abs(float(pair)) < 4 / math.sqrt(50_000)


def test_uniform_stays_below_one_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = torch.full((1, 4), 2**32 - 1)
    monkeypatch.setattr("tdm_fast.philox.random_integers", lambda *_args, **_options: largest)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        values = uniform(1, (4,), seed=0, dtype=dtype)
        assert values.dtype == dtype and bool((values < 1).all()) and bool((values > 0.99).all())


def test_bounded_reaches_its_ends_only() -> None:
    ends = torch.tensor([0, 2**32 - 1])
    assert bounded(ends, 7).tolist() == [0, 6]
    assert bounded(ends, torch.tensor([3, 2**31 - 1])).tolist() == [0, 2**31 - 2]


def test_empty_and_odd_shapes() -> None:
    assert randn(0, (3,), seed=0).shape == (0, 3)
    assert randn(2, (0,), seed=0).shape == (2, 0)
    assert randn(2, (), seed=0).shape == (2,)
    assert uniform(1, (1,), seed=0).shape == (1, 1)


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(ValueError, match="stream is 65536"):
        randn(1, (1,), seed=0, stream=65536)
    with pytest.raises(ValueError, match="purpose is -1"):
        random_integers((1,), 1, seed=0, purpose=-1)
    with pytest.raises(ValueError, match="batch_size is -1"):
        uniform(-1, (1,), seed=0)
