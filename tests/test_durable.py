"""Files are whole or as they were, whoever is killed in between; writers take turns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from lora_kernels import durable
from lora_kernels.durable import locked, replacing, replacing_all

# A process that replaces the files of argv[2:] and is killed before it makes rename number argv[1].
KILLED_AT_RENAME = """
    import os, sys
    from pathlib import Path
    from durable import replacing, replacing_all
    last, paths, rename = int(sys.argv[1]), [Path(path) for path in sys.argv[2:]], os.replace

    def replace(source, target):
        global last
        if not last:
            os.kill(os.getpid(), 9)
        last -= 1
        rename(source, target)

    os.replace = replace
    with replacing_all(paths) as asides:
        for aside in asides:
            if aside.name.startswith(".folder"):
                aside.mkdir()
                aside = aside / "content"
            aside.write_text("new")
    os.kill(os.getpid(), 9)
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
    """A Python process that imports `durable` alone, which needs nothing else of ours."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=Path(durable.__file__).parent, stdout=subprocess.PIPE)


def write(path: Path, text: str) -> None:
    """Make a file; or a directory of one file, if the name begins with `folder`."""
    if path.name.removeprefix(".").startswith("folder"):
        path.mkdir(exist_ok=True)
        path = path / "content"
    path.write_text(text)


def read(path: Path) -> str:
    return (path / "content" if path.is_dir() else path).read_text()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("name", ["file.txt", "folder"])
def test_a_file_or_directory_is_replaced_or_stays(name, tmp_path):
    path = tmp_path / "deep" / name
    for text in ("first", "second"):
        with replacing(path) as aside:
            write(aside, text)
        assert read(path) == text
    with pytest.raises(ZeroDivisionError), replacing(path) as aside:
        write(aside, "half")
        _ = 1 / 0
    assert read(path) == "second" and names(path.parent) == [name]


@pytest.mark.parametrize("name, other", [("file.txt", "folder"), ("folder", "file.txt")])
def test_a_file_does_not_replace_a_directory_nor_the_reverse(name, other, tmp_path):
    write(tmp_path / name, "old")
    with pytest.raises(FileExistsError, match=f"{name} is a "), replacing(tmp_path / name) as aside:
        write(aside.with_name(other), "new")
        aside.with_name(other).rename(aside)
    assert read(tmp_path / name) == "old" and names(tmp_path) == [name]


def test_the_suffix_stays_for_writers_that_go_by_it(tmp_path):
    with replacing(tmp_path / "plot.png") as aside:
        assert aside.parent == tmp_path and aside.suffix == ".png"
        aside.touch()


@pytest.mark.parametrize("umask, mode", [(0o027, 0o640), (0o002, 0o664)])
def test_permissions_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file") as aside:
            aside.write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_all_is_on_disk_before_it_has_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """Files are known by their inodes, which a rename leaves as they are."""
    done: list[int | str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (done.append(os.fstat(f).st_ino), sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    with replacing(tmp_path / "folder") as aside:
        write(aside, "new")
    here, content = tmp_path / "folder", tmp_path / "folder" / "content"
    assert set(done[:-2]) == {here.stat().st_ino, content.stat().st_ino}
    assert done[-2:] == ["rename", tmp_path.stat().st_ino]


@pytest.mark.parametrize("name", ["file.txt", "folder"])
@pytest.mark.parametrize("last", range(3))
def test_what_a_killed_writer_leaves_is_never_half_and_the_next_one_cleans_up(name, last, tmp_path):
    path = tmp_path / name
    write(path, "old")
    assert start(KILLED_AT_RENAME, last, path).wait() == -signal.SIGKILL
    if path.exists():
        assert read(path) == ("new" if last >= (1 if name == "file.txt" else 2) else "old")
    else:  # between the two renames of a directory
        (old,) = tmp_path.glob(f".{name}.*.old*")
        assert read(old) == "old"
    with replacing(path) as aside:
        write(aside, "newer")
    assert read(path) == "newer" and names(tmp_path) == [name]


@pytest.mark.parametrize("last", range(5))
def test_a_killed_writer_leaves_no_old_file_beside_a_new_one(last, tmp_path):
    paths = tmp_path / "first", tmp_path / "second"
    for path in paths:
        write(path, "old")
    assert start(KILLED_AT_RENAME, last, *paths).wait() == -signal.SIGKILL
    left = {path.name: read(path) for path in paths if path.exists()}
    assert left == (
        {"first": "old", "second": "old"}, {"second": "old"}, {}, {"second": "new"},
        {"first": "new", "second": "new"},
    )[last]  # fmt: skip
    with replacing_all(paths) as asides:
        for aside in asides:
            write(aside, "newer")
    assert names(tmp_path) == ["first", "second"]


@pytest.mark.parametrize("failing", range(5))
def test_where_a_rename_fails_all_is_as_it_was(failing, tmp_path, monkeypatch):
    """The first was there and the second not; the third is a directory."""
    paths = [tmp_path / "first", tmp_path / "second", tmp_path / "folder"]
    write(paths[0], "old")
    write(paths[2], "old")
    rename, calls = os.replace, []

    def fail_once(source, target):
        calls.append(target)
        if len(calls) == failing + 1:
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="disk full"), replacing_all(paths) as asides:
        for aside in asides:
            write(aside, "new")
    assert names(tmp_path) == ["first", "folder"]
    assert read(paths[0]) == read(paths[2]) == "old"


def test_what_a_living_writer_has_written_stays(tmp_path):
    path = tmp_path / "file"
    writer = start(
        """
        import sys, time
        from pathlib import Path
        from durable import replacing
        with replacing(Path(sys.argv[1])) as aside:
            aside.write_text("theirs")
            print(flush=True)
            time.sleep(600)
        """,
        path,
    )
    try:
        writer.stdout.readline()
        with replacing(path) as aside:
            aside.write_text("ours")
        (theirs,) = tmp_path.glob(".*")
        assert theirs.read_text() == "theirs" and path.read_text() == "ours"
    finally:
        writer.kill()
        writer.wait()
    with replacing(path) as aside:
        aside.write_text("ours")
    assert names(tmp_path) == ["file"]


def test_threads_that_write_at_the_same_time_do_not_share_a_file(tmp_path):
    path, both = tmp_path / "file", threading.Barrier(2, timeout=60)

    def write_slowly(text: str) -> None:
        with replacing(path) as aside:
            both.wait()
            aside.write_text(text)
            both.wait()
            assert aside.read_text() == text
            seen.append(text)

    seen: list[str] = []
    threads = [threading.Thread(target=write_slowly, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["one", "two"] and names(tmp_path) == ["file"]


HOLDS_THE_LOCK = """
    import sys, time
    from pathlib import Path
    from durable import locked
    with locked(Path(sys.argv[1])):
        print(flush=True)
        time.sleep(600)
"""


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path):
    path = tmp_path / "deep" / "table.json"
    holder = start(HOLDS_THE_LOCK, path)
    try:
        holder.stdout.readline()
        entered = threading.Event()

        def enter() -> None:
            with locked(path):
                entered.set()

        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        assert not entered.wait(0.5)
    finally:
        holder.kill()
        holder.wait()
    assert entered.wait(60)
    thread.join()
    assert not names(path.parent)


def test_threads_take_turns(tmp_path):
    """Each takes a new lock, or the one that another has just removed."""
    path, inside, seen = tmp_path / "table.json", [], []

    def enter() -> None:
        for _ in range(200):
            with locked(path):
                inside.append(1)
                seen.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 800 and not names(tmp_path)


def test_files_are_replaced_where_there_is_no_fcntl(tmp_path):
    code = """
        import sys
        sys.modules["fcntl"] = None
        from pathlib import Path
        from durable import locked, replacing
        path = Path(sys.argv[1])
        for text in ("first", "second"):
            with locked(path), replacing(path) as aside:
                aside.mkdir()
                (aside / "content").write_text(text)
    """
    assert start(code, tmp_path / "folder").wait() == 0
    assert read(tmp_path / "folder") == "second"
