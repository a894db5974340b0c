"""What narrower weights cost and save: error against bytes and energy, for a few widths.

The energy is that of the arithmetic on a chip that has such units, not of the machine at hand, and without memory,
which costs more: reading 32 bits from DRAM takes about 640 pJ.

Sources, all of 45 nm. Multiplications and additions: Horowitz, "Computing's Energy Problem", ISSCC 2014, figure 1.1.9,
at 0.9 V. It has no shift: 0.13 pJ of 32 bits (0.024 pJ of 8) is from You et al., ShiftAddNet, NeurIPS 2020, table 1,
which repeats Horowitz's figures beside it, and is what the authors compute with in the code of ShiftAddViT
(``get_unit_energy`` in ``pvt/hw_utils.py``). Their code of ShiftAddLLM takes 0.1 pJ instead, and 0.15 pJ for a shift by
a sum of two powers, of 16 bits. The shift is thus the figure with the least evidence; it counts once for each weight of
a power-of-two code, but for binary codes only once for each term of a group's scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Picojoules of one operation.
PICOJOULES: Mapping[str, float] = {
    "float32 multiply": 3.7,
    "float32 add": 0.9,
    "int8 multiply": 0.2,
    "int8 add": 0.03,
    "int32 add": 0.1,
    "int32 shift": 0.13,
}
SOURCE = (
    "arithmetic alone in 45 nm, by the tables of Horowitz (ISSCC 2014) and ShiftAddNet (NeurIPS 2020): float32 "
    "multiply 3.7 pJ, float32 add 0.9 pJ, int32 add 0.1 pJ, int32 shift 0.13 pJ; for a chip that has such units"
)


@dataclass(frozen=True)
class Point:
    """The layers in one form.

    Attributes:
        label: of the form.
        bytes: of their weights.
        snr: signal over error in dB of the layers' own outputs, by the mean of the layers' relative errors.
        picojoules: arithmetic of one inference; None if the number of operations is not known.
        chosen: this is what was built.
    """

    label: str
    bytes: int
    snr: float
    picojoules: float | None
    chosen: bool = False


@dataclass(frozen=True)
class Tradeoff:
    """The layers in several forms, the one in floating point first.

    Attributes:
        points: the forms.
        source: what the energy is.
    """

    points: tuple[Point, ...]
    source: str = SOURCE
