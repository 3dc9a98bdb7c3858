"""AdamW with moments of 8 bits: the same to the bit on one rank and on several, and from one to the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adamw_jobs import adamw
from rank_runs import run_ranks


@pytest.mark.slow
def test_moments_of_8_bits_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    """Rows that two ranks cannot share evenly; each run goes on from the other's checkpoint as well."""
    [(whole, names)] = run_ranks(1, adamw, tmp_path / "one", 1, 3)
    assert {name.split(".")[0] for name in names if name.endswith(".codes")} == {"0", "1"}
    found = run_ranks(2, adamw, tmp_path / "two", 1, 3)
    found += run_ranks(2, adamw, tmp_path / "one", 3, 3)
    found += run_ranks(1, adamw, tmp_path / "two", 3, 3)
    for weights, theirs in found:
        assert theirs == names
        assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())
