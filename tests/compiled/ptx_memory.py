"""Memory that refuses what a sanitizer would report (see ptx.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


class Fault(AssertionError):  # noqa: N818 (no error of ours)
    """What a kernel must not do."""


class Memory:
    """The tensors that a kernel may touch, at the addresses that they have."""

    def __init__(self) -> None:
        self.tensors: dict[int, torch.Tensor] = {}
        self._bytes: list[Array] = []
        self._bases = self._ends = np.zeros(0, np.uint64)

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """Let kernels touch the storage of `tensor`."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.tensors[storage.data_ptr()] = whole
            bases = sorted(self.tensors)
            self._bytes = [self.tensors[base].numpy() for base in bases]
            self._bases = np.array(bases, np.uint64)
            self._ends = self._bases + np.array([len(each) for each in self._bytes], np.uint64)
        return tensor

    def at(self, addresses: Array, width: int) -> list[tuple[Array, Array, Array]]:
        """(bytes of a tensor, lanes, [lanes, width] places in it) for all that is accessed."""
        if (addresses % np.uint64(width)).any():
            raise Fault(f"an access of {width} bytes is not aligned: {hex(int(addresses[0]))}")
        which = np.searchsorted(self._bases, addresses, "right") - 1
        if (which < 0).any() or (addresses + np.uint64(width) > self._ends[which]).any():
            raise Fault(f"an access of {width} bytes is in no tensor that the kernel was given")
        found = []
        for i in np.unique(which):
            lanes = np.nonzero(which == i)[0]
            first = (addresses[lanes] - self._bases[i]).astype(np.int64)
            found.append((self._bytes[i], lanes, first[:, None] + np.arange(width)))
        return found


class Shared:
    """The shared memory of one program, and who touched which byte since which barrier."""

    def __init__(self, size: int, warp_of: Array) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self.warp_of = warp_of
        self.epoch = 0  # barriers passed
        self.written, self.read = np.full(size, -1), np.full(size, -1)  # epochs
        self.writer, self.reader = np.zeros(size, int), np.zeros(size, int)  # warps; -1: several
        self.arriving = np.zeros(size, bool)
        self.in_use = np.zeros(size, int)  # how many products under way read a byte
        self.issued: list[tuple[Array, Array, Array]] = []  # copies of the group that is still open
        self.groups: list[list[tuple[Array, Array, Array]]] = []

    def _places(self, addresses: Array, width: int) -> Array:
        if (addresses % width).any():
            raise Fault(f"a shared access of {width} bytes is not aligned")
        places = addresses.astype(np.int64)[:, None] + np.arange(width)
        if places.size and places.max() >= len(self.bytes):
            raise Fault(f"shared memory ends before {places.max()}: {len(self.bytes)} bytes")
        if self.arriving[places].any():
            raise Fault("shared memory is touched while a copy to it is under way")
        return places

    def load(self, addresses: Array, width: int, lanes: Array) -> Array:
        places, warps = self._places(addresses, width), self.warp_of[lanes][:, None]
        if (self.written[places] < 0).any():
            raise Fault("shared memory is read that nothing has written")
        if ((self.written[places] == self.epoch) & (self.writer[places] != warps)).any():
            raise Fault("shared memory is read with no barrier after another warp's write")
        several = (self.read[places] == self.epoch) & (self.reader[places] != warps)
        self.read[places] = self.epoch
        self.reader[places] = warps
        self.reader[places[several | (self.reader[places] != warps)]] = -1
        return self.bytes[places]

    def peek(self, places: Array) -> Array:
        """Bytes that a product reads, which all warps wrote before the last barrier."""
        if places.max() >= len(self.bytes) or self.arriving[places].any():
            raise Fault("a product reads past shared memory, or where a copy is under way")
        if (self.written[places] < 0).any():
            raise Fault("a product reads shared memory that nothing has written")
        if (self.written[places] == self.epoch).any():
            raise Fault("a product reads shared memory with no barrier after its writing")
        return self.bytes[places]

    def _claim(self, places: Array, warps: Array, data: Array) -> None:
        if self.in_use[places].any():
            raise Fault("shared memory is written while a product under way reads it")
        if ((self.read[places] == self.epoch) & (self.reader[places] != warps)).any():
            raise Fault("shared memory is written with no barrier after another warp's read")
        raced = (self.written[places] == self.epoch) & (self.writer[places] != warps)
        if (raced & (self.bytes[places] != data)).any():
            raise Fault("two warps write different values with no barrier in between")

    def store(self, addresses: Array, data: Array, lanes: Array) -> None:
        places, warps = self._places(addresses, data.shape[1]), self.warp_of[lanes][:, None]
        self._claim(places, warps, data)
        self._put(places, data, warps)

    def _put(self, places: Array, data: Array, warps: Array) -> None:
        self.bytes[places], self.written[places], self.writer[places] = data, self.epoch, warps
        if (self.bytes[places] != data).any():
            raise Fault("two threads write different values to one byte of shared memory")

    def copy_later(self, addresses: Array, data: Array, lanes: Array) -> None:
        places, warps = self._places(addresses, data.shape[1]), self.warp_of[lanes][:, None]
        self._claim(places, warps, data)
        self.arriving[places] = True
        self.issued.append((places, data, warps))

    def commit(self) -> None:
        self.groups.append(self.issued)
        self.issued = []

    def wait(self, pending: int) -> None:
        """All but the newest `pending` groups of copies arrive."""
        while len(self.groups) > pending:
            for places, data, warps in self.groups.pop(0):
                self.arriving[places] = False
                self._put(places, data, warps)
