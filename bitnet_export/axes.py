"""Names of dynamic axes: a plain name has a size of its own, "a + b" the sum of others' sizes.

A decoder's attention mask is as long as what is cached and what is new together; ONNX writes such
an axis "past_sequence + sequence". Which sizes an axis gets is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping


def terms(axis: str) -> list[str]:
    """ "past_sequence + sequence" -> ["past_sequence", "sequence"]; a plain name -> itself."""
    return [term.strip() for term in axis.split("+")]


def is_sum(axis: str) -> bool:
    """Whether the axis has no size of its own."""
    return "+" in axis


def size_of(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis, where ``sizes`` has those of the plain ones. Raises KeyError."""
    return sizes[axis] if axis in sizes else sum(sizes[term] for term in terms(axis))
