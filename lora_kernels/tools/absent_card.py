"""A card that is not there: Triton compiles for it, and launches nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class AbsentCard:
    """A Triton driver: kernels compile, launching does nothing.

    `compiled` collects the source, Triton's metadata and the binary of each kernel.
    """

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        if arch.startswith("sm_"):
            self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        else:
            self.target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
        self.arch = arch
        self.utils = self  # where Triton asks for device properties and loads binaries
        self.compiled: list[tuple[Any, Any, bytes]] = []

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"absent {self.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}  # the report judges shared memory, not Triton

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self._pending = source, metadata
        return lambda *arguments: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: Any) -> tuple[Any, ...]:
        self.compiled.append((*self._pending, binary))
        return None, None, 0, 0, 1024


@contextmanager
def absent_card(arch: str, kind: type[AbsentCard] = AbsentCard) -> Iterator[AbsentCard]:
    """Context in which Triton compiles for `arch`; `kind` may be a subclass of AbsentCard."""
    from triton.runtime import driver

    before = driver._active
    card = kind(arch)
    driver.set_active(card)  # type: ignore[arg-type]
    try:
        yield card
    finally:
        driver._active = before
