"""Latents as rows: how the implementations that are not plain torch address a tensor that need not be contiguous."""

from __future__ import annotations

from torch import Tensor


def rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """`(tensor, batch_stride, element_stride)`: element i of sample b lies at b * batch_stride + i * element_stride.

    `tensor` is `[B, ...]`. A batch of any stride whose samples are contiguous (element stride 1) or one repeated
    element (element stride 0) comes back as it is, so that slices of channels and expanded tensors are not copied;
    anything else is made contiguous.
    """
    expected, contiguous, repeated = 1, True, True
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1:
            contiguous &= stride == expected
            repeated &= stride == 0
        expected *= size
    if not (contiguous or repeated):
        tensor = tensor.contiguous()
        contiguous = True
    return tensor, tensor.stride(0), 1 if contiguous else 0


def as_rows(tensor: Tensor) -> Tensor:
    """`tensor`, copied only if `rows` would: what the native ops take."""
    return tensor if tensor.is_contiguous() else rows(tensor)[0]
