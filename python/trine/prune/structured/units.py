"""Positions of tensors that can only be removed together."""

from __future__ import annotations

import numpy as np

Ids = np.ndarray


class Units:
    """A union-find over positions ("units"), with what is known of each set.

    A unit is one position along one dimension of some tensor. Sets grow by `union` only; a frozen
    set stays in the model.
    """

    def __init__(self) -> None:
        self._parent = np.empty(0, dtype=np.int64)
        self._reasons: dict[int, str] = {}
        self._tags: dict[str, list[Ids]] = {}
        self._rectangles: list[Ids] = []

    def new(self, count: int) -> Ids:
        """`count` units, each in a set of its own."""
        start = len(self._parent)
        ids = np.arange(start, start + count)
        self._parent = np.concatenate([self._parent, ids])
        return ids

    def roots(self, ids: Ids) -> Ids:
        """One member of each unit's set, the same for all its members."""
        found = self._parent[ids]
        while True:
            above = self._parent[found]
            if (above == found).all():
                self._parent[ids] = found
                return found
            found = above

    def union(self, first: Ids, second: Ids) -> None:
        """Join the sets of the units, pair by pair; the arrays broadcast."""
        pairs = np.stack(np.broadcast_arrays(self.roots(first), self.roots(second)))
        pairs = pairs.reshape(2, -1)[:, (pairs[0] != pairs[1]).ravel()]
        for one, other in np.unique(pairs, axis=1).T:
            one, other = self._root(one), self._root(other)
            if one != other:
                self._parent[max(one, other)] = min(one, other)

    def _root(self, unit: int) -> int:
        while self._parent[unit] != unit:
            unit = self._parent[unit]
        return unit

    def join_along(self, ids: Ids, axis: int) -> Ids:
        """Join what lies along one axis, which must keep its size; the ids without that axis."""
        first = ids.take([0], axis)
        self.union(ids, first)
        return first.squeeze(axis)

    def freeze(self, ids: Ids, reason: str) -> None:
        """These stay in the model, and with them all that is joined to them, before or after."""
        for root in np.unique(self.roots(ids)).tolist():
            self._reasons.setdefault(root, reason)

    def tag(self, ids: Ids, tag: str) -> None:
        """Remember `tag` of the sets that these are in."""
        self._tags.setdefault(tag, []).append(ids.ravel())

    def rectangle(self, ids: Ids) -> None:
        """These are the positions of a tensor in several dimensions at once, and stay so."""
        self._rectangles.append(ids)

    def settle(self) -> None:
        """Join until whole slices remain of every rectangle, along the axis with most of them."""
        changed = True
        while changed:
            changed = False
            for ids in self._rectangles:
                roots = self.roots(ids)
                varying = [
                    axis for axis in range(roots.ndim) if (roots != roots.take([0], axis)).any()
                ]
                if len(varying) > 1:
                    varying.remove(max(varying, key=lambda axis: roots.shape[axis]))
                    for axis in varying:
                        self.union(ids, ids.take([0], axis))
                    changed = True

    def reasons(self) -> dict[int, str]:
        """Of every frozen set, by its root, why it was frozen first."""
        found: dict[int, str] = {}
        for unit, reason in self._reasons.items():
            found.setdefault(self._root(unit), reason)
        return found

    def tagged(self, tag: str) -> set[int]:
        """The roots of the sets with this tag."""
        kept = self._tags.get(tag)
        return set() if kept is None else set(self.roots(np.concatenate(kept)).tolist())
