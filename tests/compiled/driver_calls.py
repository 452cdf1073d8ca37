"""What reaches the CUDA driver: a remembered launch gives it the bits that Triton's own gives.

Run by test_launch.py with a libcuda that runs nothing (libcuda.c) in the place of the driver's. All
else is real: the kernels are compiled, and Triton's launcher in C fills the parameters, which are
read here as the compiled kernel declares them. `launches.py` compares what Python sees of launches.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import struct
from typing import Any, NamedTuple

import pytest
import torch
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from lora_kernels.hardware.tiles import Tile
from lora_kernels.kernels import launch
from tests.compiled.launches import BASE, Step, run_step, tensors

STREAM = 77


class Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads_x", "threads_y", "threads_z")),
        ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p), ("attribute_count", ctypes.c_uint),
    ]  # fmt: skip


class Asked(NamedTuple):
    """A launch, as the driver is asked for it."""

    function: int
    config: tuple[int, ...]
    parameters: tuple[bytes, ...]


def parameter_sizes(cubin: int) -> list[int]:
    """Bytes of each parameter of the only kernel in an ELF image at this address.

    A section `.nv.info.<kernel>` holds attributes (format, kind, size); kind 0x17 is a parameter's
    place (bytes 6 and 7) and its size (in the upper 14 bits of the last word).
    """
    (headers,) = struct.unpack("<Q", ctypes.string_at(cubin + 0x28, 8))
    size, count, names = struct.unpack("<HHH", ctypes.string_at(cubin + 0x3A, 6))
    image = ctypes.string_at(cubin, headers + size * count)
    sections = [struct.unpack_from("<IIQQQQ", image, headers + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, at, length in sections:
        if not image.startswith(b".nv.info.", sections[names][4] + name):
            continue
        end = at + length
        while at < end:
            form, kind, extent = struct.unpack_from("<BBH", image, at)
            if kind == 0x17:
                _, place, _, packed = struct.unpack_from("<IHHI", image, at + 4)
                found[place] = packed >> 18
            at += 4 + (extent if form == 4 else 0)
    return [found[place] for place in range(len(found))]


class Libcuda:
    """The stand-in's other end."""

    def __init__(self) -> None:
        self.sizes: dict[int, list[int]] = {}
        self.asked: list[Asked] = []
        address = ctypes.c_void_p
        self.callbacks = (
            ctypes.CFUNCTYPE(None, address, address)(self.loaded),
            ctypes.CFUNCTYPE(None, ctypes.POINTER(Config), address, ctypes.POINTER(address))(
                self.launched
            ),
        )
        ctypes.CDLL("libcuda.so.1").tell(*self.callbacks)

    def loaded(self, image: int, function: int) -> None:
        self.sizes[function] = parameter_sizes(image)

    def launched(self, config: Any, function: int, parameters: Any) -> None:
        values = (
            ctypes.string_at(parameters[i], size) for i, size in enumerate(self.sizes[function])
        )
        config = tuple(
            getattr(config[0], name) for name, _ in Config._fields_ if name != "attributes"
        )
        self.asked.append(Asked(function, config, tuple(values)))


@pytest.fixture(scope="module")
def libcuda():
    """Triton's own driver of an sm_86 whose memory is the host's, where torch sees no device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: -1)  # what a host tensor says
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        stream = lambda device: STREAM  # noqa: E731
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", stream, raising=False)
        active = CudaDriver()
        active.get_current_stream = stream
        patch.setattr(driver, "_active", active)
        yield Libcuda()


def asked(step: Step, made: Any, libcuda: Libcuda, memory: list[torch.Tensor]) -> list[Asked]:
    """The step's launches; the tensors that it allocates are, in order, those of `memory`."""
    libcuda.asked.clear()
    count = itertools.count()

    def empty(*shape: int, **options: Any) -> torch.Tensor:
        place = next(count)
        if place == len(memory):
            memory.append(torch.zeros(*shape, **options))
        assert (*memory[place].shape,) == shape and memory[place].dtype is options["dtype"]
        return memory[place]

    run_step(step, made, empty)
    return list(libcuda.asked)


LARGE = BASE._replace(M=130, N=64, K=96, tile=Tile(32, 32, 32, 4, 2))
STEPS = {
    "group-dropout": LARGE._replace(G=3, dropout=0.1),
    "conv1d-ragged": LARGE._replace(M=17, N=33, K=47, R=3, conv1d=True, bias=False, scale=1),
    "offset-one-row": LARGE._replace(M=1, offset=frozenset(["x", "lora_B"]), padding=1),
    "fused-group": LARGE._replace(strategy="fused", G=2, dtype=torch.bfloat16),
    "fused-dropout": LARGE._replace(strategy="fused", dropout=0.1, adapters=torch.bfloat16),
    "hybrid": LARGE._replace(strategy="hybrid", dtype=torch.float32, bias_dtype=torch.float32),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_driver_is_asked_the_same(step, libcuda, monkeypatch):
    monkeypatch.setattr(launch, "_STEPS", {})
    made, memory = tensors(step), []
    dispatched = asked(step, made, libcuda, memory)
    assert launch._STEPS, "nothing was remembered"

    def refuse(*_: Any) -> None:
        raise AssertionError("a known signature went through Triton's dispatch")

    monkeypatch.setattr(launch, "_dispatch", refuse)
    assert asked(step, made, libcuda, memory) == dispatched
    assert len(dispatched) >= 4
    pointers = {value for each in dispatched for value in each.parameters if len(value) == 8}
    x, layers, dy, _ = made
    for tensor in (x, *layers.weight, *layers.lora_A, *layers.lora_B, *dy, *memory):
        assert struct.pack("<Q", tensor.data_ptr()) in pointers
    for each in dispatched:
        assert each.config[7] == STREAM and each.config[3] >= 32
