"""The methods of fine-tuning, a row each: names, defaults, and the flags that each one reads.

The rows are data alone, so that `--help` imports no torch. What a method does to a model is the
function of its name in `attach.WAYS`.
"""

from __future__ import annotations

from dataclasses import dataclass

_MODULES = ("train_head", "train")
_LORA = ("rank", "alpha", "dropout", "rslora", "targets", *_MODULES)
_ADAPTIVE = ("start_rank", "adapt_from", "adapt_until", "adapt_every")
# The flags that mean nothing to some method. A run that sets one which its method ignores is
# refused.
_CHOSEN = (*_LORA, "strategy", *_ADAPTIVE, "reduction")


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    `learning_rate` is the default peak. `reads` names the flags that the method follows, of those
    that not every method does. `saved` is the folder of the run directory with what was trained:
    an `adapter`, or a whole `model`.
    """

    name: str
    summary: str
    learning_rate: float
    reads: tuple[str, ...] = ()
    saved: str = "model"

    @property
    def unread(self) -> tuple[str, ...]:
        """The flags that mean nothing to this method."""
        return tuple(flag for flag in _CHOSEN if flag not in self.reads)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "fused LoRA layers", 1e-3, (*_LORA, "strategy"), "adapter"),
        Method("peft", "PEFT's eager layers", 1e-3, _LORA, "adapter"),
        Method("full", "every parameter", 5e-5),
        Method("lora_adaptive", "fused LoRA whose ranks move to where they matter", 1e-3,
               (*_LORA, "strategy", *_ADAPTIVE), "adapter"),
        Method("adapter", "Houlsby's adapters, two in each block", 1e-3,
               ("reduction", *_MODULES), "adapter"),
        Method("bitfit", "the biases", 1e-3, _MODULES),
        Method("last_block", "the last block and the norm after it", 5e-5, _MODULES),
        Method("last_layer", "the task head alone", 1e-3, ("train",)),
    )
}  # fmt: skip
