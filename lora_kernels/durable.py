"""Files that are whole or not there: written aside, synced to disk, and renamed.

What is written for `path` lies beside it as `.<name>.<host>-<process>-<thread>.new` until it gets
its name. The old lies there as `.old` for that long, if one rename cannot replace it. A killed
writer leaves both; the next writer of `path` on the same host removes them when it is done.

Permissions follow the umask. Without `fcntl` (Windows) nothing is synced or locked, and what killed
writers left stays.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, to write a file or directory to; rename it when the block ends.

    If the block raises or the process is killed, `path` stays as it was. One exception: replacing a
    directory takes two renames, and a process killed between them leaves the old one as `.old`.
    Raises FileExistsError for a file that would replace a directory, or a directory a file.

    >>> with replacing(Path("runs/result.json")) as aside:
    ...     aside.write_text("{}")
    """
    with replacing_all([path]) as (aside,):
        yield aside


@contextmanager
def replacing_all(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """As `replacing`, for several paths that belong together: all are replaced, or none.

    A process killed between two renames leaves the first path missing, which its readers report:
    never an old file beside a new one.
    """
    new = {path: _beside(path, "new") for path in paths}
    for path, aside in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
    try:
        yield list(new.values())
        for path, aside in new.items():
            if path.exists() and path.is_dir() != aside.is_dir():
                kind = "directory" if path.is_dir() else "file"
                raise FileExistsError(f"{path} is a {kind}, and only a {kind} may replace it")
            _sync(aside, *aside.rglob("*"))
        if len(new) > 1 or any(aside.is_dir() for aside in new.values()):
            _swap(new)
        else:
            for path, aside in new.items():
                os.replace(aside, path)
    finally:
        for aside in new.values():
            _remove(aside)
    _sync(*{path.parent for path in new})
    for path in new:
        _remove_leftovers(path)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Let one writer of `path` at a time into the block, among all threads and processes.

    The lock is on a file beside `path`, which is removed when the block ends. A killed process
    leaves the file, but not the lock. Raises BlockingIOError if another has it and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with _open_locked(lock, wait):
        try:
            yield
        finally:
            lock.unlink()


def _open_locked(lock: Path, wait: bool) -> TextIO:
    while True:
        file = lock.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        with suppress(FileNotFoundError):  # its last holder removed it: others lock a new file
            if os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                return file
        file.close()


def _swap(new: dict[Path, Path]) -> None:
    """Rename what is at each path to its `.old`, and `new[path]` to path; undo all if one fails."""
    moves = [(path, _beside(path, "old")) for path in new if path.exists()]
    for _, old in moves:
        _remove(old)
    moves += [(new[path], path) for path in reversed(new)]
    tried = []
    try:
        for source, target in moves:
            tried.append((source, target))
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(tried):
            if target.exists() and not source.exists():
                os.replace(target, source)
        raise


def _beside(path: Path, role: str) -> Path:
    writer = f"{platform.node()}-{os.getpid()}-{threading.get_native_id()}"
    return path.with_name(f".{path.name}.{writer}.{role}{path.suffix}")


def _remove_leftovers(path: Path) -> None:
    """Remove what this writer, and those of this host that are gone, left beside `path`."""
    start = f".{path.name}.{platform.node()}-"
    for entry in path.parent.glob(f"{glob.escape(start)}*"):
        process = entry.name.removeprefix(start).partition("-")[0]
        if entry == _beside(path, "old") or (process.isdecimal() and _is_gone(int(process))):
            _remove(entry)


def _is_gone(process: int) -> bool:
    try:
        if fcntl is not None:  # on Windows, os.kill would end the process
            os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it runs, as another user's
        pass
    return False


def _remove(path: Path) -> None:
    """Remove a file or a whole directory, if it is there and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(*paths: Path) -> None:
    """Wait until files, and the entries of directories, are on the disk."""
    for path in paths if fcntl is not None else ():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
