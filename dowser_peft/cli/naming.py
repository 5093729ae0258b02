"""Full module names, split into what a table shows: which layer, which module in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LAYER = re.compile(r"^(?P<stack>.*?)\.?(?<![^.])(?P<index>\d+)\.(?P<module>.+)$")


# The order of a decoder layer, which file formats that sort their keys lose.
_USUAL_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Place:
    """Where a module is.

    Args:
        layer: its number, with a name before it if there are several stacks (``decoder.3``); ``-`` outside layers.
        module: the shortest ending of its name that tells it from the others in its layer.
    """

    layer: str
    module: str


def places(names: Sequence[str]) -> dict[str, Place]:
    """The place of each module name."""
    found = {name: match for name in names if (match := _LAYER.match(name))}
    inside: dict[str, set[str]] = {}  # layer stack -> modules in its layers
    for match in found.values():
        inside.setdefault(match["stack"], set()).add(match["module"])
    stacks = _distinct(set(inside))
    result = {}
    for name in names:
        if name not in found:
            result[name] = Place("-", name)
            continue
        stack, index, module = found[name].group("stack", "index", "module")
        layer = f"{stacks[stack]}.{index}".lstrip(".")
        neighbours = set().union(*(modules for modules in inside.values() if module in modules))
        result[name] = Place(layer, _shortest(module, neighbours))
    return result


def in_model_order(names: Iterable[str]) -> list[str]:
    """Names by layer, 2 before 10, and in a layer attention before MLP."""
    return sorted(names, key=_sort_key)


def _sort_key(name: str) -> tuple[str, int, int, str]:
    match = _LAYER.match(name)
    if match is None:
        return name, 0, 0, ""
    ending = _ending(match["module"], 1)
    rank = _USUAL_ORDER.index(ending) if ending in _USUAL_ORDER else len(_USUAL_ORDER)
    module = re.sub(r"\d+", lambda number: number[0].zfill(6), match["module"])  # expert 2 before 10
    return match["stack"], int(match["index"]), rank, module


def _distinct(stacks: set[str]) -> dict[str, str]:
    """Names of layer stacks without the parts that all of them begin and end with; of a single one, nothing."""
    parts = [stack.split(".") for stack in stacks]
    shortest = min(map(len, parts), default=0)
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    tail = next((i for i in range(shortest - head) if len({p[-1 - i] for p in parts}) > 1), shortest - head)
    return {stack: ".".join(p[head : len(p) - tail]) for stack, p in zip(stacks, parts, strict=True)}


def _shortest(name: str, among: set[str]) -> str:
    """``name`` cut to its last parts, as few as tell it from the others."""
    depth = 1
    while sum(_ending(other, depth) == _ending(name, depth) for other in among) > 1:
        depth += 1
    return _ending(name, depth)


def _ending(name: str, depth: int) -> str:
    return ".".join(name.split(".")[-depth:])
