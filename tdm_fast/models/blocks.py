"""The blocks that a network repeats: what is checkpointed, compiled, sharded and given adapters, one at a time."""

from __future__ import annotations

from torch import nn


def named_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of `model` by name, as they are registered, none of them inside another.

    They are the members of its `nn.ModuleList`s whose classes diffusers' `_repeated_blocks` or `_no_split_modules`
    name, the innermost where one contains others, as a UNet's levels do; in a model that has neither, the members of
    the outermost list with the most parameters. Raises ValueError if there are none.
    """
    classes: set[str] = set()
    for module in model.modules():
        for hint in ("_repeated_blocks", "_no_split_modules"):
            classes.update(getattr(module, hint, None) or ())
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not classes:
        outermost = [name for name in lists if not any(name != other and _inside(name, other) for other in lists)]
        largest = max(outermost, key=lambda name: sum(p.numel() for p in lists[name].parameters()), default=None)
        lists = {} if largest is None else {largest: lists[largest]}
    found = {
        f"{name}.{index}".removeprefix("."): block
        for name, blocks in lists.items()
        for index, block in blocks.named_children()
        if not classes or type(block).__name__ in classes
    }
    innermost = [name for name in found if not any(name != other and _inside(other, name) for other in found)]
    if not innermost:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks; it needs an nn.ModuleList of them, whose class it names in"
            " _repeated_blocks or _no_split_modules if it has one of these"
        )
    return [(name, found[name]) for name in innermost]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """`named_blocks` without their names."""
    return [block for _, block in named_blocks(model)]


def _inside(name: str, other: str) -> bool:
    """Whether the module `name` is a part of the module `other`, or that module."""
    return f"{name}.".startswith(f"{other}." if other else "")
