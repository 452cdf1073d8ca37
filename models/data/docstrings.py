"""Real English text that every Python carries: which package does this docstring come from?

The source files of a dozen standard-library packages are parsed with `ast`; nothing is imported or
run. Docstrings are cut into paragraphs, the names of the packages and of their modules are masked,
repeats are dropped, and the paragraphs are split into train, validation and test.

To split by source file would be strictest, but a class such as `ipaddress` is one file. The rule is
instead that no run of six words occurs in two splits, and that the paragraphs of one docstring stay
together. So the synchronous and the asynchronous version of a text share a split, too.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .splits import SPLITS, normalise, stratified_split

# Class -> its sources below the standard library. All of them are in Python 3.10 to 3.13.
PACKAGES: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "decimal": ("_pydecimal.py",),
    "email": ("email",),
    "http": ("http",),
    "importlib": ("importlib",),
    "ipaddress": ("ipaddress.py",),
    "logging": ("logging",),
    "multiprocessing": ("multiprocessing",),
    "typing": ("typing.py",),
    "unittest": ("unittest",),
    "urllib": ("urllib",),
    "xml": ("xml",),
}
MASK = "this"
RUN = 6  # two paragraphs that share a run of this many words are in the same split
SHORTEST, LONGEST = 5, 48  # words in an example


@dataclass(frozen=True)
class Docstrings:
    """The task: split -> rows of (text, label), and what they were built from."""

    splits: dict[str, list[tuple[str, int]]]
    labels: tuple[str, ...]
    python: str
    sha256: str


def build(stdlib: Path | None = None) -> Docstrings:
    """The task, built from the running Python's standard library or from the one at `stdlib`.

    Raises FileNotFoundError naming a package whose sources are not there.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    labels = tuple(PACKAGES)
    mask = _mask_pattern(root)
    rows: list[tuple[str, str, int, tuple[int, int]]] = []  # key, text, class, docstring
    seen: dict[str, int] = {}
    ambiguous: set[str] = set()
    for label, package in enumerate(labels):
        for source, docstring in enumerate(_docstrings(root, package)):
            for paragraph in _paragraphs(docstring):
                text = re.sub(rf"\b{MASK}(?:\W+{MASK})+\b", MASK, mask.sub(MASK, paragraph))
                key = normalise(text)
                if key in seen:
                    if seen[key] != label:
                        ambiguous.add(key)
                    continue
                seen[key] = label
                rows.append((key, text, label, (label, source)))
    rows = [row for row in rows if row[0] not in ambiguous]

    keys = [key for key, *_ in rows]
    groups = _linked(keys, [docstring for *_, docstring in rows])
    names = stratified_split(groups, [label for _, _, label, _ in rows], keys)
    splits: dict[str, list[tuple[str, int]]] = {name: [] for name in SPLITS}
    for (_, text, label, _), name in zip(rows, names, strict=True):
        splits[name].append((text, label))
    content = hashlib.sha256()
    for name in SPLITS:
        for text, label in splits[name]:
            content.update(f"{name}\t{label}\t{text}\n".encode())
    return Docstrings(splits, labels, platform.python_version(), content.hexdigest())


def _sources(root: Path, package: str) -> list[Path]:
    """The source files of `package`, in a fixed order."""
    found: list[Path] = []
    for relative in PACKAGES[package]:
        path = root / relative
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    if not found:
        raise FileNotFoundError(
            f"the standard library at {root} has no source of {package!r} "
            f"({', '.join(PACKAGES[package])}); the docstrings task needs its .py files"
        )
    return found


def _docstrings(root: Path, package: str) -> Iterator[str]:
    """The docstrings of `package`: of each file, its modules, classes and functions."""
    for path in _sources(root, package):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield docstring


def _paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs that read as prose, cut at `LONGEST` words."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        words = paragraph.split()
        if ">>>" in paragraph or len(words) < SHORTEST:
            continue
        letters = sum(c.isalpha() or c.isspace() for c in paragraph)
        if letters < 0.8 * len(paragraph):  # tables, grammars, code
            continue
        yield " ".join(words[:LONGEST])


def _mask_pattern(root: Path) -> re.Pattern[str]:
    """Matches any word with a package's name in it, and the name of any package's modules.

    All classes share one pattern: which words are masked must not tell the class.
    """
    modules = {
        part
        for package in PACKAGES
        for path in _sources(root, package)
        for part in path.relative_to(root).with_suffix("").parts
        if not part.startswith("__")
    }
    names = "|".join(sorted(PACKAGES))
    stems = "|".join(sorted(re.escape(part.strip("_")) for part in modules))
    return re.compile(rf"\w*(?:{names})\w*|\b_*(?:{stems})_*\b", re.IGNORECASE)


def _linked(keys: list[str], sources: list[tuple[int, int]]) -> list[int]:
    """The group of every row, by union-find: rows that share a docstring or a run are together."""
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[object, int] = {}
    for row, (key, source) in enumerate(zip(keys, sources, strict=True)):
        words = key.split()
        runs = [" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
        for link in (source, *runs):
            parent[root(row)] = root(first.setdefault(link, row))
    return [root(row) for row in range(len(keys))]
