"""A sweep: cells run, fail and die apart from one another, and the same command goes on."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="the models read their data by it")
from lora_kernels.durable import locked
from models import recipes, sweep
from models.arguments import Arguments
from models.recipes.recipe import Recipe
from models.record.run_directory import CHECKPOINTS, RESULT
from models.reporting.frame import frame_of
from models.sweeping import estimate
from models.sweeping.cells import ERROR, STOPPED, State, arguments_of, run_cell, state_of
from tests.support.tiny_run import read_csv

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def recipe(bert, data, tmp_path, monkeypatch) -> Recipe:
    """A recipe of two ranks and a label that cannot work; its data lie in `tmp_path / data`."""
    row = Recipe(
        "toy",
        0,
        "A toy",
        {"model": bert, "task": "sst2", "epochs": 1, "batch_size": 8, "max_length": 48},
        {"method": {"r=2": {"rank": 2}, "wrong": {"targets": ["quary"]}, "r=4": {"rank": 4}}},
        seeds=1,
    )
    monkeypatch.setitem(recipes.RECIPES, "toy", row)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sst2").symlink_to(data)
    return row


@pytest.fixture
def run(recipe, tmp_path, capfd):
    """Runs the sweep of the toy; returns the exit status and what it printed."""

    def start(*words: str) -> tuple[int, str]:
        places = ["--runs", str(tmp_path / "runs"), "--data-dir", str(tmp_path / "data")]
        status = sweep.main(["toy", *places, *words])
        printed = capfd.readouterr()
        return status, printed.out + printed.err

    return start


def one_by_one(work) -> list[sweep.Unit]:
    return [sweep.Unit({cell: arguments}) for cell, arguments in work.items()]


def test_a_failed_cell_is_shown_and_stops_nothing(run, tmp_path):
    status, printed = run()
    assert status == 1
    lines = printed.splitlines()
    assert lines[0].startswith("[1/3] toy/r=2/seed-0: done in ") and "; 2 left, about" in lines[0]
    assert "[2/3] toy/wrong/seed-0: failed" in printed and "quary" in printed
    assert "[3/3] toy/r=4/seed-0: done" in printed and "2 done, 1 failed" in printed
    wrong = tmp_path / "runs/toy/wrong/seed-0"
    assert "Traceback" in json.loads((wrong / ERROR).read_text())["traceback"]
    log = next(line.strip() for line in lines if line.endswith("log.txt"))
    assert "quary" in Path(log).read_text(), "the log that is named does not say what happened"

    done = tmp_path / "runs/toy/r=2/seed-0" / RESULT
    before = done.stat().st_mtime_ns
    status, printed = run()
    assert status == 1 and done.stat().st_mtime_ns == before
    assert "2 of 3 cells are done already" in printed and "quary" in printed and "[" not in printed

    _, printed = run("--retry")
    assert "[3/3] toy/wrong/seed-0: failed" in printed and "left" not in printed
    status, printed = run("--only", "method=r=2", "method=r=4")
    assert status == 0 and "2 of 2 cells are done already" in printed


def test_cells_run_side_by_side_and_are_told_of_as_they_end(recipe, tmp_path):
    work = {
        cell: arguments_of(cell, tmp_path / "runs", tmp_path / "data") for cell in recipe.cells(2)
    }
    found = dict(sweep.in_processes(one_by_one(work), jobs=2))
    assert found.keys() == work.keys()
    for cell, state in found.items():
        assert state.name == ("failed" if cell.labels["method"] == "wrong" else "done")
    losses = [
        [row["loss"] for row in read_csv(arguments.directory() / "steps.csv")]
        for cell, arguments in work.items()
        if cell.labels["method"] == "r=2"
    ]
    assert losses[0] != losses[1], "the seeds are the same"


def test_the_process_that_forks_has_imported_everything(recipe, tmp_path):
    work = {next(recipe.cells()): Arguments(task="none", output_dir=str(tmp_path / "none"))}
    list(sweep.in_processes(one_by_one(work), jobs=1))  # which starts it
    context = sweep.multiprocessing.get_context("forkserver")
    code = f"import sys; sys.exit(set({sweep.PRELOAD}) <= sys.modules.keys())"
    process = context.Process(target=exec, args=(code,))
    process.start()
    process.join()
    assert process.exitcode == 1  # of exit(True)


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_goes_on_to_the_same_numbers(recipe, tmp_path, bert):
    """SIGKILL of the sweep alone: its cell must end too, and not write on."""
    code = (
        "import sys; from models import recipes, sweep; from models.recipes.recipe import Recipe\n"
        f"row = Recipe('toy', 0, '', {{**{dict(recipe.base)}, 'epochs': 8}},"
        " {'method': {'r=2': {'rank': 2}}}, 1)\n"
        "recipes.RECIPES['toy'] = row\n"
        f"sys.exit(sweep.main(['toy', '--data-dir', {str(tmp_path / 'data')!r}, *sys.argv[1:]]))"
    )

    def start(runs: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code, "--runs", str(runs)], cwd=ROOT)

    whole = tmp_path / "whole/toy/r=2/seed-0"
    assert start(tmp_path / "whole").wait(300) == 0
    cut = tmp_path / "cut/toy/r=2/seed-0"
    process = start(tmp_path / "cut")
    deadline = time.monotonic() + 120
    while not list((cut / CHECKPOINTS).glob("checkpoint-*/seal.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (cut / RESULT).exists(), "too late to kill it"
    with locked(cut / "cell"):  # waits until the cell's process has ended
        assert not (cut / RESULT).exists(), "the cell ran on without its sweep"
    assert start(tmp_path / "cut").wait(300) == 0
    assert (cut / "steps.csv").read_text() == (whole / "steps.csv").read_text()
    assert not (cut / ERROR).exists()


def test_a_sweep_that_is_stopped_stops_its_cells(recipe, tmp_path):
    _, wrong, long = recipe.cells()
    long.flags["epochs"] = 200
    work = {
        cell: arguments_of(cell, tmp_path / "runs", tmp_path / "data") for cell in (wrong, long)
    }
    ends = sweep.in_processes(one_by_one(work), jobs=2)
    assert next(ends)[0] is wrong
    ends.close()
    directory = work[long].directory()
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "cell"):  # waits until the cell's process has ended
        assert not (directory / RESULT).exists()


def test_a_process_that_dies_is_no_failed_cell():
    context = sweep.multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=signal.raise_signal, args=(signal.SIGKILL,))
    process.start()
    theirs.close()
    process.join()
    with pytest.raises(EOFError):
        ours.recv()
    state = sweep._death(process.exitcode)
    assert state.name == "died" and "signal 9" in state.why and "memory" in state.why


def test_cells_that_train_together_are_told_of_and_go_on(run, tmp_path, monkeypatch):
    status, printed = run("--together", "2", "--seeds", "2")
    assert status == 1 and "4 done, 2 failed" in printed and "[6/6]" in printed
    for label in ("r=2", "r=4"):
        result = json.loads((tmp_path / f"runs/toy/{label}/seed-1" / RESULT).read_text())
        assert any("with up to 2 runs in one pass" in note for note in result["notes"])
    done = tmp_path / "runs/toy/r=4/seed-0" / RESULT
    before = done.stat().st_mtime_ns
    status, printed = run("--together", "2", "--seeds", "3", "--only", "method=r=2", "method=r=4")
    assert status == 0 and "4 of 6 cells are done already" in printed and "6 done" in printed
    assert done.stat().st_mtime_ns == before


def test_losers_are_kept_apart_until_they_may_go_on(run, recipe, tmp_path):
    recipe.base["epochs"] = 2
    words = ("--together", "4", "--seeds", "2", "--only", "method=r=2", "method=r=4")
    status, printed = run(*words, "--stop-losers")
    assert status == 1 and "2 done, 2 stopped" in printed
    assert printed.count("stopped in ") == 2 and "better cells of its pack go on" in printed
    assert len(list((tmp_path / "runs").rglob(STOPPED))) == 2
    status, printed = run(*words, "--stop-losers")
    assert status == 1 and "2 done, 2 stopped" in printed and "[" not in printed
    status, printed = run(*words)
    assert status == 0 and "4 done" in printed
    assert not list((tmp_path / "runs").rglob(STOPPED))


def test_a_pack_that_dies_takes_its_cells_and_no_others(recipe, tmp_path):
    work = {
        cell: arguments_of(cell, tmp_path / "runs", tmp_path / "data") for cell in recipe.cells(2)
    }
    cells = list(work)
    long = {cell: dataclasses.replace(work[cell], epochs=500) for cell in (cells[0], cells[3])}
    ends = sweep.in_processes([sweep.Unit({cells[2]: work[cells[2]]}), sweep.Unit(long)], 2)
    assert next(ends)[1].name == "done"
    child = max(sweep.multiprocessing.active_children(), key=lambda process: process.pid)
    child.kill()
    found = dict(ends)
    assert found.keys() == long.keys()
    assert all(state.name == "died" and "signal 9" in state.why for state in found.values())


def test_the_time_left_ignores_cells_that_are_done(run, recipe, tmp_path, monkeypatch):
    clock = iter([100.0, 130.0, 160.0])
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        sweep,
        "in_processes",
        lambda units, *_: ((cell, State("done")) for unit in units for cell in unit.work),
    )
    directory = tmp_path / "runs/toy/r=2/seed-0"
    monkeypatch.setattr(
        sweep,
        "state_of",
        lambda arguments: State("done" if arguments.directory() == directory else "to do"),
    )
    _, printed = run()
    assert "[2/3] toy/wrong/seed-0: done; 1 left, about 30 s" in printed


def test_a_cell_that_another_sweep_runs_is_left_to_it(recipe, tmp_path):
    arguments = arguments_of(next(recipe.cells()), tmp_path / "runs", tmp_path / "data")
    arguments.directory().mkdir(parents=True)
    with locked(arguments.directory() / "cell"):
        assert run_cell(arguments).name == "elsewhere"
    assert state_of(arguments) == State("to do")


def test_a_finished_run_with_other_flags_is_not_taken_for_the_cell(run, recipe, tmp_path):
    run("--only", "method=r=2")
    cell = next(recipe.cells())
    cell.flags["weight_decay"] = 0.5
    changed = arguments_of(cell, tmp_path / "runs", tmp_path / "data")
    state = state_of(changed)
    assert state.name == "failed" and "weight_decay 0.0 -> 0.5" in state.why


def test_cells_with_graphs_are_the_same_cells(run, recipe, tmp_path):
    assert run("--graphs", "--only", "method=r=2")[0] == 0
    cell = next(recipe.cells())
    result = json.loads((cell.directory(tmp_path / "runs") / RESULT).read_text())
    assert result["arguments"]["graphs"] is True
    assert any("CUDA graphs" in note for note in result["notes"])
    code, printed = run("--only", "method=r=2")
    assert code == 0 and "1 of 1 cells are done already" in printed


def test_a_run_of_a_version_without_a_flag_is_still_done(run, recipe, tmp_path):
    run("--only", "method=r=2")
    cell = next(recipe.cells())
    cell.flags["graphs"] = False
    made = arguments_of(cell, tmp_path / "runs", tmp_path / "data")
    for name, path in (("arguments.json", []), (RESULT, ["arguments"])):
        file = made.directory() / name
        content = json.loads(file.read_text())
        flags = content[path[0]] if path else content
        del flags["graphs"]
        file.write_text(json.dumps(content))
    assert state_of(made) == State("done")
    (done, *_) = frame_of(dataclasses.replace(recipe, base=cell.flags), tmp_path / "runs")["state"]
    assert done == "done"


def test_a_cell_that_cannot_fit_fails_before_it_loads(recipe, tmp_path, monkeypatch):
    arguments = arguments_of(next(recipe.cells()), tmp_path / "runs", tmp_path / "data")
    monkeypatch.setattr(estimate, "memory_here", lambda: 1000)
    state = run_cell(arguments)
    assert state.name == "failed" and "cannot fit" in state.why and "GiB" in state.why


def test_a_dry_run_counts_and_runs_nothing(run, tmp_path, recipe):
    status, printed = run("--dry-run")
    assert status == 0 and not list((tmp_path / "runs").rglob("arguments.json"))
    assert "3 cells (3 to do)" in printed and "toy/r=2" in printed and "GFLOP/s" in printed
    assert "note: toy/wrong: " in printed and "quary" in printed
    # The count is that of the run itself.
    run("--only", "method=r=4")
    result = json.loads((tmp_path / "runs/toy/r=4/seed-0" / RESULT).read_text())
    trained = result["parameters"]["all"]["trainable"]
    status, printed = run("--dry-run")
    assert f"{trained:,}" in printed and "1 done" in printed


def test_lists(run, capfd):
    assert sweep.main(["--list"]) == 0
    assert "sms-grid" in capfd.readouterr().out
    status, printed = run("--list")
    assert status == 0 and "toy/r=4/seed-0: to do" in printed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stsbb"], "did you mean stsb"),
        (["stsbb", "--small"], "unknown recipe 'stsbb'; did you mean stsb"),
        ([], "name a recipe"),
        (["glue", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["glue", "--together", "0"], "--together 0 must be at least 1, or auto"),
        (["glue", "--together", "2", "--ray", "auto"], "leave out --ray"),
        (["glue", "--stop-losers"], "name --together"),
        (["glue", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["glue", "--only", "task=sst3"], "glue has task=sst2, qqp, mrpc"),
    ],
)
def test_bad_input_gets_one_line(words, told, capsys):
    assert sweep.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1


def test_data_that_is_not_there_fails_its_cells(recipe, tmp_path):
    sms = recipes.recipe_of("sms-layers-small")
    cell = next(sms.cells())
    with pytest.raises(FileNotFoundError, match="sms_spam_deepdive is not on the hub"):
        arguments_of(cell, tmp_path, None)
    state = run_cell(arguments_of(cell, tmp_path, tmp_path / "nowhere"))
    assert state.name == "failed" and "sms_spam_deepdive is not a directory" in state.why


# --- Ray ------------------------------------------------------------------------------------------


def test_without_ray_the_flag_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, printed = run("--ray", "auto")
    assert status == 2 and "pip install ray" in printed


@pytest.mark.slow
def test_a_cluster_of_two_nodes_runs_the_same_cells(run, recipe, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="not among the dependencies: pip install ray")
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        status, printed = run("--ray", cluster.address)
    finally:
        cluster.shutdown()
    assert status == 1 and "2 done, 1 failed" in printed and "quary" in printed
    for label in ("r=2", "r=4"):
        assert (tmp_path / f"runs/toy/{label}/seed-0" / RESULT).is_file()
