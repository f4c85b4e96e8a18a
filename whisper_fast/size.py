"""The bytes that a value takes in memory, with all that it holds."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Set
from typing import Any

__all__ = ["deep_size"]

NESTING = (list, tuple, deque, Set)


def deep_size(value: Any) -> int:
    """Return the bytes of `value` and of what it holds, each object once: a weigher, `Cache(..., weigher=deep_size)`.

    It looks into dicts, lists, tuples, sets, deques, attributes and slots, and counts the memory of arrays and of
    what they are views of. Small integers and names that Python keeps once for all count as if they were the value's.
    """
    seen: set[int] = set()
    todo, total = [value], 0
    while todo:
        one = todo.pop()
        if id(one) in seen or one is None or isinstance(one, type):
            continue
        seen.add(id(one))
        total += sys.getsizeof(one)
        todo += parts(one)
    return total


def parts(one: Any) -> list[Any]:
    """Return what `one` holds, each of it an object of its own."""
    if isinstance(one, str | bytes | bytearray | int | float):
        return []
    if isinstance(one, Mapping):
        return [*one.keys(), *one.values()]
    if isinstance(one, NESTING):
        return list(one)
    base = getattr(one, "base", None)  # numpy: a view has no memory of its own
    inner = [] if base is None else [base]
    if isinstance(one, memoryview):
        inner.append(one.obj)
    if (attributes := getattr(one, "__dict__", None)) is not None:
        inner.append(attributes)
    slots = (name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ()))
    return inner + [getattr(one, name) for name in slots if isinstance(name, str) and hasattr(one, name)]
