"""Launching a kernel again: what the shapes decide is worked out once, pointers alone each time.

Triton looks at every argument of every launch to find the code compiled for it, and our launchers
derive a grid and some twenty numbers from shapes. A training step repeats the same few launches, so
both are remembered by a signature: everything that a plan reads of its tensors (shape, strides,
dtype, device) or that Triton compiles code for (dtype, and whether an address divides by 16). A
launch of a known signature allocates, and hands the pointers to the compiled kernel's own launcher.
What Triton reads of its knobs at each dispatch, its debug mode say, is thus read at the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

INTERPRETED = knobs.runtime.interpret
# Releases whose launcher takes the arguments that `_again` hands it; on others Triton does it all.
KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
_HIP = torch.version.hip is not None
_LIMIT = 4096  # signatures; a run whose shapes never repeat starts over rather than grow


def has_asynchronous_products() -> bool:
    """Whether Triton multiplies by wgmma or tcgen05 (sm_90, sm_100) on the card in use."""
    if INTERPRETED:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) // 10 in (9, 10)


Given = Tensor | tuple[Tensor, ...] | None


class Out(NamedTuple):
    """A contiguous tensor that a launch allocates and its kernel writes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def stride(self) -> tuple[int, ...]:
        """As of a tensor."""
        return tuple(math.prod(self.shape[i:]) for i in range(1, len(self.shape) + 1))


Outs = tuple[Out | tuple[Out, ...] | None, ...]


class Plan(NamedTuple):
    """A launch but for its pointers, which are those of the tensors given, then those of `outs`."""

    kernel: Any
    grid: tuple[int, int, int]
    outs: Outs
    scalars: tuple[Any, ...]  # the kernel's arguments between the pointers and the constexprs
    constants: dict[str, Any]  # constexprs, num_warps, num_stages
    then: Plan | None = None  # a launch that is given one tuple: the outs of this one


def planned(
    kernel: Any, grid: tuple[int, int, int], outs: Outs, *scalars: Any, then: Plan | None = None,
    **constants: Any,
) -> Plan:  # fmt: skip
    """A plan, written as the launch that it stands for."""
    return Plan(kernel, grid, outs, scalars, constants, then)


class _Step(NamedTuple):
    """A plan with the kernel that Triton compiled for it."""

    compiled: Any
    run: Any
    function: Any
    metadata: Any
    grid: tuple[int, int, int]
    outs: tuple[Any, ...]
    scalars: tuple[Any, ...]  # and the constexprs


_STEPS: dict[tuple[Any, ...], tuple[Any, list[_Step]]] = {}  # signature -> (device, steps)


def launch(plan: Callable[..., Plan], tensors: tuple[Given, ...], *settings: Any) -> list[Any]:
    """Run plan(*tensors, *settings); returns the outs (of its last launch).

    The tensors are the kernel's first arguments, in its order, all on one device. The plan must be
    a function of their shapes, strides and dtypes and of the (hashable) settings.
    """
    if INTERPRETED:
        return _first(plan, tensors, settings, None)
    signature: list[Any] = [plan, settings]
    pointers: list[Any] = []
    t: Tensor
    for given in tensors:
        if given is None:
            signature.append(None)
            pointers.append(None)
        elif isinstance(given, tuple):
            addresses = []
            for t in given:
                address = t.data_ptr()
                addresses.append(address)
                signature.append((t.shape, t.stride(), t.dtype, address % 16))
            signature.append(None)
            pointers.append(tuple(addresses))
        else:
            t = given
            address = t.data_ptr()
            pointers.append(address)
            signature.append((t.shape, t.stride(), t.dtype, address % 16))
    signature.append(t.get_device())
    if _HIP:  # there Triton compiles other code for a tensor of a storage past 2 GiB
        signature += [each.untyped_storage().nbytes() >> 31 for each in _flat(tensors)]
    key = tuple(signature)
    found = _STEPS.get(key)
    if found is None:
        return _first(plan, tensors, settings, key)
    device, steps = found
    active = driver.active
    if active.get_current_device() == device:
        return _again(steps, pointers, t.device, active.get_current_stream(device))
    with torch.cuda.device(device):
        return _again(steps, pointers, t.device, active.get_current_stream(device))


def _again(steps: list[_Step], pointers: list[Any], device: torch.device, stream: int) -> list[Any]:
    runtime, empty = knobs.runtime, torch.empty
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # A hook is None, a function, or a chain of them that is empty unless a profiler listens.
    hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    outs: list[Any] = []
    for compiled, run, function, metadata, grid, specs, scalars in steps:
        read, outs = outs, []  # what this launch reads must live until it is under way
        if read:
            pointers = [tuple([each.data_ptr() for each in read if each is not None])]
        for spec in specs:
            if spec is None:
                outs.append(None)
                pointers.append(None)
            elif type(spec) is Out:
                out = empty(*spec.shape, dtype=spec.dtype, device=device)
                outs.append(out)
                pointers.append(out.data_ptr())
            else:
                group = tuple([empty(*shape, dtype=dtype, device=device) for shape, dtype in spec])
                outs.append(group)
                pointers.append(tuple([out.data_ptr() for out in group]))
        if hooked:
            compiled[grid](*pointers, *scalars)
        else:
            run(*grid, stream, function, metadata, None, None, None, *pointers, *scalars)
    return outs


def _first(
    plan: Callable[..., Plan], tensors: tuple[Given, ...], settings: tuple[Any, ...],
    key: tuple[Any, ...] | None,
) -> list[Any]:  # fmt: skip
    """Let Triton find the kernels or compile them, and remember them under the key."""
    anchor = next(_flat(tensors))
    steps = []
    following: Plan | None = plan(*tensors, *settings)
    with torch.cuda.device(anchor.get_device()):  # Triton launches on torch's current device
        while following is not None:
            kernel, grid, specs, scalars, constants, following = following
            outs = [_allocate(spec, anchor.device) for spec in specs]
            compiled = kernel[grid](*tensors, *outs, *scalars, **constants)
            # The interpreter compiles nothing, and a card that is not there has no function.
            if KNOWN and getattr(compiled, "function", None) is not None:
                names = kernel.arg_names[len(tensors) + len(outs) + len(scalars) :]
                scalars += tuple(constants[name] for name in names)
                steps.append(
                    _Step(
                        compiled, compiled.run, compiled.function, compiled.packed_metadata,
                        grid, specs, scalars,
                    )
                )  # fmt: skip
            else:
                key = None
            tensors = (tuple(out for out in outs if out is not None),)
        if key is not None:
            if len(_STEPS) >= _LIMIT:
                _STEPS.clear()
            _STEPS[key] = driver.active.get_current_device(), steps
    return outs


def _allocate(spec: Any, device: torch.device) -> Any:
    if spec is None:
        return None
    if type(spec) is Out:
        return torch.empty(*spec.shape, dtype=spec.dtype, device=device)
    return tuple(_allocate(each, device) for each in spec)


def _flat(tensors: tuple[Given, ...]) -> Iterator[Tensor]:
    for given in tensors:
        if isinstance(given, Tensor):
            yield given
        elif given is not None:
            yield from given
