"""Videos in overlapping pieces: memory is a piece's, and each piece knows less of its surroundings than the whole.

Tensors are `[B, C, T, H, W]`. Sizes are in latents; `unit_in` and `unit_out` are how many rows and columns of a
network's input and output make one latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of pieces of `size` that overlap by `overlap` and cover `length`; the last may be shorter."""
    step = size - overlap
    starts = range(0, max(length - overlap, 1), step)
    return [(start, min(start + size, length)) for start in starts]


def run_in_tiles(
    network: Callable[[Tensor], Tensor], x: Tensor, size: int, overlap: int, unit_in: int, unit_out: int
) -> Tensor:
    """`network(x)` from square tiles of `size`, each faded into its upper and left neighbour over `overlap`."""
    height, width = x.shape[3] // unit_in, x.shape[4] // unit_in
    rows, columns = spans(height, size, overlap), spans(width, size, overlap)
    if len(rows) == len(columns) == 1:
        return network(x)
    extent = overlap * unit_out
    canvas: Tensor | None = None
    above: list[Tensor] = []
    for top, bottom in rows:
        ends: list[Tensor] = []
        beside: Tensor | None = None
        for column, (left, right) in enumerate(columns):
            tile = network(x[..., top * unit_in : bottom * unit_in, left * unit_in : right * unit_in])
            if above:
                fade_in(tile, above[column], dim=3)
            if beside is not None:
                fade_in(tile, beside, dim=4)
            # Copies, because views would hold on to whole tiles.
            ends.append(tile[..., tile.shape[3] - extent :, :].clone())
            beside = tile[..., tile.shape[4] - extent :].clone()
            if canvas is None:
                canvas = tile.new_empty(*tile.shape[:3], height * unit_out, width * unit_out)
            canvas[..., top * unit_out : bottom * unit_out, left * unit_out : right * unit_out] = tile
        above = ends
    assert canvas is not None
    return canvas


def fade_in(tile: Tensor, before: Tensor, dim: int) -> None:
    """Mixes the start of `tile` along `dim`, in place, with what the tile before has there: all of it at the edge."""
    extent = before.shape[dim]
    weight = torch.arange(extent, device=tile.device, dtype=tile.dtype) / max(extent, 1)
    start = tile.narrow(dim, 0, extent)
    start.copy_(torch.lerp(before, start, weight.view([-1] + [1] * (4 - dim))))
