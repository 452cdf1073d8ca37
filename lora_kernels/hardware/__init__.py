"""What a card is, what a strategy costs on it, and which tiles fit it: data and arithmetic.

Rule: this wing launches nothing and chooses nothing; it imports the algebra at most.
"""

from .tiles import Tile, Tiles

__all__ = ["Tile", "Tiles"]
