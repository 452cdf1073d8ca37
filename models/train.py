"""Fine-tune one model on one task: `python -m models.train`.

With no arguments: MiniLM, fused LoRA, the docstrings of this Python's standard library; a few
minutes on two CPU cores. `train(Arguments(...))` does the same in process and returns the result.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import datasets
import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments, set_seed

from . import run_directory, show
from .arguments import Arguments, check
from .attach import WAYS, Attached, attach
from .checkpoints import KEPT
from .data import tokens
from .data.tasks import Task, load, metrics_of, task_of
from .digests import digests
from .loading import Loaded, checkpoint_activations, load_model, load_tokenizer, model_source
from .result import (
    describe_data,
    describe_model,
    describe_numbers,
    describe_run,
    describe_training,
)
from .trainer import ExactTrainer, SaveEvery


def train(
    arguments: Arguments, callbacks: tuple[transformers.TrainerCallback, ...] = ()
) -> dict[str, Any]:
    """Run `arguments` to the end; returns what `result.json` holds.

    A run that was cut off continues from its last checkpoint and ends with the numbers that it
    would have had. A finished run is read back. Raises ValueError, FileNotFoundError or ImportError
    for arguments that cannot work, before any training.

    >>> train(Arguments(task="sst2", rank=4))["metrics"]["test"]["accuracy"]
    """
    check(arguments)
    task = task_of(arguments.task)
    directory, identity = arguments.directory(), arguments.identity()
    data = load(task, arguments.data_dir)
    source = model_source(arguments.model)
    tokenizer = load_tokenizer(source)
    used = tokens.sample(data.splits, arguments.max_train_samples, arguments.max_eval_samples)
    identity |= digests(used, source)
    choice = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    finished = run_directory.find_run(directory, identity, **choice)
    if finished is not None:
        print(f"{directory} holds this run, finished; --overwrite runs it again")
        return finished

    rows, scored = tokens.encode(used, tokenizer, arguments.max_length)
    loaded, attached = _attach(task, source, tokenizer, arguments)
    tokens.check_ids((rows, *scored.values()), getattr(loaded.model.config, "vocab_size", None))
    result = {
        **describe_run(arguments, task, source),
        **describe_data(task, data, used, scored),
        **describe_model(attached),
        "notes": [*data.notes, *loaded.notes],
    }
    show.print_parameters(result)
    with run_directory.opened(directory, identity, **choice) as checkpoint:
        trainer = _trainer(task, attached, tokenizer, rows, scored, arguments, callbacks)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        result["metrics"] = trainer.score(scored)
        result |= describe_training(trainer)
        result |= describe_numbers(result, trainer.step_losses)
        run_directory.finish(
            directory,
            result,
            trainer.step_losses,
            lambda path: WAYS[arguments.method].save(trainer.model, path),
        )
    return result


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, train, print the tables.

    The exit status is 2 for arguments, files or a place that cannot work, and 1 for a run that
    ended without a finite loss.
    """
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
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    show.print_result(result, arguments.directory())
    return 1 if result.get("diverged") else 0


def _attach(
    task: Task, source: str, tokenizer: Any, arguments: Arguments
) -> tuple[Loaded, Attached]:
    """The pretrained model with a head for the task, and the same made ready to train."""
    set_seed(arguments.seed)
    loaded = load_model(source, task, tokenizer.pad_token_id, arguments.max_length)
    if arguments.gradient_checkpointing:
        checkpoint_activations(loaded.model)
    return loaded, attach(arguments, loaded.model, loaded.new)


def _trainer(
    task: Task,
    attached: Attached,
    tokenizer: Any,
    rows: datasets.Dataset,
    scored: dict[str, datasets.Dataset],
    arguments: Arguments,
    callbacks: tuple[transformers.TrainerCallback, ...],
) -> ExactTrainer:
    """The training loop over `rows`, which scores the validation split after every epoch."""

    def metrics(output: transformers.EvalPrediction) -> dict[str, float]:
        found = output.predictions
        return metrics_of(task, found[0] if isinstance(found, tuple) else found, output.label_ids)

    return ExactTrainer(
        model=attached.model,
        args=_training_arguments(arguments, len(rows), "validation" in scored),
        train_dataset=rows.remove_columns("length"),
        eval_dataset=scored.get("validation"),
        data_collator=tokens.collator(tokenizer, arguments.max_length, arguments.pad_to_max),
        compute_metrics=metrics,
        lengths=rows["length"],
        new=attached.new,
        callbacks=[SaveEvery(arguments.save_steps), *callbacks],
    )


def _training_arguments(arguments: Arguments, rows: int, validate: bool) -> TrainingArguments:
    """Trainer's own settings, for a training split of `rows` rows."""
    steps = arguments.epochs * math.ceil(rows / arguments.batch_size)
    gpu = torch.cuda.is_available()
    training = TrainingArguments(
        output_dir=str(arguments.directory() / run_directory.CHECKPOINTS),
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
        eval_strategy="epoch" if validate else "no",
        save_strategy="epoch",
        save_total_limit=KEPT,
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


if __name__ == "__main__":
    sys.exit(main())
