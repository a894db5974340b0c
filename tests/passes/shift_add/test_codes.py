"""Coded weights: the books, the scales, error-aware columns, storage, and the choice of bits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompile.passes.shift_add import codes

CASES = [(kind, bits) for kind, widths in codes.WIDTHS.items() for bits in widths]


def weights(seed: int, rows: int = 24, columns: int = 72) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.05


def powers_in(value: float, most: int) -> bool:
    """True if a number is a sum of at most this many signed powers of two."""
    fraction, _ = math.frexp(abs(value))
    number, count = int(fraction * 2**53), 0
    while number:
        # The non-adjacent form has the fewest terms.
        if number & 1:
            count += 1
            number -= 2 - (number & 3)
        number >>= 1
    return count <= most


@pytest.mark.parametrize(("kind", "bits"), [c for c in CASES if c[0] != "binary"])
def test_a_book_holds_what_shifts_and_one_addition_can_make(kind, bits):
    levels = codes.book(kind, bits)
    assert len(levels) == 2**bits
    assert np.array_equal(levels[: len(levels) // 2], -levels[len(levels) // 2 :])
    assert all(powers_in(float(v), 1 if kind == "pot" else 2) for v in levels)
    assert len(np.unique(np.abs(levels))) > 2 ** (bits - 2), "levels that repeat are wasted codes"


def test_the_four_bit_books_are_those_of_the_papers():
    assert codes.book("pot", 4)[:8].tolist() == [0, *(2.0**-i for i in range(6, -1, -1))]
    assert np.unique(codes.book("sp2", 4)[:8]).tolist() == [0, 1 / 8, 1 / 4, 1 / 2, 5 / 8, 3 / 4, 1]


@pytest.mark.parametrize("unknown", [("pot", 5), ("sp2", 2), ("binary", 4), ("float", 8)])
def test_a_book_that_does_not_exist_is_refused(unknown):
    with pytest.raises(ValueError, match="no book"):
        codes.book(*unknown)


@pytest.mark.parametrize(("kind", "bits"), CASES)
@pytest.mark.parametrize("group", [0, 7, 32])
def test_decoded_weights_are_sums_of_few_powers_of_two(kind, bits, group):
    coded = codes.encode(weights(1, 6, 40), kind, bits, group=group)
    allowed = {"pot": 1, "sp2": 2, "binary": codes.TERMS * bits}[kind]
    assert all(powers_in(float(v), allowed) for v in np.unique(coded.decode()))
    assert not powers_in(1 / 3, allowed)


def test_what_a_code_can_hold_is_held_exactly():
    rng = np.random.default_rng(2)
    levels = codes.book("pot", 4)
    exact = rng.choice(levels, (8, 50)) * np.float32(2.0) ** rng.integers(-4, 5, (8, 1))
    assert np.array_equal(codes.encode(exact, "pot", 4).decode(), exact)
    a, b = np.sign(rng.standard_normal((2, 8, 50)))
    two_scales = (0.75 * a + 0.125 * b).astype(np.float32)
    assert np.array_equal(codes.encode(two_scales, "binary", 2).decode(), two_scales)
    assert not np.array_equal(codes.encode(exact * 1.1, "pot", 4).decode(), exact * 1.1)


@pytest.mark.parametrize(("shifts", "bits"), [(1, 2), (3, 3), (7, 4), (15, 8)])
def test_weights_trained_as_shifts_are_recognised_and_kept_bit_for_bit(shifts, bits):
    rng = np.random.default_rng(11)
    weight = (rng.choice([-1, 0, 1], (9, 40)) * 2.0 ** -rng.integers(0, shifts, (9, 40))).astype(np.float32)
    weight[:, 0], weight[2] = 1, 0
    coded = codes.exact(weight)
    assert coded is not None
    assert coded.bits == bits
    assert np.array_equal(coded.decode(), weight)
    weight[3, 3] = 0.75
    assert codes.exact(weight) is None
    assert codes.exact(np.zeros((2, 3), np.float32)) is None


@pytest.mark.parametrize("kind", ["pot", "sp2"])
def test_every_weight_takes_the_nearest_level(kind):
    values = weights(3)
    coded = codes.encode(values, kind, 4, group=24)
    group = np.arange(72) // 24
    distance = np.abs(values[:, :, None] - coded.levels[:, group])
    chosen = np.take_along_axis(distance, coded.codes[:, :, None].astype(int), 2)[:, :, 0]
    assert np.array_equal(chosen, distance.min(2))


def test_no_scale_within_reach_is_better():
    values = weights(4)
    coded = codes.encode(values, "sp2", 4)
    error = ((values - coded.decode()) ** 2).sum(1)
    for offset in (-2, -1, 1, 2):
        levels = np.ldexp(codes.book("sp2", 4)[None], coded.exponents.astype(int) + offset)
        other = np.abs(values[:, :, None] - levels[:, None]).min(2)
        assert (error <= (other**2).sum(1) + 1e-9).all()


def test_binary_codes_beat_their_greedy_start():
    values = weights(5, 16, 128).astype(np.float64)
    rest = values.copy()
    for _ in range(3):
        rest -= np.abs(rest).mean(1, keepdims=True) * np.where(rest >= 0, 1, -1)
    coded = codes.encode(values, "binary", 3)
    assert ((values - coded.decode()) ** 2).sum() < 0.9 * (rest**2).sum()


@pytest.mark.parametrize(("kind", "bits"), [("pot", 4), ("sp2", 4), ("binary", 3)])
def test_error_aware_columns_lessen_the_error_of_the_outputs(kind, bits):
    rng = np.random.default_rng(6)
    values = weights(6)
    inputs = rng.standard_normal((500, 72)) @ rng.standard_normal((72, 72))
    plain = codes.encode(values, kind, bits).decode()
    aware = codes.encode(values, kind, bits, gram=inputs.T @ inputs).decode()

    def noise(found):
        return ((inputs @ (values - found).T) ** 2).sum()

    assert noise(aware) < 0.7 * noise(plain)
    # Inputs that have nothing to do with each other leave nothing to make up for.
    assert np.array_equal(codes.encode(values, kind, bits, gram=np.eye(72)).decode(), plain)


def test_inputs_that_are_always_zero_do_no_harm():
    inputs = np.random.default_rng(7).standard_normal((20, 72))
    inputs[:, ::3] = 0
    found = codes.encode(weights(7), "binary", 4, gram=inputs.T @ inputs).decode()
    assert np.isfinite(found).all()
    assert np.isfinite(codes.encode(weights(7), "binary", 4, gram=np.zeros((72, 72))).decode()).all()


def test_rows_of_zeros_stay_so():
    values = weights(8)
    values[3] = 0
    assert not codes.encode(values, "pot", 4).decode()[3].any()
    assert not codes.encode(values, "sp2", 8).decode()[3].any()
    # A binary code has no zero; what it puts there is below rounding.
    assert np.abs(codes.encode(values, "binary", 2).decode()[3]).max() <= np.abs(values).max() * 1e-6


@pytest.mark.parametrize(
    ("values", "arguments", "why"),
    [
        (weights(0), {"kind": "binary", "bits": 8}, "no 'binary' code"),
        (weights(0), {"kind": "shift", "bits": 4}, "no 'shift' code"),
        (weights(0)[0], {"kind": "pot", "bits": 4}, "matrix"),
        (weights(0) * np.nan, {"kind": "pot", "bits": 4}, "finite"),
        (weights(0), {"kind": "pot", "bits": 4, "gram": np.eye(3)}, "Gram"),
    ],
)
def test_what_cannot_be_coded_is_refused(values, arguments, why):
    with pytest.raises(ValueError, match=why):
        codes.encode(values, **arguments)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_packing_loses_nothing(bits, rows, columns, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    planes = codes.pack(values, bits)
    assert planes.shape == (bits, rows, -(-columns // 8))
    assert np.array_equal(codes.unpack(planes, columns), values)
    column = columns - 1
    assert planes[0, 0, column // 8] >> (column % 8) & 1 == values[0, column] & 1


def test_four_bits_take_at_most_0_15_of_float32():
    values = weights(9, 64, 1024)
    for kind, group in (("pot", 128), ("sp2", 128), ("binary", 1024), ("binary", 256), ("binary", 128)):
        assert codes.encode(values, kind, 4, group=group).bytes <= 0.15 * values.nbytes
    narrow = weights(9, 64, 128)
    for kind in codes.WIDTHS:
        assert codes.encode(narrow, kind, 4, group=256).bytes <= 0.15 * narrow.nbytes
    assert codes.encode(narrow, "binary", 4, group=32).bytes > 0.15 * narrow.nbytes


def test_a_scale_is_the_sum_of_two_powers_next_to_it():
    values = np.random.default_rng(12).random((50, 4)) * 2.0 ** np.arange(-30, 20)[:, None]
    found = codes._scales(codes._powers(values))
    # After the nearest power a third is left at most, after the next a third of that.
    assert (np.abs(found - values) <= values / 9 + 1e-12).all()
    whole = np.asarray([1.0, 0.25, 3.0, 0.75, 5.0, 7.0, 0.0])
    assert np.array_equal(codes._scales(codes._powers(whole)), whole)
    assert not np.array_equal(codes._scales(codes._powers(whole + 11)), whole + 11)  # 11 has three terms
    # What is too small for seven bits of exponent is nothing, what is too large the largest.
    tiny, huge = codes._scales(codes._powers(np.asarray([1e-30, 1e30])))
    assert tiny == 0 and 2.0**61 < huge < np.inf


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_the_choice_of_bits_keeps_the_budget_and_no_hull_step_is_left(seed, layers):
    rng = np.random.default_rng(seed)
    choices = []
    for _ in range(layers):
        errors = np.sort(rng.random(4))[::-1]
        choices.append({b: (float(c), float(e)) for b, c, e in zip((2, 3, 4, 8), (2, 3, 4, 8), errors, strict=True)})
    for budget in (2.0 * layers, 3.7 * layers, 8.0 * layers):
        chosen = codes.allocate(choices, budget)
        assert sum(layer[b][0] for layer, b in zip(choices, chosen, strict=True)) <= budget
        error = sum(layer[b][1] for layer, b in zip(choices, chosen, strict=True))
        best = min(
            sum(layer[b][1] for layer, b in zip(choices, all_of, strict=True))
            for all_of in itertools.product((2, 3, 4, 8), repeat=layers)
            if sum(layer[b][0] for layer, b in zip(choices, all_of, strict=True)) <= budget
        )
        # Greedy on the hull is optimal but for the last step, which is worth at most the largest error of one layer.
        assert error - best <= max(layer[2][1] for layer in choices) + 1e-9
    assert codes.allocate(choices, 8.0 * layers) == [8] * layers
    assert codes.allocate(choices, 0.0) == [2] * layers
