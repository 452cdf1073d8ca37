"""`GraphedForward`: losses outside of the graphs, the same numbers, and no stale memory.

Here a recorder stands in for CUDA graphs (`support.graphs`). Tests marked `gpu` capture.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_kernels import GraphedForward
from tests.support.oracle import DEVICE
from tests.training.test_graphed_step import REAL, batches, classifier


def logits_of(model, **batch):
    return model(**batch).logits


def plainly(model):
    return lambda **batch: logits_of(model, **batch)


def graphed(model):
    return GraphedForward(model, logits_of)


def trained(forward_of, count=12, every=1, dropout=0.1):
    """Losses and parameters after `count` batches whose loss is not the model's."""
    model = classifier(dropout, dropout)
    forward, losses = forward_of(model), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(5)
    for i, batch in enumerate(batches(count), 1):
        labels = batch.pop("labels")
        loss = F.cross_entropy(forward(**batch), labels, label_smoothing=0.1)
        loss.backward()
        losses.append(loss.detach().clone())
        if i % every == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return forward, torch.stack(losses), [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("every", [1, 3])
def test_a_loss_outside_of_the_graphs_trains_as_without_them(recorder, every):
    _, expected, weights = trained(plainly, every=every)
    forward, losses, found = trained(graphed, every=every)
    assert torch.equal(losses, expected)
    assert all(map(torch.equal, found, weights))
    assert recorder.captures == 2 * 2 and recorder.replays == 2 * (12 - 2 * 2)
    assert str(forward).startswith("2 CUDA graphs\n4 steps ran as they are: warm-up")


@pytest.mark.gpu
@pytest.mark.skipif(not REAL, reason="needs a GPU")
@pytest.mark.parametrize("every", [1, 3])
def test_graphs_replay_the_plain_run(every):
    _, expected, weights = trained(plainly, every=every, dropout=0.0)  # graphs draw others
    forward, losses, found = trained(graphed, every=every, dropout=0.0)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(found, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert str(forward).startswith("2 CUDA graphs"), str(forward)


def test_under_autocast_backward_is_captured_outside_of_it(recorder):
    model, inside = classifier(0.0, 0.0), []
    kind = DEVICE.type if isinstance(DEVICE, torch.device) else DEVICE
    model.classifier.register_full_backward_hook(
        lambda *_: inside.append(torch.is_autocast_enabled(kind))
    )
    forward = GraphedForward(model, logits_of)
    for batch in batches(4, lengths=(8,)):
        with torch.autocast(kind, torch.bfloat16):
            logits = forward(input_ids=batch["input_ids"])
        logits.float().sum().backward()
    assert recorder.captures == 2 and len(inside) == 5 and not any(inside)


def test_a_backward_whose_memory_is_gone_is_refused(recorder):
    model = classifier()
    forward = GraphedForward(model, logits_of)
    ids = [batch["input_ids"] for batch in batches(5, lengths=(8,))]
    for each in ids[:2]:
        forward(input_ids=each).sum().backward()
    first, second = forward(input_ids=ids[2]), forward(input_ids=ids[3])
    with pytest.raises(RuntimeError, match="another call of GraphedForward has taken the memory"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        second.sum().backward(create_graph=True)
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="or it is a second one"):
        second.sum().backward()


def test_outputs_are_plain_tensors_of_nobody_elses_memory(recorder):
    model = classifier()
    forward = GraphedForward(model, lambda model, **batch: {**model(**batch), "first": [1, None]})
    kept = []
    for batch in batches(5, lengths=(8,)):
        found = forward(**batch)
        assert type(found) is dict and found["first"] == (1, None)
        assert found["logits"].requires_grad
        kept.append((found["logits"], found["logits"].detach().clone()))
    assert all(torch.equal(one, other) for one, other in kept)
    assert recorder.replays == 3
    model.zero_grad()
    found["logits"].sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    (graph,) = forward._graphs.values()
    mine = {g.data_ptr() for g in graph.grads if g is not None}
    assert mine and not mine & {g.data_ptr() for g in grads}
    with pytest.raises(TypeError, match="not object"):
        GraphedForward(model, lambda *_, **__: object())(**batch)


def test_without_gradients_there_is_one_graph(recorder):
    model = classifier().eval()
    forward = GraphedForward(model)
    for batch in batches(4, lengths=(8,)):
        with torch.no_grad():
            found = forward(input_ids=batch["input_ids"])["logits"]
        assert not found.requires_grad
        assert torch.equal(found, model(input_ids=batch["input_ids"]).logits)
    assert recorder.captures == 1 and recorder.replays == 2


def test_a_backward_that_cannot_be_captured_runs_as_it_is(recorder):
    model = classifier()

    def refuse(grad):
        if recorder.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return grad

    def function(model, **batch):
        logits = model(**batch).logits
        logits.register_hook(refuse)
        return logits * 1

    forward = GraphedForward(model, function)
    for batch in batches(5, lengths=(8,)):
        model.zero_grad()
        forward(**batch).sum().backward()
        assert any(p.grad is not None for p in model.parameters())
    why = "the step cannot be captured: operation not permitted when stream is capturing"
    assert forward.reasons[why] == 3 and not recorder.replays
