"""A card that is not there: Triton compiles for it, and launches nothing.

`SPECIMENS` are the layers whose training steps are compiled on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Specimen(NamedTuple):
    """A layer whose training step is compiled; ragged sizes and every flag occur in some row.

    With `sliced`, `layers` of N / 3 columns each are adapted, as in GPT-2's c_attn.
    """

    M: int
    N: int
    K: int
    R: int
    dropout: float
    bias: bool
    conv1d: bool = False
    layers: int = 1
    sliced: bool = False


SPECIMENS = (
    Specimen(4096, 768, 768, 16, 0.1, bias=True),
    Specimen(4096, 3072, 768, 8, 0.0, bias=True, conv1d=True),
    Specimen(4096, 768, 3072, 64, 0.1, bias=False),
    Specimen(1000, 771, 773, 3, 0.1, bias=True),
    Specimen(4096, 768, 768, 8, 0.1, bias=True, layers=3),
    Specimen(4096, 768, 768, 8, 0.0, bias=True, layers=3),
    Specimen(4096, 2304, 768, 8, 0.1, bias=True, conv1d=True, layers=2, sliced=True),
)


class _Compiled(NamedTuple):
    source: Any
    metadata: Any
    specimen: Specimen
    binary: bytes


class AbsentCard:
    """A Triton driver for a card that is not there: kernels compile, launching does nothing."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        cuda = arch.startswith("sm_")
        self.target = (
            GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
            if cuda
            else GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
        )
        self.arch = arch
        self.utils = self  # the object that knows device properties and loads binaries
        self.compiled: list[_Compiled] = []
        self.specimen = SPECIMENS[0]  # what is being compiled

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"absent {self.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}  # too much is for the report to say

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self._pending = source, metadata
        return lambda *arguments: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: Any) -> tuple[Any, ...]:
        self.compiled.append(_Compiled(*self._pending, self.specimen, binary))
        return None, None, 0, 0, 1024


@contextmanager
def absent_card(arch: str, kind: type[AbsentCard] | None = None) -> Iterator[AbsentCard]:
    """Triton believes, inside, that the card is `arch`: an AbsentCard, or a subclass of it."""
    from triton.runtime import driver

    before = driver._active
    card = (kind or AbsentCard)(arch)
    driver.set_active(card)  # type: ignore[arg-type]
    try:
        yield card
    finally:
        driver._active = before
