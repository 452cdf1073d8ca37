"""What the documents name exists: paths, targets of make, commands, flags, environment variables.

Read are the code spans and code blocks of every document; prose is left alone.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_kernels
from bench.__main__ import SUITES
from lora_kernels import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "bench/README.md",
    ROOT / "tests/compiled/README.md",
]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SUFFIXES = (".py", ".md", ".toml", ".txt", ".yaml", ".json", ".png", ".c")
# A reader's own places, and names inside an adapter's directory.
NOT_OURS = ("path/", "runs/", ".venv", "~", "adapter_config.json", "config.json", "<gpu>.json")

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def code(document: Path) -> Iterator[str]:
    """Every line of a code block, without its comment, and every code span outside of them."""
    text = document.read_text(encoding="utf-8")
    inside = False
    for part in re.split(r"^```.*$", text, flags=re.MULTILINE):
        if inside:
            lines = part.replace("\\\n", " ").splitlines()
            yield from (re.split(r"\s#\s", line)[0].strip() for line in lines)
        else:
            yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", part))
            yield from re.findall(r"\]\(([^)#]+)\)", part)
        inside = not inside


def commands(document: Path) -> Iterator[list[str]]:
    """The words of each command, without a folder before it and variables set for it."""
    for line in code(document):
        try:
            words = shlex.split(line)
        except ValueError:  # no command: an apostrophe
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


@each_document
def test_every_path_exists(document):
    bases = (ROOT, document.parent, ROOT / "lora_kernels")
    for word in (word.strip(",;:()'\"") for line in code(document) for word in line.split()):
        named = re.fullmatch(r"[A-Za-z_.<~][\w.<>*~-]*(/[\w.*-]+)*/?", word)
        if not named or word.startswith(NOT_OURS):
            continue
        if word.endswith(SUFFIXES) or word.endswith("/") or word.split("/")[0] in ("tests", "docs"):
            assert any(any(base.glob(word.rstrip("/"))) for base in bases), f"{word} does not exist"


@each_document
def test_every_target_of_make_exists(document):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE))
    for words in commands(document):
        if words[0] == "make":
            for word in words[1:]:
                known = variables if "=" in word else targets
                assert word.split("=")[0] in known, f"make {word}"


def flags_of_training() -> set[str]:
    """The flags of models.train: the fields of Arguments, read without importing transformers."""
    tree = ast.parse((ROOT / "models/arguments.py").read_text(encoding="utf-8"))
    (cls,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Arguments")
    fields = [n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)]
    names = [name.replace("_", "-") for name in fields]
    return (
        {f"--{name}" for name in names}
        | {f"--no-{name}" for name in names}
        | {"--help", "--config"}
    )


@each_document
def test_every_command_exists(document):
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py"))
    flags_of_bench = set(re.findall(r'"(--[a-z-]+)"', sources))
    for words in commands(document):
        if words[:2] == ["python", "-m"]:
            module, *rest = words[2:]
            path = ROOT / module.replace(".", "/")
            ours = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
            assert ours or module == "pytest", f"python -m {module}"
            flags = {word for word in rest if word.startswith("--")}
            if module == "models.train":
                assert flags <= flags_of_training(), flags - flags_of_training()
            if module in ("models.sweep", "models.report", "models.side_by_side"):
                known = set(
                    re.findall(r'"(--[a-z-]+)"', path.with_suffix(".py").read_text("utf-8"))
                )
                assert flags <= known, flags - known
            if module == "bench" and rest:
                assert rest[0] in SUITES, rest
                flags -= flags_of_training() if "--train-run" in rest else set()
                assert flags <= flags_of_bench, flags - flags_of_bench
        if words[0] == "lora-kernels" and len(words) > 1:
            cli.parser().parse_args(words[1:])


# ---------------------------------------------------------------- environment variables


def variables_read() -> Iterator[str]:
    """The keys of os.environ that the sources read or set, by value or by a constant's name."""
    for folder in ("lora_kernels", "bench", "models", "tests/compiled"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            constants = {
                target.id: node.value.value
                for node in tree.body
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            for node in ast.walk(tree):
                key = None
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("os.environ."):
                    key = node.args[0] if node.args else None
                elif isinstance(node, ast.Subscript) and "environ" in ast.unparse(node.value):
                    key = node.slice
                if isinstance(key, ast.Constant):
                    yield key.value
                elif isinstance(key, ast.Name):
                    yield constants[key.id]


def variables_listed() -> set[str]:
    """The first cells of the tables of CONTRIBUTING's last section."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Environment variables")[2]
    return set(re.findall(r"^\| `([A-Z_]+)` \|", section, re.MULTILINE))


def test_every_variable_that_is_read_is_listed():
    read = set(variables_read())
    assert {"LORA_KERNELS_CACHE", "TRITON_INTERPRET", "COMPILED_FOR"} <= read, "all are found"
    assert read <= variables_listed(), read - variables_listed()


def test_every_variable_that_is_listed_is_used():
    folders = ("lora_kernels", "bench", "models", "tests")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    text = MAKEFILE + "".join(p.read_text("utf-8") for p in sources if p != Path(__file__))
    for name in variables_listed():
        assert re.search(rf"\b{name}\b", text), f"nothing uses {name}"


@each_document
def test_every_variable_that_is_set_is_listed(document):
    of_make = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE))
    for line in code(document):
        for name in re.findall(r"(?:^|\s)([A-Z][A-Z_]+)=\S", line):
            assert name in variables_listed() | of_make | {"PYTHONPATH"}, name


# ---------------------------------------------------------------- public names


@pytest.mark.parametrize("name", lora_kernels.__all__)
def test_a_public_name_has_a_docstring_and_a_place_in_the_documents(name):
    value = getattr(lora_kernels, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__doc__ and value.__doc__.strip(), f"{name} has no docstring"
    spans = [span for document in DOCUMENTS for span in code(document)]
    assert any(re.search(rf"\b{name}\b", span) for span in spans), f"no document names {name}"
