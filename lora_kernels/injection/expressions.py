"""Regular expressions of unknown origin: `re.fullmatch` that cannot backtrack for ever.

`re` tries the ways to match one after the other, and `(a+)+b` has 2^n of them. Here a part of the
expression maps the set of positions where it may start to the set where it may end, so the work is
at most (parts) x (length)^2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

try:
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as ops  # type: ignore[no-redef]
    import sre_parse as parser  # type: ignore[no-redef]

Positions = frozenset[int]
_HARD = re.compile(r"[(*+?{]")  # without one of these, `re` is linear, and faster
_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT)
_SINGLE = {ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN}
_CATEGORIES = {ops.CATEGORY_DIGIT: r"\d", ops.CATEGORY_SPACE: r"\s", ops.CATEGORY_WORD: r"\w"}
_INVERSE = {
    ops.CATEGORY_NOT_DIGIT: r"\d", ops.CATEGORY_NOT_SPACE: r"\s", ops.CATEGORY_NOT_WORD: r"\w",
}  # fmt: skip


def check_expression(pattern: str) -> None:
    """Raise ValueError where `fullmatch` would."""
    _parsed(pattern)


def fullmatch(pattern: str, text: str, after: str = "") -> bool:
    """Whether `pattern` matches the whole of `text`, or what follows `after`, as `re` says.

    Raises ValueError for what is no regular expression, and for back references, conditions,
    possessive and atomic parts, and flags, which have no such set of positions.
    """
    _parsed(pattern)
    whole = f"{after}(?:{pattern})" if after else pattern
    if not _HARD.search(pattern):
        return re.fullmatch(whole, text) is not None
    return len(text) in _ends(_parsed(whole), frozenset({0}), text)


@lru_cache(maxsize=1024)
def _parsed(pattern: str) -> Any:
    try:
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is not a regular expression: {error}") from None
    if tree.state.flags & ~re.UNICODE or (why := _unsupported(tree)):
        what = "flags" if tree.state.flags & ~re.UNICODE else why
        raise ValueError(f"{pattern[:80]!r} has {what}, which are not supported")
    return tree


def _unsupported(tree: Any, depth: int = 0) -> str | None:
    """What a parsed expression has that sets of positions cannot follow; None if nothing."""
    if depth > 50:
        return "over 50 nested parts"
    for op, value in tree:
        if op is ops.SUBPATTERN and (value[1] or value[2]):
            return "flags"
        if op is ops.BRANCH:
            inner = value[1]
        elif op is ops.SUBPATTERN or op in _REPEATS:
            inner = [value[-1]]
        elif op in (ops.ASSERT, ops.ASSERT_NOT):
            inner = [value[1]]
        elif op in _SINGLE or op is ops.AT:
            continue
        else:
            return f"parts of kind {str(op).lower()}"
        for part in inner:
            if why := _unsupported(part, depth + 1):
                return why
    return None


def _ends(tree: Iterable[Any], starts: Positions, text: str) -> Positions:
    """Where a sequence of parts may end that starts at any of `starts`."""
    for op, value in tree:
        if not starts:
            break
        if op in _SINGLE:
            starts = frozenset(
                i + 1 for i in starts if i < len(text) and _is_one(op, value, text[i])
            )
        elif op is ops.BRANCH:
            starts = frozenset().union(*(_ends(branch, starts, text) for branch in value[1]))
        elif op is ops.SUBPATTERN:
            starts = _ends(value[3], starts, text)
        elif op in _REPEATS:
            starts = _repeated(value, starts, text)
        elif op is ops.AT:
            starts = frozenset(i for i in starts if _is_at(value, i, text))
        else:
            starts = frozenset(i for i in starts if _looks(value, i, text) == (op is ops.ASSERT))
    return starts


def _repeated(repeat: Any, starts: Positions, text: str) -> Positions:
    """Where `least` to `most` repetitions may end; a round moves on, or changes nothing more."""
    least, most, tree = repeat
    reached = starts if least == 0 else frozenset()
    count = 0
    while starts and count < most:
        count += 1
        before, starts = starts, _ends(tree, starts, text)
        if count < least:
            if starts == before:
                count = least - 1
            continue
        if starts <= reached:
            break
        reached |= starts
    return reached


def _looks(look: Any, i: int, text: str) -> bool:
    """Whether a look ahead (1) or behind (-1) of position i finds its part."""
    direction, tree = look
    if direction > 0:
        return bool(_ends(tree, frozenset({i}), text))
    return any(i in _ends(tree, frozenset({j}), text) for j in range(i + 1))


def _is_at(where: Any, i: int, text: str) -> bool:
    """Whether position i is where an anchor (`^`, `$`, a word's boundary) wants it."""
    if where in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
        return i == 0
    if where is ops.AT_END:
        return i == len(text) or (i == len(text) - 1 and text[i] == "\n")
    if where is ops.AT_END_STRING:
        return i == len(text)
    sides = [0 <= k < len(text) and re.match(r"\w", text[k]) is not None for k in (i - 1, i)]
    return (sides[0] != sides[1]) == (where is ops.AT_BOUNDARY)


def _is_one(op: Any, value: Any, char: str) -> bool:
    """Whether a part that takes one character takes this one."""
    if op is ops.ANY:
        return char != "\n"
    if op is not ops.IN:
        return (ord(char) == value) == (op is ops.LITERAL)
    found = any(_is_in(item, argument, char) for item, argument in value)
    return found != (value[0][0] is ops.NEGATE)


def _is_in(op: Any, value: Any, char: str) -> bool:
    """Whether one item of a set such as `[a-z_]` holds a character."""
    if op is ops.LITERAL:
        return ord(char) == value
    if op is ops.RANGE:
        return bool(value[0] <= ord(char) <= value[1])
    if op is ops.CATEGORY:
        inside = _CATEGORIES.get(value) or _INVERSE[value]
        return (re.match(inside, char) is not None) == (value in _CATEGORIES)
    return False
