"""When a launch is taken from the cache, and when Triton's own dispatch makes it.

Run by test_launch.py, on the card and the training steps of `launches.py`.
"""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from lora_kernels import kernels
from lora_kernels.hardware.tiles import Tile
from lora_kernels.kernels import gradients, launch, plan
from tests.compiled.launches import BASE, Compiled, Launched, card, run, tensors


class Dispatched(Exception):  # noqa: N818 (no error: what tests look for)
    """Triton's dispatch was asked for a launch."""


def refuse_dispatch(monkeypatch) -> None:
    def refuse(*_, **__):
        raise Dispatched

    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", refuse)


def break_cache(error: Exception) -> None:
    """Whatever was remembered raises the error when it is launched again."""

    def broken(*_):
        raise error

    for key, (device, steps) in launch._STEPS.items():
        launch._STEPS[key] = device, [step._replace(run=broken) for step in steps]


def unnumbered(launched: list[Launched]) -> list[Launched]:
    """The launches, but for how many tensors were allocated before each new one."""
    return [
        each._replace(arguments=tuple(re.sub(r"new \d+", "new", a) for a in each.arguments))
        for each in launched
    ]


def test_known_signatures_launch_without_triton_s_dispatch(monkeypatch):
    """Else every other test here compares Triton's dispatch with itself."""
    assert launch.KNOWN, f"read the launcher of Triton {triton.__version__}, then add it to KNOWN"
    with card() as active:
        made = tensors(BASE)
        expected = run(BASE, made, active)
        refuse_dispatch(monkeypatch)
        assert run(BASE, made, active) == expected
        with pytest.raises(Dispatched):
            run(BASE._replace(scale=3.0), made, active)


def test_switched_off_every_launch_is_triton_s_own(monkeypatch):
    with card() as active:
        made = tensors(BASE)
        run(BASE, made, active)
        remembered = run(BASE, made, active)
        monkeypatch.setattr(launch, "CACHED", launch.wants_cache("triton"))
        launch._STEPS.clear()
        assert run(BASE, made, active) == remembered
        assert not launch._STEPS
        refuse_dispatch(monkeypatch)
        with pytest.raises(Dispatched):
            run(BASE, made, active)


@pytest.mark.parametrize("strategy", ["split", "fused", "hybrid"])
def test_triton_makes_a_launch_that_the_cache_could_not(monkeypatch, strategy):
    monkeypatch.setattr(launch, "CACHED", True)  # and so again after the test
    step = BASE._replace(strategy=strategy, dropout=0.1)
    with card() as active:
        made = tensors(step)
        expected = run(step, made, active)
        break_cache(RuntimeError("no such argument"))
        with pytest.warns(RuntimeWarning, match=r"no such argument.*LORA_KERNELS_LAUNCH") as caught:
            outcome = run(step, made, active)
        assert len(caught) == 1
        assert unnumbered(outcome) == unnumbered(expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert run(step, made, active) == expected  # off from now on, without another word


def test_an_error_of_the_launch_itself_is_raised_and_the_cache_stays(monkeypatch):
    monkeypatch.setattr(launch, "CACHED", True)
    with card() as active:
        made = tensors(BASE)
        run(BASE, made, active)
        break_cache(RuntimeError("the device is lost"))
        refuse_dispatch(monkeypatch)
        with pytest.raises(Dispatched) as raised:
            run(BASE, made, active)
        assert str(raised.value.__context__) == "the device is lost"
        assert launch.CACHED


def test_out_of_memory_is_no_fault_of_the_cache(monkeypatch):
    monkeypatch.setattr(launch, "CACHED", True)
    with card() as active:
        made = tensors(BASE)
        run(BASE, made, active)
        break_cache(torch.OutOfMemoryError("40 GiB"))
        refuse_dispatch(monkeypatch)
        with pytest.raises(torch.OutOfMemoryError):
            run(BASE, made, active)
        assert launch.CACHED


def test_the_variable_has_one_value():
    assert launch.wants_cache(None) and launch.wants_cache("") and not launch.wants_cache("triton")
    with pytest.raises(
        ValueError, match=r"LORA_KERNELS_LAUNCH=fast .* set it to triton.* or unset"
    ):
        launch.wants_cache("fast")


@pytest.mark.parametrize(("current", "of_tensors", "stages"), [(86, 90, 1), (90, 86, 4)])
def test_a_plan_is_made_for_the_card_of_its_tensors(monkeypatch, current, of_tensors, stages):
    """On a machine with an RTX card and an H100, not for the one that happens to be current.

    On an H100 the gradients of dy at ranks above 32 must not be pipelined, or they race.
    """
    made = []

    def planned(kernel, *arguments, **constants):
        made.append(constants.get("num_stages"))
        return plan.planned(kernel, *arguments, **constants)

    monkeypatch.setattr(gradients, "planned", planned)
    with card(GPUTarget("cuda", current, 32)) as active:

        @contextmanager
        def device(index):
            assert index == dy[0].get_device()
            before, active.target = active.target, GPUTarget("cuda", of_tensors, 32)
            yield
            active.target = before

        monkeypatch.setattr(torch.cuda, "device", device)
        dy, lora_B = (torch.zeros(32, 48),), (torch.zeros(48, 64),)
        kernels.output_gradients(
            dy, None, lora_B, scale=1.0, tile=Tile(32, 64, 0, 4, 4), precision="ieee", splits=1
        )
    assert made == [None, stages]  # the sum is planned first


def test_profilers_are_told(monkeypatch):
    with card() as active:
        made = tensors(BASE)
        run(BASE, made, active)
        assert {each.how for each in run(BASE, made, active)} == {"run"}

        def listener(_):
            pass

        for hook in ("launch_enter_hook", "launch_exit_hook"):
            getattr(knobs.runtime, hook).add(listener)
            assert {each.how for each in run(BASE, made, active)} == {"hooked"}
            getattr(knobs.runtime, hook).remove(listener)
            with monkeypatch.context() as patch:
                patch.setattr(knobs.runtime, hook, listener)
                assert {each.how for each in run(BASE, made, active)} == {"hooked"}


def test_a_tensor_of_another_device_makes_it_current(monkeypatch):
    """Triton launches on the current device, whatever device the pointers are of."""
    with card() as active:
        made, home, entered = tensors(BASE), active.device, []
        expected = len(run(BASE, made, active))

        @contextmanager
        def device(wanted):
            entered.append(wanted)
            before, active.device = active.device, home
            yield
            active.device = before

        monkeypatch.setattr(torch.cuda, "device", device)
        run(BASE, made, active)
        assert not entered
        active.device = object()
        launched = run(BASE, made, active)
        assert len(launched) == expected and set(entered) == {home}


@pytest.mark.parametrize("lack", ["function", "release"])
def test_what_is_not_known_is_left_to_triton(monkeypatch, lack):
    if lack == "function":
        monkeypatch.setattr(Compiled, "function", None)
    else:
        monkeypatch.setattr(launch, "KNOWN", False)
    with card() as active:
        made = tensors(BASE)
        assert run(BASE, made, active) == run(BASE, made, active)
        assert not launch._STEPS


def test_the_oldest_signatures_make_room(monkeypatch):
    monkeypatch.setattr(launch, "_LIMIT", 16)
    x, lora_A = torch.zeros(64, 48), (torch.zeros(8, 48),)
    with card() as active:
        for M in range(1, 40):
            kernels.project(x[:M], lora_A, tile=BASE.tile, precision="ieee")
            assert min(M, 15) <= len(launch._STEPS) <= 16
        assert len(active.launched) == 39
        refuse_dispatch(monkeypatch)
        for M in range(39, 39 - 15, -1):
            kernels.project(x[:M], lora_A, tile=BASE.tile, precision="ieee")
        with pytest.raises(Dispatched):
            kernels.project(x[:1], lora_A, tile=BASE.tile, precision="ieee")
