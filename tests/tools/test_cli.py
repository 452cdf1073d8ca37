"""The command line: what `doctor` finds, its verdict, and how commands are read."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from lora_kernels import STRATEGIES, cli
from lora_kernels.tools import doctor
from lora_kernels.tools.doctor import Device, Facts, try_strategy

HEALTHY = Facts(
    versions={"torch": "2.13.0", "triton": "3.7.1", "numpy": "2.4.6"},
    gpu_build="CUDA 13.0",
    devices=(Device("cpu", "x86_64", "cpu"), Device("cuda:0", "NVIDIA RTX A4000", "sm_86", 16.0)),
    driver="NVIDIA 580.65",
    gpu_error=None,
    interpreting=False,
)
CPU_ONLY = HEALTHY.devices[:1]


def _pitfalls(**changes) -> set[str]:
    facts = dataclasses.replace(HEALTHY, **changes)
    return {pitfall.name for pitfall in doctor.PITFALLS if pitfall.found(facts)}


def _versions(**versions):
    return {**HEALTHY.versions, **versions}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, set(), id="healthy-gpu"),
        pytest.param(
            {"devices": CPU_ONLY, "driver": None, "gpu_build": None}, set(), id="healthy-cpu"
        ),
        pytest.param({"devices": CPU_ONLY, "gpu_build": None}, {"cpu-build"}, id="cpu-build"),
        pytest.param({"devices": CPU_ONLY}, {"gpu-unreachable"}, id="old-driver"),
        pytest.param({"versions": _versions(triton=None)}, {"no-triton"}, id="no-triton"),
        pytest.param({"launches_known": False}, {"unknown-triton"}, id="unknown-triton"),
        pytest.param(
            {"launches_known": False, "devices": CPU_ONLY, "driver": None, "gpu_build": None},
            set(), id="unknown-triton-without-gpu",
        ),
        pytest.param({"devices": (Device("cuda:0", "T4", "sm_75"),)}, {"turing"}, id="turing"),
        pytest.param({"devices": (Device("cuda:0", "RTX 5090", "sm_120"),)}, set(), id="blackwell"),
        pytest.param({"devices": (Device("cuda:0", "MI300X", "gfx942"),)}, set(), id="amd"),
        pytest.param({"interpreting": True}, {"interpreter-gpu"}, id="interpreter-on-gpu"),
        pytest.param(
            {"interpreting": True, "devices": CPU_ONLY, "driver": None,
             "versions": _versions(triton="3.6.0", numpy="2.4.0")},
            {"interpreter-numpy"}, id="triton-3.6-numpy-2.4",
        ),
        pytest.param(
            {"interpreting": True, "devices": CPU_ONLY, "driver": None,
             "versions": _versions(triton="3.6.0", numpy="2.3.5")},
            set(), id="triton-3.6-numpy-2.3",
        ),
        pytest.param({"versions": _versions(torch="2.10.0+cu130")}, {"old-torch"}, id="old-torch"),
        pytest.param(
            {"versions": _versions(peft="0.21.2"), "peft_asked": "0.22.0"}, {"old-peft"}, id="peft"
        ),
        pytest.param(
            {"versions": _versions(peft="0.22.0"), "peft_asked": "0.22.0"}, set(), id="peft-new"
        ),
        pytest.param({"peft_asked": "0.22.0"}, set(), id="no-peft"),
    ],
)  # fmt: skip
def test_pitfalls(changes, expected):
    assert _pitfalls(**changes) == expected


def test_doctor_prints_every_strategy_and_dtype(capsys):
    assert cli.main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert page.rstrip().endswith("Usable.")
    for word in (*STRATEGIES, "RoBERTa-base query", "float32", "float16", "bfloat16", "torch"):
        assert word in page


def test_doctor_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["usable"] is True
    assert {trial["strategy"] for trial in findings["strategies"]} == set(STRATEGIES)
    cpu = {trial["strategy"]: trial["problem"] for trial in findings["strategies"]
           if trial["device"] == "cpu"}  # fmt: skip
    assert cpu["library"] is None
    assert all(pick["reason"] for pick in findings["auto"])


@pytest.mark.parametrize(
    ("update", "wrong"),
    [
        pytest.param(lambda x, A, B: 0 * (x @ A.T @ B.T), "y", id="no-update"),
        pytest.param(lambda x, A, B: 2 * (x.detach() @ A.T @ B.T), "dx", id="half-of-dx"),
        pytest.param(lambda x, A, B: 2 * (x @ A.T @ B.T.detach()) + 0 * B.sum(), "dlora_B",
                     id="no-gradient-of-lora_B"),
    ],
)  # fmt: skip
def test_a_strategy_that_computes_garbage_is_found_out(update, wrong, monkeypatch):
    def broken(x, weight, lora_A, lora_B, *, scale, strategy):
        return x @ weight.T + update(x, lora_A, lora_B)

    monkeypatch.setattr(doctor, "lora_linear", broken)
    assert f"wrong {wrong}:" in (try_strategy("library", HEALTHY.devices[0]) or "")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_that_raises_gives_its_reason(strategy, monkeypatch):
    def uncompilable(*inputs, **options):
        raise RuntimeError("no C compiler\nlong trace")

    monkeypatch.setattr(doctor, "lora_linear", uncompilable)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert try_strategy(strategy, HEALTHY.devices[0]) == "RuntimeError: no C compiler"


def test_an_unusable_machine_exits_with_1(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "try_strategy", lambda strategy, device: "RuntimeError: no compiler"
    )
    assert cli.main(["doctor"]) == 1
    assert "Broken: cpu: auto picks library" in capsys.readouterr().out


def test_a_failing_driver_is_reported_not_raised(monkeypatch):
    def fail():
        raise RuntimeError("driver too old\nmore lines")

    monkeypatch.setattr("torch.cuda.is_available", fail)
    facts = doctor.gather()
    assert facts.gpu_error == "RuntimeError: driver too old"
    assert facts.devices[0].arch == "cpu"


@pytest.mark.parametrize("argv", [[], ["doktor"], ["doctor", "--jsno"]], ids=" ".join)
def test_a_command_line_that_cannot_be_read(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: lora-kernels" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_takes_json(name):
    paths = ["source", "target"] if name in ("convert", "merge") else []
    assert cli.parser().parse_args([name, *paths, "--json"]).json is True


@pytest.mark.parametrize("known", [True, False])
def test_doctor_asks_the_launch_cache_which_triton_it_knows(known, monkeypatch):
    launch = pytest.importorskip("lora_kernels.kernels.launch")
    monkeypatch.setattr(launch, "KNOWN", known)
    assert doctor.gather().launches_known is known


def test_doctor_of_a_triton_that_lacks_what_the_launch_cache_imports(monkeypatch):
    launch = pytest.importorskip("lora_kernels.kernels.launch")
    monkeypatch.delattr(launch, "KNOWN")
    assert doctor.gather().launches_known is False


def test_the_peft_that_transformers_asks_for_is_found(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers.integrations.peft")
    assert doctor.gather().peft_asked == transformers.MIN_PEFT_VERSION
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.gather().peft_asked is None


def test_as_a_module():
    command = [sys.executable, "-m", "lora_kernels.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["torch"]
