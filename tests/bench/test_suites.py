"""End to end, host, packs and plots: each subcommand runs on a CPU, small."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import end_to_end, host, packs, plots, quantised, records, timing, training_run
from bench.subjects import METHODS, MODELS, PRECISIONS
from tests.bench.test_roofline import kernel_row

CPU = torch.device("cpu")


def end_to_end_row(**changes):
    row = {"suite": "end_to_end", "model": "roberta-base", "method": "peft", "provider": "peft"}
    row |= {"precision": "bf16", "batch": 16, "length": 128, "status": "timed"}
    return row | {"samples_per_second": 100.0, "step_ms": 160.0, **changes}


@pytest.mark.parametrize("name", MODELS)
def test_end_to_end_steps(tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    methods = ("full", "peft", "lora", "lora-graph")
    arguments = ["end_to_end", "--tiny", "--models", name, "--methods", *methods, "--steps", "1"]
    arguments += ["--precisions", "bf16-autocast", "--results", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.iterdir()
    rows = {row["method"]: row for row in records.read(path)}
    assert path.name.startswith("cpu-") and path.name.endswith("-end-to-end.json")
    for method in methods:
        assert set(records.FIELDS["end_to_end"]) <= set(rows[method])
        assert rows[method]["model"] == f"tiny-{name}"
    assert rows["lora-graph"]["status"] == "unavailable"
    assert rows["lora"]["samples_per_second"] > 0
    # Both kinds of LoRA train the same parameters.
    assert rows["lora"]["trainable"] == rows["peft"]["trainable"] < rows["full"]["trainable"]
    capsys.readouterr()
    assert command.main(arguments) == 0  # nothing is measured again
    assert "samples/s" not in capsys.readouterr().out


def test_compiled_methods_come_last_and_model_by_model(tmp_path, monkeypatch):
    seen = []

    def measured(model, method, precision, *_, **__):
        seen.append((method.name, model.name))
        row = end_to_end._key(model, method, precision, tiny=True)
        return row | {"status": "failed", "reason": "not today"}

    monkeypatch.setattr(end_to_end, "measure", measured)
    flags = ["--models", "gpt2", "roberta-base", "--precisions", "fp32", "--results", str(tmp_path)]
    flags += ["--methods", "peft-compile", "lora", "lora-compile"]
    assert command.main(["end_to_end", "--tiny", *flags]) == 1
    compiled = [(method, name) for name in ("gpt2", "roberta-base") for method in METHODS]
    compiled = [pair for pair in compiled if pair[0].endswith("-compile")]
    assert seen == [("lora", "gpt2"), ("lora", "roberta-base"), *compiled]
    seen.clear()
    monkeypatch.setattr(end_to_end, "_alive", lambda device: False)
    assert command.main(["end_to_end", "--tiny", *flags]) == 1
    assert len(seen) == 1, "after an illegal access nothing else would run"


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row.unmasked])
def test_attention_gets_no_mask(name, monkeypatch):
    masks, real = [], torch.nn.functional.scaled_dot_product_attention

    def attention(*given, attn_mask=None, **options):
        masks.append(attn_mask)
        return real(*given, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    model = MODELS[name].build(CPU, torch.float32, tiny=True)
    ids = torch.randint(5, 100, (2, 8))
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert masks == [None, None]


@pytest.mark.parametrize("precision", [name for name, row in PRECISIONS.items() if not row.scaled])
def test_a_step_trains(precision):
    torch.manual_seed(0)
    row, method = MODELS["gpt2"], METHODS["lora"]
    model = row.build(CPU, PRECISIONS[precision].weights, tiny=True)
    model = method.attach(model, row, end_to_end.Recipe(dropout=0.0))
    inputs = {"input_ids": torch.randint(5, 100, (2, 8)), "labels": torch.tensor([0, 1])}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = end_to_end.training_step(model, inputs, method, PRECISIONS[precision], CPU)
    step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("lora_B" in name for name in changed)
    assert all("lora_" in name or "score" in name for name in changed)


def test_toys_do_not_replace_what_was_measured():
    parser = argparse.ArgumentParser()
    host.add_arguments(parser)
    with pytest.raises(SystemExit, match="--tiny measures toys"):
        host.run(parser.parse_args(["--tiny"]))


def test_training_run_puts_both_side_by_side(tmp_path, monkeypatch, capsys):
    calls, real = [], training_run.subprocess.run

    def fake(command, **options):
        if "--output-dir" not in command:  # git, which says the commit
            return real(command, **options)
        calls.append(command)
        directory = command[command.index("--output-dir") + 1]
        method = command[command.index("--method") + 1]
        result = {"task": "toy", "model": "/somewhere/toy-model", "metrics": {"test": {"acc": 0.5}}}
        result |= {"seconds": 2.0 if method == "lora" else 3.0, "samples_per_second": 10.0}
        training_run.Path(directory).mkdir()
        (training_run.Path(directory) / "result.json").write_text(json.dumps(result))
        return training_run.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(training_run.subprocess, "run", fake)
    flags = ["--results", str(tmp_path), "--train-run", "--task", "toy", "--epochs", "1"]
    assert command.main(["end_to_end", *flags]) == 0
    assert [c[c.index("--method") + 1] for c in calls] == ["peft", "lora"]
    assert all(c[3:7] == ["--task", "toy", "--epochs", "1"] for c in calls)
    assert "test acc 0.5000" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert {row["model"] for row in records.read(path)} == {"toy-model"}
    assert command.main(["end_to_end", "--train-run", "--method", "full"]) == 2


def test_host_suite(tmp_path, monkeypatch, capsys):
    # tests/kernels/test_launch.py has the launches; they want a process that is not interpreting.
    monkeypatch.setattr(host, "launch_cost", lambda samples: [])
    eager = [name for name, row in host.PROVIDERS.items() if not row.compiled]
    arguments = ["host", "--tiny", "--samples", "2", "--results", str(tmp_path)]
    assert command.main([*arguments, "--providers", *eager]) == 0
    (path,) = tmp_path.iterdir()
    rows = records.read(path)
    assert {row["case"] for row in rows} == {*host.SUBJECTS, "overhead of a call", "import"}
    assert all(row["median_us"] > 0 and row["status"] == "timed" for row in rows)
    assert len(rows) == len(host.SUBJECTS) * 2 * 2 * len(eager) + 3 + 1
    ours = [row for row in rows if row["provider"] == "library" and row["case"] in host.SUBJECTS]
    assert all(row["over_ours"] == 1 for row in ours)
    said = capsys.readouterr().out
    assert "goal 50 ms" in said and "this / ours" in said


def test_what_each_provider_of_the_host_suite_trains():
    subject = host.SUBJECTS["tiny layers"](True)
    trained = {}
    for name in host.PROVIDERS:
        model = host.attach(name, subject, 0.0)
        parameters = [n for n, p in model.named_parameters() if p.requires_grad]
        trained[name] = len(parameters), sum("lora_" in n for n in parameters)
        assert hasattr(model, "_orig_mod") == host.PROVIDERS[name].compiled
    assert trained == {
        "floor": (0, 0), "full": (12, 0), "peft": (12, 12), "peft-compile": (12, 12),
        "library": (12, 12), "library-compile": (12, 12),
    }  # fmt: skip


def test_compiled_providers_are_timed_and_checked():
    providers = ("peft", "library", "peft-compile", "library-compile")
    rows = host.measure("tiny layers", "fp32", 0.0, 3, tiny=True, providers=providers)
    assert [row["status"] for row in rows] == ["timed"] * 4
    assert all(row["median_us"] > 0 and row["over_ours"] > 0 for row in rows)


def test_ratios_are_those_of_a_round():
    assert timing.paired_ratio([2.0, 40.0, 9.0], [1.0, 10.0, 3.0]) == 3.0  # of medians: 4.5 / 3
    assert timing.paired_ratio([1.0], None) is None


def test_host_suite_refuses_a_wrong_layer(monkeypatch):
    real = host.attach

    def spoilt(provider, subject, dropout):
        model = real(provider, subject, dropout)
        if provider == "library":
            model.up.lora_B.data.mul_(1.1)
        return model

    monkeypatch.setattr(host, "attach", spoilt)
    providers = ("floor", "peft", "library")
    rows = host.measure("linears", "bf16-autocast", 0.0, 1, tiny=True, providers=providers)
    assert [row["status"] for row in rows] == ["timed", "timed", "wrong"]
    assert "median_us" not in rows[-1]


def test_packs_suite(tmp_path, capsys):
    arguments = ["packs", "--tiny", "--samples", "2", "--results", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.iterdir()
    rows = records.read(path)
    assert path.name.endswith("-packs.json")
    assert {row["batch"] for row in rows} == {1, 4, 16}
    assert all(row["median_us"] > 0 and row["status"] == "timed" for row in rows)
    graphs = [row for row in rows if row["provider"].endswith(packs.GRAPH)]
    assert len(graphs) == (3 * 3 if torch.cuda.is_available() else 0)
    rows = [row for row in rows if row not in graphs]
    assert len(rows) == 3 * 4
    for ratio in ("solo_ratio", "peft_ratio", "compile_ratio"):
        assert [row["provider"] for row in rows if ratio in row] == ["packed"] * 3
    assert "peft-compile one by one" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_quantised_suite(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    arguments = ["quantised", "--tiny", "--samples", "2", "--results", str(tmp_path)]
    assert command.main(arguments) == 0
    (path,) = tmp_path.iterdir()
    rows = {row["provider"]: row for row in records.read(path)}
    assert tuple(rows) == quantised.PROVIDERS
    timed = {name: row for name, row in rows.items() if row["status"] == "timed"}
    assert timed.keys() >= {"floor", "dense floor", "peft", "library"}
    assert all(row["median_us"] > 0 and row["floor_ratio"] > 0 for row in timed.values())
    assert 0 < timed["library"]["error"] < 0.01
    if not torch.cuda.is_available():
        assert rows["split"]["status"] == "unavailable" and rows["split"]["reason"]
    monkeypatch.setattr(quantised, "ALPHA_PER_RANK", 3)  # another layer is asked for
    assert command.main(arguments) == 1
    rows = {row["provider"]: row for row in records.read(path)}
    assert rows["peft"]["status"] == rows["library"]["status"] == "wrong"
    assert "median_us" not in rows["peft"] or rows["peft"]["median_us"] is None


@pytest.mark.parametrize("spoilt", ["packed", "peft-compile one by one"])
def test_packs_suite_refuses_a_wrong_provider(monkeypatch, spoilt):
    real = packs.alone

    def compiled(model, **_):
        if spoilt == "packed":
            return model
        return lambda input_ids: SimpleNamespace(logits=2 * model(input_ids=input_ids).logits)

    def alone(model, name):
        # Another adapter's model stands for the first.
        return real(model, "a1" if (name, spoilt) == ("a0", "packed") else name)

    monkeypatch.setattr(packs, "alone", alone)
    monkeypatch.setattr(packs.torch, "compile", compiled)
    (row,) = packs.measure(packs.TOY, 4, 1, torch.device("cpu"))
    assert row["status"] == "wrong" and row["provider"] == spoilt and "median_us" not in row


def test_all_of_the_packs_suite_share_one_base(monkeypatch):
    models = []
    real = {name: getattr(packs, name) for name in ("add_loras", "attach_peft")}
    monkeypatch.setattr(
        packs, "add_loras", lambda m, c: (models.append(m), real["add_loras"](m, c))
    )
    monkeypatch.setattr(
        packs, "attach_peft", lambda m, *a: (models.append(m), real["attach_peft"](m, *a))[1]
    )
    monkeypatch.setattr(packs.torch, "compile", lambda model, **_: model)
    packs.measure(packs.TOY, 1, 1, torch.device("cpu"))
    assert len(models) == 1 + packs.TOY.adapters
    assert len({m.get_parameter("roberta.embeddings.word_embeddings.weight") for m in models}) == 1


def test_methods_step_in_turns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["end_to_end", "--tiny", "--in-turns", "--models", "roberta-base-2-blocks"]
    arguments += ["--methods", "frozen", "full", "peft", "lora", "lora-graph", "--steps", "2"]
    assert command.main([*arguments, "--precisions", "fp32", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    rows = {row["method"]: row for row in records.read(path)}
    assert rows.pop("lora-graph")["status"] == "unavailable"
    assert len(rows) == 4 and rows["lora"]["over_lora"] == 1
    assert all(row["status"] == "timed" and row["over_lora"] > 0 for row in rows.values())
    assert rows["lora"]["trainable"] == rows["peft"]["trainable"] < rows["full"]["trainable"]
    assert "this / ours" in capsys.readouterr().out


def test_plots_are_made_of_what_was_measured(tmp_path, monkeypatch, capsys):
    from matplotlib.text import Text

    assert command.main(["plots", "--results", str(tmp_path)]) == 1
    assert "no picture" in capsys.readouterr().out
    records.write(
        tmp_path / "nvidia-h200-kernels.json",
        [
            kernel_row(case=case, M=M, provider=name, median_us=us, floor_ratio=us / 50)
            for case in ("roberta-base.query", "roberta-base.up")
            for M in (2048, 4096)
            for name, us in (("floor", 50.0), ("peft", 150.0), ("auto", 60.0))
        ],
    )
    records.write(
        tmp_path / "nvidia-h200-end-to-end.json",
        [
            {**end_to_end_row(method=m), "gpu": "NVIDIA H200", "peak_memory_bytes": 2**31}
            for m in ("full", "peft", "lora")
        ],
    )
    texts, real = [], plots._save

    def watched(figure, *given):
        path = real(figure, *given)
        texts.extend((path.name, text.get_text()) for text in figure.findobj(Text))
        return path

    monkeypatch.setattr(plots, "_save", watched)
    assert command.main(["plots", "--results", str(tmp_path)]) == 0
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".json"}
    assert set(made) == {
        f"nvidia-h200-{name}.png" for name in ("overhead", "speed-up", "end-to-end")
    }
    overhead = {text for name, text in texts if name == "nvidia-h200-overhead.png"}
    assert {"NVIDIA H200   python -m bench kernels", "peft", "auto", "1.20"} <= overhead
    assert command.main(["plots", "--results", str(tmp_path)]) == 0  # the same rows, the same bytes
    assert made == {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
