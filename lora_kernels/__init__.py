"""LoRA in as few passes over memory as the shapes allow: fused linear layers.

    from lora_kernels import LoRAConfig, add_lora
    print(add_lora(model, LoRAConfig(rank=8, alpha=16, dropout=0.1, train=("classifier",))))

Importing this package patches nothing, imports no transformers, and works without Triton and
without a GPU.
"""

from . import former_names
from .adapters import load_adapter, load_adapters, save_adapter, save_adapters
from .autograd.functional import lora_linear
from .injection.callback import FusedLoRACallback
from .injection.explain import explain
from .injection.inject import add_lora, merge
from .injection.packs import adapter_rows, add_loras, drop_adapter
from .injection.peft import fuse_peft, unfuse_peft
from .injection.report import Report
from .injection.training import disable_adapter, lora_fa, lora_plus
from .layers.config import LoRAConfig
from .layers.linear import FusedLoRALinear
from .strategies.table import STRATEGIES
from .training.graphed_forward import GraphedForward
from .training.graphed_step import GraphedStep, graph_trainer

former_names.install()
__version__ = "0.1.0"
__all__ = [
    "STRATEGIES",
    "FusedLoRACallback",
    "FusedLoRALinear",
    "GraphedForward",
    "GraphedStep",
    "LoRAConfig",
    "Report",
    "adapter_rows",
    "add_lora",
    "add_loras",
    "disable_adapter",
    "drop_adapter",
    "explain",
    "fuse_peft",
    "graph_trainer",
    "load_adapter",
    "load_adapters",
    "lora_fa",
    "lora_linear",
    "lora_plus",
    "merge",
    "save_adapter",
    "save_adapters",
    "unfuse_peft",
]
