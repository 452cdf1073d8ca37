"""The files of an adapter: PEFT's directory format, read and written, and loralib's, read.

Rule: a file is read without running code, checked as a whole, and then taken over; what is written
is on disk before it has its name.
"""

from .load_save import load_adapter, save_adapter
from .packs import load_adapters, save_adapters

__all__ = ["load_adapter", "load_adapters", "save_adapter", "save_adapters"]
