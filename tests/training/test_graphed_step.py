"""`GraphedStep`: what is captured, what replayed, what runs as it is; and no number differs.

Here a recorder stands in for a CUDA graph (`support.graphs`). Tests marked `gpu` capture.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lora_kernels import (
    GraphedForward,
    GraphedStep,
    LoRAConfig,
    adapter_rows,
    add_lora,
    add_loras,
    graph_trainer,
)
from lora_kernels.algebra import packs
from lora_kernels.training.graphed_step import loss_and_backward
from tests.support import zoo
from tests.support.oracle import DEVICE

REAL = torch.cuda.is_available()


def base(dropout):
    torch.manual_seed(0)
    model = zoo.build("roberta")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def classifier(dropout=0.1, base_dropout=0.1):
    model = base(base_dropout)
    add_lora(model, LoRAConfig(rank=3, alpha=6, dropout=dropout, train=("classifier",)))
    return model.to(DEVICE).train()


def batches(count, lengths=(8, 8, 16)):
    draw = torch.Generator().manual_seed(1)
    for i in range(count):
        shape = 2, lengths[i % len(lengths)]
        ids = torch.randint(5, 50, shape, generator=draw)
        yield {"input_ids": ids.to(DEVICE), "labels": torch.tensor([0, 1], device=DEVICE)}


def trained(step_of, count=14, every=1, dropout=0.1):
    """Losses and parameters after `count` batches with clipping, `every` batches a step."""
    model = classifier(dropout, dropout)
    step, losses = step_of(model), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(5)
    for i, batch in enumerate(batches(count), 1):
        losses.append(step(**batch).clone())
        if i % every == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return step, torch.stack(losses), [p.detach() for p in model.parameters()]


def plainly(model):
    return lambda **batch: loss_and_backward(model, **batch)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_replayed_run_is_the_plain_run(recorder, every):
    _, expected, weights = trained(plainly, every=every)
    step, losses, found = trained(GraphedStep, every=every)
    assert torch.equal(losses, expected)
    assert all(map(torch.equal, found, weights))
    assert recorder.captures == 2 and recorder.replays == 14 - 2 * 2
    assert str(step) == "2 CUDA graphs\n4 steps ran as they are: warm-up, 2 for a signature"


@pytest.mark.gpu
@pytest.mark.skipif(not REAL, reason="needs a GPU")
@pytest.mark.parametrize("every", [1, 2])
def test_a_graph_replays_the_plain_run(every):
    _, expected, weights = trained(plainly, every=every, dropout=0.0)  # a graph draws others
    step, losses, found = trained(GraphedStep, every=every, dropout=0.0)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(found, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert str(step).startswith("2 CUDA graphs"), str(step)


def pack(dropout=0.0):
    model = base(0.0)
    configs = {name: LoRAConfig(rank=3, dropout=dropout, train="classifier") for name in "ab"}
    add_loras(model, configs, seeds={"a": 1, "b": 2})
    return model.to(DEVICE).train()


def test_rows_that_adapter_rows_gives_are_of_a_signature(recorder):
    """A graph of equal blocks is not replayed for others."""
    model, plain = pack(), pack()
    step, ids = GraphedStep(model), torch.randint(5, 50, (4, 8), device=DEVICE)
    for rows in ({}, {}, {}, {"a": 1, "b": 3}, {}):
        inside = adapter_rows(model, rows) if rows else nullcontext()
        with inside, adapter_rows(plain, rows) if rows else nullcontext():
            batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0], device=DEVICE)}
            found, wanted = step(**batch), loss_and_backward(plain, **batch)
        torch.testing.assert_close(found, wanted)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)
    assert recorder.captures == 1 and recorder.replays == 2


def test_rows_that_adapter_rows_gives_are_not_captured(monkeypatch):
    model, ids = pack(), torch.randint(5, 50, (4, 8), device=DEVICE)
    monkeypatch.setattr("lora_kernels.layers.packed.is_capturing", lambda: True)
    model(input_ids=ids)
    with (
        pytest.raises(RuntimeError, match="outside of adapter_rows, with equal blocks"),
        adapter_rows(model, {"a": 1, "b": 3}),
    ):
        model(input_ids=ids)


def test_a_table_that_a_graph_reads_outlives_the_cache(monkeypatch):
    monkeypatch.setattr(packs, "is_capturing", lambda: True)
    kept = weakref.ref(packs.integers((3, 1, 4), torch.device("cpu")))
    monkeypatch.setattr(packs, "is_capturing", lambda: False)
    gone = weakref.ref(packs.integers((1, 5, 9), torch.device("cpu")))
    packs._table.cache_clear()
    assert gone() is None and kept() is not None


@pytest.mark.gpu
@pytest.mark.skipif(not REAL, reason="needs a GPU")
def test_a_graph_replays_a_pack():
    found = {}
    for name, step_of in (("plain", plainly), ("graph", GraphedStep)):
        model = pack()
        step = step_of(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for batch in batches(9, lengths=(8,)):
            losses.append(step(**batch).clone())
            optimizer.step()
            optimizer.zero_grad()
        found[name] = torch.stack([*losses, *(p.detach().norm() for p in model.parameters())])
    assert str(step).startswith("1 CUDA graphs"), str(step)
    torch.testing.assert_close(found["graph"], found["plain"], rtol=1e-5, atol=1e-6)
    model, ids = pack(dropout=0.5), next(batches(1))
    zoo.randomise(model, "lora_B")
    step = GraphedStep(model)
    losses = [float(step(**ids)) for _ in range(6)]
    assert len(set(losses[2:])) == 4, "each replay draws masks of its own"


@pytest.mark.gpu
@pytest.mark.skipif(not REAL, reason="needs a GPU")
def test_a_kernel_is_not_compiled_in_a_capture():
    model = classifier()
    step = GraphedStep(model)
    step._calls = type("Warm", (dict,), {"get": lambda self, key, default=0: 9})()
    batch = next(batches(1, lengths=(24,)))
    first = step(**batch)  # refused, and run as it is
    assert torch.isfinite(first) and "first time while a CUDA graph is captured" in str(step)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.skipif(REAL, reason="there is a GPU")
def test_on_a_cpu_every_step_runs_as_it_is():
    step, losses, _ = trained(GraphedStep, count=3)
    assert torch.equal(losses, trained(plainly, count=3)[1])
    assert step.reasons == {"the model is on cpu: CUDA graphs need a GPU": 3}


def test_what_cannot_be_captured_runs_as_it_is(recorder):
    model = classifier()

    def reads(model, **batch):
        loss = loss_and_backward(model, **batch)
        if recorder.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return loss

    step = GraphedStep(model, reads)
    for batch in batches(5, lengths=(8,)):
        model.zero_grad()
        assert torch.isfinite(step(**batch))
        assert any(p.grad is not None for p in model.parameters())
    why = "the step cannot be captured: operation not permitted when stream is capturing"
    assert step.reasons[why] == 3 and recorder.captures == 1 and not recorder.replays


def test_another_state_is_another_graph(recorder):
    model = classifier(dropout=0.0)
    step = GraphedStep(model)

    def run(times=3):
        for batch in batches(times, lengths=(8,)):
            step(**batch)

    run()
    assert recorder.captures == 1
    with torch.autocast("cpu", torch.bfloat16):
        run()
    assert recorder.captures == 2
    model.classifier.dense.weight.data = model.classifier.dense.weight.data.clone()
    run()
    assert recorder.captures == 3
    model.roberta.eval()
    run()
    assert recorder.captures == 4
    model.classifier.requires_grad_(False)
    run()
    assert recorder.captures == 5


def test_graphs_are_limited(recorder):
    model = classifier()
    step = GraphedStep(model, limit=1)
    for batch in batches(8, lengths=(8, 16)):
        step(**batch)
    assert recorder.captures == 1
    assert step.reasons["1 graphs are captured already (limit)"] == 2


def test_results_and_gradients_are_nobody_elses_memory(recorder):
    model = classifier()
    step = GraphedStep(model, lambda model, batch: (loss_and_backward(model, **batch), 3))
    kept = []
    for batch in batches(6, lengths=(8,)):
        model.zero_grad()
        loss, number = step(batch)
        kept.append((loss, loss.item(), [p.grad for p in model.parameters()]))
        assert number == 3
    assert all(loss.item() == value for loss, value, _ in kept)
    (graph,) = step._graphs.values()
    mine = {g.data_ptr() for g in graph.grads if g is not None}
    assert mine and not mine & {g.data_ptr() for *_, grads in kept for g in grads if g is not None}


def test_an_optimizer_inside(recorder):
    model = classifier()
    trainable = [p for p in model.parameters() if p.requires_grad]
    for options, message in (
        ({"lr": 1e-3}, "capturable=True"),
        ({"lr": 1e-3, "capturable": True}, "learning rate 0.001 is a number"),
    ):
        with pytest.raises(ValueError, match=message):
            GraphedStep(model, optimizer=torch.optim.AdamW(trainable, **options))
    rate = torch.tensor(1e-2)
    optimizer = torch.optim.SGD(trainable, lr=rate)
    for group in optimizer.param_groups:
        group["capturable"] = True  # SGD keeps nothing on the host
    step = GraphedStep(model, optimizer=optimizer)
    before = [p.detach().clone() for p in trainable]
    for batch in batches(5, lengths=(8,)):
        step(**batch)
        assert all(p.grad is None for p in trainable)
    assert recorder.replays == 3
    assert any(not torch.equal(a, b) for a, b in zip(before, trainable, strict=True))


@pytest.mark.parametrize("bad", [object(), {"x": [object()]}])
def test_inputs_of_other_kinds_are_refused_by_type(bad):
    with pytest.raises(TypeError, match="not object"):
        GraphedStep(classifier())(bad)


def test_inputs_that_ask_for_a_gradient_run_as_they_are(recorder):
    step = GraphedStep(nn.Linear(2, 2), lambda model, x: model(x).sum().backward())
    for _ in range(4):
        step(torch.ones(1, 2, requires_grad=True))
    assert recorder.captures == 0 and "asks for a gradient" in str(step)


def trainer(directory, **more):
    rows = [{k: v[0].cpu() for k, v in batch.items()} for batch in batches(24, lengths=(8,))]
    arguments = TrainingArguments(
        str(directory), per_device_train_batch_size=2, num_train_epochs=1, report_to="none",
        learning_rate=1e-2, logging_steps=1, save_strategy="no", use_cpu=not REAL, **more,
    )  # fmt: skip
    return Trainer(classifier(), arguments, train_dataset=rows)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_with_graphs_trains_as_without(recorder, tmp_path, accumulation):
    logs = []
    for graphed in (False, True):
        each = trainer(tmp_path, gradient_accumulation_steps=accumulation)
        step = graph_trainer(each) if graphed else None
        each.train()
        logs.append([row["loss"] for row in each.state.log_history if "loss" in row])
    assert logs[0] == logs[1] and len(logs[0]) == 12 // accumulation
    assert recorder.replays == 12 - 2 and step is not None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GraphedStep(3), TypeError, r"model must be an nn\.Module: got 3"),
        (lambda: GraphedStep(nn.Linear(2, 2), 3), TypeError, "function must be callable: got 3"),
        (
            lambda: GraphedForward(nn.Linear(2, 2), limit="a"),
            ValueError,
            "limit must be an integer",
        ),
        (lambda: graph_trainer(3), TypeError, "trainer must be a transformers Trainer: got 3"),
    ],
    ids=["model", "function", "limit", "trainer"],
)
def test_what_is_none_of_these_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_trainer_that_no_graph_can_hold_is_refused(tmp_path, monkeypatch):
    each = trainer(tmp_path)
    monkeypatch.setattr(each, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="FSDP"):
        graph_trainer(each)
    each = trainer(tmp_path, torch_empty_cache_steps=2)
    with pytest.raises(ValueError, match="torch_empty_cache_steps"):
        graph_trainer(each)
