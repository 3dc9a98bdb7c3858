"""Which prompts, and which size of video, an iteration trains on."""

from __future__ import annotations

from tdm_fast.philox import Purpose, bounded, random_integers


def draw_prompts(num_prompts: int, batch_size: int, *, seed: int, iteration: int, sample_offset: int = 0) -> list[int]:
    """Indices in [0, num_prompts), one per sample, uniform: a function of (seed, iteration, global sample index)."""
    words = random_integers(
        (1,), batch_size, seed=seed, iteration=iteration, purpose=Purpose.DATA, sample_offset=sample_offset
    )
    return bounded(words[:, 0], num_prompts).tolist()


def draw_size(num_sizes: int, *, seed: int, iteration: int) -> int:
    """Index in [0, num_sizes) of the iteration's size, uniform: a function of (seed, iteration), on all ranks alike."""
    word = random_integers((1,), 1, seed=seed, iteration=iteration, stream=1, purpose=Purpose.DATA)
    return int(bounded(word[0, 0], num_sizes))
