"""What all tests share: GPU tests are left out where there is no GPU."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `gpu` on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    without_gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    if without_gpu:
        config.hook.pytest_deselected(items=without_gpu)
        items[:] = [item for item in items if item.get_closest_marker("gpu") is None]
