"""Splitting rows into train, validation and test by their texts alone, whatever their order."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence

SPLITS = ("train", "validation", "test")


def normalise(text: str) -> str:
    """The letters and digits of `text` in lower case, with one space between words.

    >>> normalise("Free  entry!")
    'free entry'
    """
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def stratified_split(
    groups: Sequence[Hashable],
    labels: Sequence[int],
    keys: Sequence[str],
    held_out: float = 0.1,
) -> list[str]:
    """The split of every row: a share `held_out` of each class for validation, as much for test.

    Rows with the same entry in `groups` are in the same split. Groups are ranked by a hash of their
    smallest key, so neither the order of the rows nor a random generator decides.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    by_class: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    for rows in members.values():
        counts: dict[int, int] = defaultdict(int)
        for row in rows:
            counts[labels[row]] += 1
        main = min(counts, key=lambda label: (-counts[label], label))
        digest = hashlib.sha256(min(keys[row] for row in rows).encode()).hexdigest()
        by_class[main].append((digest, rows))

    split = ["train"] * len(groups)
    for ranked in by_class.values():
        quota = held_out * sum(len(rows) for _, rows in ranked)
        filled = {"validation": 0, "test": 0}
        for _, rows in sorted(ranked):
            # A group that is too big for what is left goes to train. Otherwise one long chain of
            # near copies could be all that a small class has in test.
            for name in filled:
                if filled[name] + len(rows) <= max(quota, 1.0):
                    filled[name] += len(rows)
                    for row in rows:
                        split[row] = name
                    break
    return split
