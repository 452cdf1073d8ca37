"""How a layer is computed: a table of strategies, and the choice among them.

Rule: a strategy is a pure function of tensors and settings, and a row of `table`; nothing here
knows of autograd or of modules, and Triton is imported at the first launch, not before.
"""

from .problem import Problem
from .table import STRATEGIES, Strategy

__all__ = ["STRATEGIES", "Problem", "Strategy"]
