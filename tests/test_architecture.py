"""The house rules that a reader relies on: one-way imports, light imports, what the wheel holds."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import lora_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lora_kernels"
OURS = ("lora_kernels", "models", "bench")

# The wings, from the ground up. A wing may import the wings before it; within a wing imports make
# no circle. `tools` stands beside `layers`: it drives strategies and kernels, and knows no model.
WINGS = (
    "algebra", "hardware", "kernels", "strategies", "autograd", "layers", "injection", "adapters",
)  # fmt: skip
MAY_IMPORT = {wing: set(WINGS[: i + 1]) for i, wing in enumerate(WINGS)}
MAY_IMPORT["algebra"] = {"algebra"}
MAY_IMPORT["durable"] = set()  # below all wings; imported by the two that write files
for wing in ("hardware", "adapters"):
    MAY_IMPORT[wing].add("durable")
MAY_IMPORT["arguments"] = set()  # below all wings too; what callers pass is checked in five
for wing in ("autograd", "layers", "injection", "adapters"):
    MAY_IMPORT[wing].add("arguments")
MAY_IMPORT["training"] = {"arguments", "hardware", "training"}  # of any step of any model
MAY_IMPORT["tools"] = {*WINGS[: WINGS.index("autograd") + 1], "tools"}
MAY_IMPORT["__init__"] = {*WINGS, "training", "former_names"}  # the public names
MAY_IMPORT["former_names"] = set()
MAY_IMPORT["cli"] = {"adapters", "tools", "__init__"}  # its version
IMPORT_TRITON = ("kernels", "tools")

PUBLIC = {
    "FusedLoRACallback", "FusedLoRALinear", "GraphedForward", "GraphedStep", "LoRAConfig", "Report",
    "STRATEGIES", "adapter_rows", "add_lora", "add_loras", "disable_adapter", "drop_adapter",
    "explain", "fuse_peft", "graph_trainer", "load_adapter", "load_adapters", "lora_fa",
    "lora_linear", "lora_plus", "merge", "save_adapter", "save_adapters", "unfuse_peft",
}  # fmt: skip

MAX_LINES = 400


def _sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _each(*folders: str):
    return pytest.mark.parametrize("path", _sources(*folders), ids=_name)


def _imports(node: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The dotted paths that a module of `package` imports, at its top or in a function."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (tuple(alias.name.split(".")) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else ()
        base += tuple(node.module.split(".")) if node.module else ()
        yield from ((*base, alias.name) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, package)


def _wing(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _ours(path: Path) -> Iterator[tuple[str, ...]]:
    """What a file imports of lora_kernels, without that first name."""
    for target in _imports(_tree(path), path.relative_to(ROOT).parent.parts):
        if target[0] == "lora_kernels":
            yield target[1:]


def _wings_imported(path: Path) -> set[str]:
    named = {target[0] if target else "__init__" for target in _ours(path)}
    modules = {entry.name.removesuffix(".py") for entry in PACKAGE.iterdir()}
    return {name if name in modules else "__init__" for name in named} - {_wing(path)}


def _files_imported(path: Path) -> set[Path]:
    """The files that define what a file imports; a door stands for the names that it hands on."""
    found = set()
    for target in _ours(path):
        for length in (len(target), len(target) - 1):
            base = PACKAGE.joinpath(*target[:length])
            if base.with_suffix(".py").is_file() and length:
                found.add(base.with_suffix(".py"))
                break
            if (base / "__init__.py").is_file():
                found.add(base / "__init__.py")
                break
    return found


@_each("lora_kernels")
def test_a_wing_imports_the_wings_below_it(path):
    wing = _wing(path)
    assert wing in MAY_IMPORT, f"{_name(path)}: which wing does it live in?"
    for other in _wings_imported(path):
        assert other in MAY_IMPORT[wing], f"{_name(path)} imports {other}: that runs upwards"


def test_imports_make_no_circle():
    edges = {path: _files_imported(path) - {path} for path in _sources("lora_kernels")}

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(map(_name, (*trail, path)))
        for other in edges[path]:
            visit(other, (*trail, path))

    for path in edges:
        visit(path, ())


@pytest.mark.parametrize("wing", [*WINGS, "training", "tools"])
def test_a_wing_says_its_rule_at_the_door(wing):
    door = ast.get_docstring(_tree(PACKAGE / wing / "__init__.py"))
    assert door and "Rule: " in door


@_each("lora_kernels")
def test_triton_is_imported_by_kernels_and_tools_alone(path):
    """Tools drive Triton's compiler, but only once they are called."""
    wing, tree = _wing(path), _tree(path)
    if wing == "kernels":
        return
    if wing in IMPORT_TRITON:
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            function.body = []
    assert "triton" not in {target[0] for target in _imports(tree, ())}


@_each("lora_kernels/algebra", "lora_kernels/hardware", "lora_kernels/layers")
def test_layers_and_all_below_know_no_model(path):
    text = path.read_text(encoding="utf-8")
    assert "model_type" not in text and "named_modules" not in text


@_each("lora_kernels/injection")
def test_injection_knows_no_file(path):
    roots = {target[0] for target in _imports(_tree(path), path.relative_to(ROOT).parent.parts)}
    assert not roots & {"json", "os", "pathlib", "safetensors", "tempfile"}


@_each("lora_kernels")
def test_the_library_imports_neither_models_nor_bench(path):
    roots = {target[0] for target in _imports(_tree(path), path.relative_to(ROOT).parent.parts)}
    assert not roots & {"models", "bench", "tests"}


@_each("models", "bench")
def test_models_and_bench_never_import_each_other(path):
    here = path.relative_to(ROOT).parts[0]
    roots = {target[0] for target in _imports(_tree(path), path.relative_to(ROOT).parent.parts)}
    assert not roots & ({"models", "bench", "tests"} - {here})


@_each("lora_kernels/kernels")
def test_kernels_are_deterministic(path):
    """No float atomics, and no tile chosen by timing inside a training step."""
    names = {node.attr for node in ast.walk(_tree(path)) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(_tree(path)) if isinstance(node, ast.Name)}
    assert not {name for name in names if name.startswith("atomic_")} | names & {"autotune"}


@_each(*OURS)
def test_pickles_are_read_with_weights_only(path):
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True", f"{_name(path)}:{node.lineno}"


@_each(*OURS)
def test_a_file_fits_one_idea(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: split it"


def _run(code: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_light_and_patches_nothing():
    _run("""
        import sys
        import torch
        before = {name: vars(owner)[name] for owner in (torch.nn.Linear, torch.nn.Module)
                  for name in ("forward", "__init__", "__call__") if name in vars(owner)}
        linear = torch.nn.functional.linear
        import lora_kernels
        heavy = {"transformers", "peft", "triton", "datasets"} & set(sys.modules)
        assert not heavy, heavy
        assert linear is torch.nn.functional.linear
        after = {name: vars(owner)[name] for owner in (torch.nn.Linear, torch.nn.Module)
                 for name in ("forward", "__init__", "__call__") if name in vars(owner)}
        assert before == after
    """)


def test_works_without_triton_and_without_gpu():
    out = _run("""
        import os, sys
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.pop("TRITON_INTERPRET", None)

        class Hiding:
            def __init__(self, finder):
                self.finder = finder

            def __getattr__(self, name):
                return getattr(self.finder, name)

            def find_spec(self, name, *rest):
                hidden = name.split(".")[0] in ("triton", "transformers", "peft")
                return None if hidden else self.finder.find_spec(name, *rest)

        sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
        import torch
        from lora_kernels import FusedLoRALinear, lora_linear
        x, weight = torch.randn(5, 7), torch.randn(4, 7)
        lora_A, lora_B = torch.randn(3, 7, requires_grad=True), torch.randn(4, 3)
        y = lora_linear(x, weight, lora_A, lora_B, scale=0.5)
        torch.testing.assert_close(y, x @ weight.T + 0.5 * (x @ lora_A.T) @ lora_B.T)
        y.sum().backward()
        assert lora_A.grad.abs().sum() > 0
        FusedLoRALinear(7, 4, rank=2)(x).sum().backward()
        assert not {"triton", "transformers", "peft"} & set(sys.modules)
        from lora_kernels import cli
        sys.exit(cli.main(["doctor"]))
    """)
    assert "Triton is not installed" in out
    assert "Usable." in out


def test_public_names():
    assert set(lora_kernels.__all__) == PUBLIC
    assert all(hasattr(lora_kernels, name) for name in PUBLIC)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, built without a network by the setuptools that is installed."""
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77 to build")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in (*OURS, "tests"):
        if (ROOT / folder).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")  # where other tests write now
            shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    build = "from setuptools import build_meta as backend; backend.build_wheel('.')"
    command = [sys.executable, "-c", build]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = tree.glob("*.whl")
    return built


def test_the_wheel_holds_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"lora_kernels"}
    shipped = {name for name in names if name.startswith("lora_kernels/")}
    expected = {_name(path) for path in [*_sources("lora_kernels"), *PACKAGE.rglob("*.json")]}
    assert shipped == expected | {"lora_kernels/py.typed"}


def test_the_wheel_declares_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        fields = archive.read(name).decode().splitlines()
    required = {
        re.split(r"[^A-Za-z0-9-]", field.removeprefix("Requires-Dist: "))[0]
        for field in fields
        if field.startswith("Requires-Dist: ") and "extra ==" not in field
    }
    assert required == {"torch", "triton", "safetensors"}


def test_constraints_pin_every_line_and_name_no_host():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9.-]+==[0-9.]+( ; .+)?", line), line
