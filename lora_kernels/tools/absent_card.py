"""A card that is not there: Triton compiles for it, and launches nothing.

`SPECIMENS` are the problems whose training steps are compiled for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Specimen(NamedTuple):
    """A problem whose training step is compiled: `segments` layers [N, K] that read one x.

    With `columns` the segments are ranges of one weight, N / 3 columns each, as in GPT-2's c_attn.
    Adapters are float32, as in mixed precision; with `pure`, in the dtype of x.
    """

    M: int
    N: int
    K: int
    R: int
    dropout: float
    bias: bool
    conv1d: bool = False
    segments: int = 1
    columns: bool = False
    pure: bool = False


# Ragged sizes, ranks up to 64 and every flag occur in some row.
SPECIMENS = (
    Specimen(4096, 768, 768, 16, 0.1, bias=True),
    Specimen(4096, 3072, 768, 8, 0.0, bias=True, conv1d=True, pure=True),
    Specimen(4096, 768, 3072, 64, 0.1, bias=False),
    Specimen(1000, 771, 773, 3, 0.1, bias=True),
    Specimen(4096, 768, 768, 8, 0.1, bias=True, segments=3),
    Specimen(4096, 768, 768, 8, 0.0, bias=True, segments=3),
    Specimen(4096, 2304, 768, 8, 0.1, bias=True, conv1d=True, segments=2, columns=True),
)


class _Compiled(NamedTuple):
    source: Any
    metadata: Any
    specimen: Specimen
    binary: bytes


class AbsentCard:
    """A Triton driver for a card that is not there: kernels compile, launching does nothing.

    `compiled` collects what was compiled; `specimen` is what is being compiled now.
    """

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        cuda = arch.startswith("sm_")
        self.target = (
            GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
            if cuda
            else GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
        )
        self.arch = arch
        self.utils = self  # where Triton asks for device properties and loads binaries
        self.compiled: list[_Compiled] = []
        self.specimen = SPECIMENS[0]

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
        self.compiled.append(_Compiled(*self._pending, self.specimen, binary))
        return None, None, 0, 0, 1024


@contextmanager
def absent_card(arch: str, kind: type[AbsentCard] | None = None) -> Iterator[AbsentCard]:
    """Context in which Triton compiles for `arch`; `kind` is AbsentCard or a subclass of it."""
    from triton.runtime import driver

    before = driver._active
    card = (kind or AbsentCard)(arch)
    driver.set_active(card)  # type: ignore[arg-type]
    try:
        yield card
    finally:
        driver._active = before
