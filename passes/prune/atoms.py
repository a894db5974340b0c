"""Which channels can only go together: a union-find over symbolic channels.

An *atom* is a yes-or-no decision, "this goes". A *label* says when one position of one axis goes: when any of its atoms
does. The labels of an axis are an integer array ``[extent, k]``, one row per position; ``k = 0`` means that nothing on
the axis ever goes, and a row may be padded with :data:`NEVER`. One column is enough until a Reshape splits an axis: of
the positions ``(head, dimension)`` of one axis, those of a head go together, or those of a dimension in all heads, and
never an arbitrary subset, for what is left must still be a rectangle. So the label of position ``(i, j)`` is
``{head i, dimension j}``, and both kinds of cuts stay possible at once.

The rules of the operators state equations between labels, which are solved as they come, each as a whole array:

- ``{a} = {b}`` makes two atoms one;
- ``{a} = {b, c}`` defines ``a``, where it is not among ``b, c``;
- ``{} = {b, c}`` says that neither ever goes, and why;
- ``{a, b} = {c, d}`` makes atoms one in pairs, and says of what is left over that it never goes. That is more than the
  equation demands, and so is every other shortcut here: too many ties cost possible cuts, never correctness.

Source: the union-find is that of Galler and Fisher (CACM 1964); hooking and pointer jumping over whole arrays is as in
Shiloach and Vishkin (J. Algorithms 1982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Labels: TypeAlias = np.ndarray
"""Labels of the positions of an axis, int64 ``[extent, k]``."""

NEVER = 0
"""The atom that never goes; in a row with others it says nothing."""


def fixed(extent: int) -> Labels:
    """Labels of an axis none of whose positions ever goes."""
    return np.zeros((extent, 0), np.int64)


def product(factors: Sequence[Labels]) -> Labels:
    """Labels of an axis that merges several, the last one varying fastest."""
    sizes = [len(f) for f in factors]
    columns = [
        np.broadcast_to(
            f.reshape([n if i == j else 1 for j, n in enumerate(sizes)] + [f.shape[1]]), [*sizes, f.shape[1]]
        ).reshape(math.prod(sizes), f.shape[1])
        for i, f in enumerate(factors)
    ]
    return np.concatenate(columns, axis=1) if columns else fixed(1)


def stacked(parts: Sequence[Labels]) -> Labels:
    """Labels of an axis that is a sequence of others."""
    width = max(p.shape[1] for p in parts)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1]))) for p in parts])


def _packed(labels: Labels) -> Labels:
    """The same rows, their padding last."""
    return np.take_along_axis(labels, np.argsort(labels == NEVER, axis=1, kind="stable"), axis=1)


class Atoms:
    """All atoms of one graph, and what is known of them."""

    def __init__(self):
        self.count = 0
        self._parent = np.zeros(0, np.int64)
        self._why = np.zeros(0, np.int64)  # index of the reason why an atom never goes, 0 while it may
        self._row = np.zeros(0, np.int64)  # row of its definition, -1 without
        self._definitions = np.zeros((0, 1), np.int64)
        self.reasons = ["", "it is no axis of channels"]
        self._known = {text: i for i, text in enumerate(self.reasons)}
        self.pin(self.fresh(1), self.reasons[1])

    def fresh(self, extent: int) -> Labels:
        """Labels of an axis whose positions may each go on their own."""
        start, self.count = self.count, self.count + extent
        if self.count > len(self._parent):
            more = max(2 * self.count, 1024) - len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), len(self._parent) + more)])
            self._why = np.pad(self._why, (0, more))
            self._row = np.pad(self._row, (0, more), constant_values=-1)
        return np.arange(start, self.count)[:, None]

    # -- looking ---------------------------------------------------------------------------------------------------

    def _find(self, atoms: np.ndarray) -> np.ndarray:
        while not np.array_equal(above := self._parent[atoms], atoms):
            atoms = above
        return atoms

    def expand(self, labels: Labels) -> Labels:
        """The same labels in atoms that are neither tied to an older one nor defined by others."""
        labels = self._find(labels)
        while (rows := self._row[labels]).max(initial=-1) >= 0:
            parts = np.where(rows[:, :, None] >= 0, self._definitions[rows], 0)
            parts[:, :, 0] = np.where(rows >= 0, parts[:, :, 0], labels)
            labels = self._find(parts.reshape(len(labels), -1))
            labels = labels[:, labels.any(axis=0)]
        return labels

    def open(self, labels: Labels) -> Labels:
        """Labels reduced to the atoms that may go, each once per position."""
        labels = self.expand(labels)
        labels = np.where(self._why[labels] > 0, NEVER, labels)
        for column in range(1, labels.shape[1]):
            repeated = (labels[:, :column] == labels[:, column : column + 1]).any(axis=1)
            labels[repeated, column] = NEVER
        return labels[:, labels.any(axis=0)]

    def tidy(self, labels: Labels) -> Labels:
        """Labels without columns that say nothing, but for one that says why the axis stays whole."""
        plain, found = self.expand(labels), self.open(labels)
        return plain if plain.shape[1] <= 1 else found if found.shape[1] else plain[:, :1]

    def why(self, labels: Labels) -> np.ndarray:
        """For each position the index of a reason why something there never goes; 0 where there is none."""
        return self._why[self.expand(labels)].max(axis=1, initial=0)

    # -- deciding --------------------------------------------------------------------------------------------------

    def reason(self, text: str) -> int:
        """The index of a reason, to be given to :meth:`pin`."""
        if text not in self._known:
            self._known[text] = len(self.reasons)
            self.reasons.append(text)
        return self._known[text]

    def pin(self, labels: Labels, reason: str | int | np.ndarray) -> None:
        """Say that nothing at these positions ever goes; of several reasons the first stays."""
        index = self.reason(reason) if isinstance(reason, str) else np.asarray(reason)
        atoms = self.expand(labels)
        index = np.broadcast_to(np.reshape(index, (-1, 1)), atoms.shape)
        may = self._why[atoms] == 0
        self._why[atoms[may]] = index[may]

    def unify(self, one: Labels, two: Labels, reason: str, other: str = "") -> None:
        """State that the same positions of two axes of one extent go.

        Args:
            one, two: labels ``[n, k]`` and ``[n, m]``.
            reason: why ``one`` stays whole where nothing is known of why ``two`` does.
            other: the same the other way round, ``reason`` by default.
        """
        texts = self.reason(reason), self.reason(other or reason)
        a, b = self.expand(one), self.expand(two)
        if a.shape[1] == b.shape[1] == 1:  # also of two that stay, so that they are reported together
            both = ((a != NEVER) & (b != NEVER))[:, 0]
            self._union(a[both, 0], b[both, 0])
        while True:
            a, b = self.open(one), self.open(two)
            width = max(a.shape[1], b.shape[1])
            a, b = (_packed(np.pad(x, ((0, 0), (0, width - x.shape[1])))) for x in (a, b))
            differ = (np.sort(a, axis=1) != np.sort(b, axis=1)).any(axis=1)
            if not differ.any():
                return
            one, two, a, b = one[differ], two[differ], a[differ], b[differ]
            of_a, of_b = (a != NEVER).sum(axis=1), (b != NEVER).sum(axis=1)
            simple = (of_a == 1) & (of_b == 1)
            if simple.any():
                self._union(a[simple, 0], b[simple, 0])
            elif (stays := (of_a == 0) | (of_b == 0)).any():
                for mine, against, text in ((a, two, texts[0]), (b, one, texts[1])):
                    given = self.why(against[stays])
                    self.pin(mine[stays], np.where(given > 1, given, text))
            elif (single := (of_a == 1) | (of_b == 1)).any():
                swap = (of_a > 1)[single, None]
                self._define(np.where(swap, b[single], a[single])[:, 0], np.where(swap, a[single], b[single]))
            else:
                self._pair(a, b, texts[0])

    def _union(self, a: np.ndarray, b: np.ndarray) -> None:
        while True:
            a, b = self._find(a), self._find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.maximum.at(self._why, low, np.where(self._why[low] > 0, 0, self._why[high]))
            np.minimum.at(self._parent, high, low)

    def _define(self, atoms: np.ndarray, by: np.ndarray) -> None:
        """Define atoms by rows of others; where that would be circular, all of a row become one atom."""
        circular = np.isin(by, atoms).any(axis=1)
        if circular.any():
            flat = np.where(by[circular] == NEVER, atoms[circular, None], by[circular])
            self._union(np.repeat(atoms[circular], flat.shape[1]), flat.reshape(-1))
            return
        atoms, first = np.unique(atoms, return_index=True)
        by, known = by[first], self._definitions
        width = max(by.shape[1], known.shape[1])
        self._row[atoms] = len(known) + np.arange(len(atoms))
        self._definitions = np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (known, by)])

    def _pair(self, a: np.ndarray, b: np.ndarray, reason: int) -> None:
        """Make atoms of two rows one in pairs, after what both share; the rest of the longer row stays."""
        same = (a[:, :, None] == b[:, None, :]) & (a != NEVER)[:, :, None]
        a, b = _packed(np.where(same.any(axis=2), NEVER, a)), _packed(np.where(same.any(axis=1), NEVER, b))
        both = (a != NEVER) & (b != NEVER)
        self._union(a[both], b[both])
        self.pin(np.where(both, NEVER, a), reason)
        self.pin(np.where(both, NEVER, b), reason)
