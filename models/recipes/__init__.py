"""The experiments: five reports that reproduced LoRA, the paper behind them, and two of our own.

A row says what runs, over which axes and seeds, what is reported, and what was published.
`recipe` says what the fields mean; the rows lie in `encoders` and `further`. Adding an experiment
adds a row there.
"""

from __future__ import annotations

import difflib

from . import encoders, further
from .recipe import SMALL, Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*encoders.ROWS, *further.ROWS)}


def recipe_of(name: str) -> Recipe:
    """The row called `name`; `-small` at its end asks for its small form.

    Raises ValueError with near misses if there is none.
    """
    full = name.removesuffix(SMALL)
    if full not in RECIPES:
        close = difflib.get_close_matches(full.lower().replace("_", "-"), RECIPES, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(RECIPES)}"
        raise ValueError(f"unknown recipe {name!r}; {hint}")
    return RECIPES[full].small_form() if name.endswith(SMALL) else RECIPES[full]
