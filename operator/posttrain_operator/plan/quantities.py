"""Kubernetes quantities: read to exact numbers, written back as short texts. Pure arithmetic, no rounding surprises."""

from __future__ import annotations

import re
from fractions import Fraction

GI = 1024**3
_UNITS = {
    "": Fraction(1),
    "m": Fraction(1, 1000),
    "k": Fraction(1000),
    "M": Fraction(1000**2),
    "G": Fraction(1000**3),
    "T": Fraction(1000**4),
    "P": Fraction(1000**5),
    "Ki": Fraction(1024),
    "Mi": Fraction(1024**2),
    "Gi": Fraction(GI),
    "Ti": Fraction(1024**4),
    "Pi": Fraction(1024**5),
}
_FORM = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?")


def read_quantity(value: int | str) -> Fraction:
    """The number meant: cores, or bytes. ValueError on another form."""
    found = _FORM.fullmatch(str(value))
    if not found:
        raise ValueError(f"not a quantity: {value!r}")
    return Fraction(found[1]) * _UNITS[found[2] or ""]


def write_bytes(value: int) -> str:
    """`64Gi`, `512Mi`; plain bytes where neither divides."""
    for unit, size in (("Gi", GI), ("Mi", 1024**2)):
        if value and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)
