"""The launch cache: a launch that was made before goes straight to the compiled kernel.

At every launch Triton inspects every argument to find the code that it compiled for them, and our
launchers derive a grid and some twenty numbers from shapes. A training step repeats the same few
launches, so both results are kept. On the host a launch costs 6 us instead of 34 (docs/kernels.md).

    key     the plan function, its settings, the device, and of each tensor the shape, the strides,
            the dtype and the address modulo 16: all that a plan reads of its tensors, and all that
            Triton compiles different code for
    value   for each kernel of the plan, the compiled code and all arguments but the pointers
    hit     allocate the outputs, and call the kernel's compiled launcher with the new pointers
    miss    let Triton's own dispatch compile the kernel, or find it, and launch it; keep the result

Triton's knobs, such as its debug mode, are read at a miss alone.

LORA_KERNELS_LAUNCH=triton turns the cache off: then every launch is Triton's own dispatch. The
variable is read when this module is imported, which is at the first launch. Where a cached launch
raises and Triton's dispatch of the same launch does not, the cache turns itself off and warns.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .plan import Given, Out, Plan

INTERPRETED = knobs.runtime.interpret
# Releases whose compiled launcher takes the arguments that `_relaunch` hands it.
KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
_HIP = torch.version.hip is not None
_LIMIT = 4096  # keys; past it the oldest eighth is dropped
VARIABLE = "LORA_KERNELS_LAUNCH"


def wants_cache(value: str | None) -> bool:
    """Whether this value of LORA_KERNELS_LAUNCH leaves the cache on.

    Raises ValueError for a value other than "triton" or none.
    """
    if value not in (None, "", "triton"):
        raise ValueError(
            f"{VARIABLE}={value} is unknown: set it to triton, for Triton's own dispatch at every "
            "launch, or unset it, for the launch cache"
        )
    return value != "triton"


# Read at every launch. The interpreter compiles nothing that could be kept.
CACHED = wants_cache(os.environ.get(VARIABLE)) and not INTERPRETED


def has_asynchronous_products() -> bool:
    """Whether Triton multiplies by wgmma or tcgen05 (sm_90, sm_100) on torch's current device."""
    if INTERPRETED:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) // 10 in (9, 10)


class _Step(NamedTuple):
    """A launch of a plan whose kernel is compiled: all of it but the pointers."""

    run: Callable[..., None]  # Triton's compiled launcher
    function: int  # the driver's handle of the kernel
    metadata: Any  # warps, clusters, shared memory, as the launcher takes them
    grid: tuple[int, int, int]
    outs: tuple[Any, ...]
    scalars: tuple[Any, ...]  # and the constexprs, which the launcher expects after them


# key -> the device to launch on, and a step for each launch of the plan
_STEPS: dict[tuple[Any, ...], tuple[Any, list[_Step]]] = {}


def launch(plan: Callable[..., Plan], tensors: tuple[Given, ...], *settings: Any) -> list[Any]:
    """Run plan(*tensors, *settings); returns the outs (of its last launch).

    The tensors are the kernel's first arguments, in its order, all on one device. The plan must be
    a function of their shapes, strides and dtypes and of the (hashable) settings.
    """
    if not CACHED:
        return _dispatch(plan, tensors, settings, None)
    key, pointers, t = _signature(plan, tensors, settings)
    found = _STEPS.get(key)
    if found is None:
        return _dispatch(plan, tensors, settings, key)
    # A profiler hears of launches through these hooks, and the dispatch tells it more than we know.
    # Each is None, a function, or a chain of functions that is empty while nobody listens.
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return _dispatch(plan, tensors, settings, None)
    device, steps = found
    active = driver.active
    try:
        if active.get_current_device() == device:
            return _relaunch(steps, pointers, t.device, active.get_current_stream(device))
        with torch.cuda.device(device):
            return _relaunch(steps, pointers, t.device, active.get_current_stream(device))
    except torch.OutOfMemoryError:  # not the cache's fault: the dispatch allocates the same outputs
        raise
    except Exception as error:
        return _without_cache(error, plan, tensors, settings)


def _signature(
    plan: Callable[..., Plan], tensors: tuple[Given, ...], settings: tuple[Any, ...]
) -> tuple[tuple[Any, ...], list[Any], Tensor]:
    """The key of a launch, the pointers of its tensors, and the last tensor.

    Lone tensors and those of a tuple are written out apart: one loop for both, or a function that
    is called for each, takes the host 0.1 to 0.5 us a launch more.
    """
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
            signature.append(None)  # the end of the tuple
            pointers.append(tuple(addresses))
        else:
            t = given
            address = t.data_ptr()
            pointers.append(address)
            signature.append((t.shape, t.stride(), t.dtype, address % 16))
    signature.append(t.get_device())
    if _HIP:  # there Triton compiles other code for a tensor whose storage is past 2 GiB
        signature += [each.untyped_storage().nbytes() >> 31 for each in _flat(tensors)]
    return tuple(signature), pointers, t


def _relaunch(
    steps: list[_Step], pointers: list[Any], device: torch.device, stream: int
) -> list[Any]:
    """A hit: new outputs, and each compiled kernel on the pointers of this call.

    `pointers` are those of the tensors given; those of the outs are appended. Both are addresses,
    so each tensor must be held here until the kernel that reads or writes it is launched.
    """
    empty = torch.empty
    outs: list[Any] = []
    for run, function, metadata, grid, specs, scalars in steps:
        read, outs = outs, []  # `read` holds the outs of the launch before until this one is made
        if read:
            pointers = [tuple([each.data_ptr() for each in read if each is not None])]
        for spec in specs:
            if spec is None:
                outs.append(None)
                pointers.append(None)
            elif type(spec) is Out:
                shape, dtype = spec
                out = empty(*shape, dtype=dtype, device=device)
                outs.append(out)
                pointers.append(out.data_ptr())
            else:
                group = tuple([empty(*shape, dtype=dtype, device=device) for shape, dtype in spec])
                outs.append(group)
                pointers.append(tuple([out.data_ptr() for out in group]))
        # The three None are Triton's launch metadata and its two hooks, for profilers alone.
        run(*grid, stream, function, metadata, None, None, None, *pointers, *scalars)
    return outs


def _dispatch(
    plan: Callable[..., Plan], tensors: tuple[Given, ...], settings: tuple[Any, ...],
    key: tuple[Any, ...] | None,
) -> list[Any]:  # fmt: skip
    """Launch by Triton's own dispatch; what it found or compiled is kept if a key is given."""
    anchor = next(_flat(tensors))
    steps = []
    # Triton launches on torch's current device, and a plan may ask what card that is.
    with torch.cuda.device(anchor.get_device()), _nothing_compiled_in_a_capture():
        following: Plan | None = plan(*tensors, *settings)
        while following is not None:
            kernel, grid, specs, scalars, constants, following = following
            outs = [_allocate(spec, anchor.device) for spec in specs]
            compiled = kernel[grid](*tensors, *outs, *scalars, **constants)
            # A card that is not there has no function, and the interpreter no compiled kernel.
            if KNOWN and getattr(compiled, "function", None) is not None:
                # The constexprs are the kernel's last arguments: here in the order that it declares
                # them in, and without num_warps and num_stages, which are no arguments.
                names = kernel.arg_names[len(tensors) + len(outs) + len(scalars) :]
                scalars += tuple(constants[name] for name in names)
                function, metadata = compiled.function, compiled.packed_metadata
                steps.append(_Step(compiled.run, function, metadata, grid, specs, scalars))
            else:
                key = None
            tensors = (tuple(out for out in outs if out is not None),)
        if key is not None:
            _remember(key, steps)
    return outs


@contextmanager
def _nothing_compiled_in_a_capture() -> Iterator[None]:
    """Within it, a kernel that is not compiled yet is refused while a CUDA graph is captured.

    To load its code is an operation that a capture forbids: the graph would be lost with an error
    of the driver's, or without one.
    """
    initialized = torch.cuda.is_initialized()
    if INTERPRETED or not initialized or not torch.cuda.is_current_stream_capturing():
        yield
        return

    def refuse(**about: Any) -> bool:
        raise RuntimeError(
            f"{about['fn'].name} is launched for the first time while a CUDA graph is captured, "
            "where no kernel can be compiled: run the same step once before the capture"
        )

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = refuse
        yield


def _remember(key: tuple[Any, ...], steps: list[_Step]) -> None:
    """Keep the steps under the key; where the cache is full, its oldest entries go.

    Batches padded to their longest row keep bringing new shapes. An eighth at a time is dropped, so
    that most launches stay known and dropping is rare.
    """
    if len(_STEPS) >= _LIMIT:
        for oldest in list(_STEPS)[: _LIMIT // 8]:
            _STEPS.pop(oldest, None)  # None: another thread may have dropped it meanwhile
    _STEPS[key] = driver.active.get_current_device(), steps


def _without_cache(
    error: Exception, plan: Callable[..., Plan], tensors: tuple[Given, ...],
    settings: tuple[Any, ...],
) -> list[Any]:  # fmt: skip
    """What follows a hit that raised: Triton's own dispatch, for this launch and all later ones.

    If the dispatch raises too, its error is the launch's own and is passed on; the cache stays on.
    To launch again is safe: outputs are allocated anew, and a kernel that adds to a tensor it was
    given has not run, since the compiled launcher raises before its kernel starts.
    """
    global CACHED
    outs = _dispatch(plan, tensors, settings, None)
    CACHED = False
    warnings.warn(
        f"a cached kernel launch raised {type(error).__name__}: {error}. Triton's own dispatch "
        "made this launch instead and will make all later ones: results are the same, a launch "
        f"takes the host longer. {VARIABLE}=triton turns the launch cache off from the start",
        RuntimeWarning,
        stacklevel=3,
    )
    return outs


def _allocate(spec: Any, device: torch.device) -> Any:
    """The tensors of one entry of `Plan.outs`."""
    if spec is None:
        return None
    if type(spec) is Out:
        return torch.empty(*spec.shape, dtype=spec.dtype, device=device)
    return tuple(_allocate(each, device) for each in spec)


def _flat(tensors: tuple[Given, ...]) -> Iterator[Tensor]:
    """Every tensor, those of tuples too."""
    for given in tensors:
        if isinstance(given, Tensor):
            yield given
        elif given is not None:
            yield from given
