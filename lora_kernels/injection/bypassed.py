"""Layers that are bypassed: their block multiplies by the weight without calling the layer.

LoRA on such a layer (`dt_proj` of Mamba, `dense` of MobileBERT's head) gets no gradient and has no
effect, until a merge changes the output. Three witnesses, each where the one before is silent:

    the block's code     reads `self.layer.weight`, and uses `self.layer` in no other way
    a probe              where the code does both: a forward of the model's own dummy inputs, on
                         fake tensors, which compute nothing
    the first forward    with gradients, on the caller's inputs, whatever the block looks like;
                         a warning names what it finds
"""

from __future__ import annotations

import dis
import inspect
import warnings
from collections.abc import Iterable, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layers.embedding import FusedLoRAEmbedding
from ..layers.examples import fake_copy


def bypasses(model: nn.Module, path: str) -> str | None:
    """The reason why LoRA at `path` would be without effect, if the block's code shows it."""
    block, uses = _uses(model, path)
    alone = "weight" in uses and uses.isdisjoint({"", "forward", "__call__"})
    return _reason(block) if alone else None


def probed(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Path -> the reason, for the layers at `paths` that a probe shows to be bypassed.

    Only if a block's code reads a weight among them is there a probe.
    """
    doubtful = [path for path in paths if "weight" in _uses(model, path)[1]]
    found = _probe(model, doubtful) if doubtful else []
    return {path: _reason(_uses(model, path)[0]) for path in found}


def _reason(block: type) -> str:
    return f"{block.__name__} reads this weight without calling the layer"


def _uses(model: nn.Module, path: str) -> tuple[type, set[str]]:
    """The class of the block around a layer, and the layer's attributes that its forward reads.

    "" stands for any other use, such as a call. `weight.dtype` and the like are no use of weight.
    """
    owner, _, layer = path.rpartition(".")
    block, uses = type(model.get_submodule(owner)), set[str]()
    pending, seen = ["forward"], {"forward"}
    while pending:
        function = inspect.unwrap(getattr(block, pending.pop()))
        codes: list[Any] = [getattr(function, "__code__", None)]
        while codes:
            code = codes.pop()
            if not isinstance(code, CodeType):
                continue
            codes += code.co_consts
            methods = {name for name in code.co_names if _is_method(block, name)} - seen
            pending, seen = [*pending, *methods], seen | methods
            steps = dis.get_instructions(code)
            read = [_attribute(step) for step in steps if step.opname != "EXTENDED_ARG"]
            for first, second, third in zip(read, read[1:], read[2:], strict=False):
                if first == layer and not (second == "weight" and third in _METADATA):
                    uses.add(second)
    return block, uses


def _is_method(block: type, name: str) -> bool:
    return inspect.isfunction(getattr(block, name, None)) and not hasattr(nn.Module, name)


_METADATA = ("dtype", "device", "shape", "ndim", "requires_grad", "is_meta")


def _attribute(instruction: dis.Instruction) -> str:
    """The attribute that an instruction reads, or ""."""
    return instruction.argval if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") else ""


class _Witness(TorchFunctionMode):
    """Sees which of the layers are called, and whose weights are operands of anything."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.paths = {id(layer.weight): path for path, layer in layers.items()}
        self.read: set[str] = set()
        self.called: set[str] = set()
        self.handles = [
            layer.register_forward_pre_hook(lambda *_, path=path: self.called.add(path))
            for path, layer in layers.items()
        ]

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        # A shape or a dtype is no product; a graph that is traced must not depend on what was seen.
        if isinstance(result, Tensor) and not torch.compiler.is_compiling():
            for each in (*args, *(kwargs or {}).values()):
                for tensor in each if isinstance(each, (list, tuple)) else (each,):
                    if id(tensor) in self.paths:
                        self.read.add(self.paths[id(tensor)])
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self.handles:
            handle.remove()

    @property
    def bypassed(self) -> list[str]:
        return sorted(self.read - self.called)


def _probe(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The bypassed of the layers at `paths` in a forward of the model's dummy inputs.

    What runs is a copy of fake tensors, which take no memory: a forward may leave tensors of its
    own in a model. There is no finding where a model cannot be copied, or has no dummy inputs, or
    where torch has no fake tensors, which are private.
    """
    try:
        from torch._subclasses import FakeTensorMode
    except ImportError:
        return []  # the first forward will tell
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        try:
            copied: Any = fake_copy(model, fake, {})
            with _Witness({path: copied.get_submodule(path) for path in paths}) as witness:
                device = next(copied.parameters()).device
                inputs = {k: fake.from_tensor(v).to(device) for k, v in copied.dummy_inputs.items()}
                copied(**inputs)
        except Exception:  # noqa: BLE001 (whatever a model raises on made-up inputs)
            return []  # the first forward will tell
    return witness.bypassed


def watch(model: nn.Module) -> None:
    """Let the first forward with gradients warn of bypassed layers."""
    model.register_forward_pre_hook(_begin)


def unwatch(model: nn.Module) -> None:
    """Undo `watch`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _begin:
            del model._forward_pre_hooks[key]


def _begin(model: Any, _: Any) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if getattr(model, "_is_replica", False):  # of nn.DataParallel, which shares the model's hooks
        return
    unwatch(model)
    owners: dict[int, int] = {}
    for module in model.modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            return  # it would be compiled once more
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
        # An output layer may read a tied weight; an embedding that it is tied to should be called.
        if owners.get(id(getattr(module, "weight", None))) == 1
        or isinstance(module, FusedLoRAEmbedding)
    }
    witness = _Witness(layers)

    def end(*_: Any) -> None:
        witness.__exit__(None, None, None)
        handle.remove()
        if names := witness.bypassed:
            more = ", ..." if len(names) > 3 else ""
            warnings.warn(
                f"LoRA has no effect on {len(names)} layers ({', '.join(names[:3])}{more}): the "
                "model reads their weight without calling them, so LoRA gets no gradient, and a "
                "merge would change the output. Leave them out of the targets.",
                stacklevel=2,
            )

    handle = model.register_forward_hook(end, always_call=True)
    witness.__enter__()
