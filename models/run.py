"""A run from its flags to its files: rows, model, method, training, result."""

from __future__ import annotations

import math
from collections.abc import Container
from contextlib import ExitStack
from functools import partial
from typing import Any

import datasets
import torch
import transformers
from transformers import TrainingArguments, default_data_collator, set_seed

from .arguments import Arguments, check
from .data import digits, prompts, tokens
from .data.tasks import Task, load, metrics_of, task_of
from .model.attach import WAYS, Attached, attach
from .model.loading import (
    Loaded,
    checkpoint_activations,
    image_shape,
    load_model,
    load_tokenizer,
    model_source,
)
from .record import run_directory, show
from .record.checkpoints import KEPT
from .record.digests import digests
from .record.result import (
    describe_data,
    describe_model,
    describe_numbers,
    describe_ranks,
    describe_run,
    describe_training,
    logits_of,
    predictions_of,
)
from .training import processes
from .training.generation import write_held_out
from .training.progress import SaveEvery
from .training.seat import Seat
from .training.trainer import ExactTrainer


def run(
    arguments: Arguments,
    callbacks: tuple[transformers.TrainerCallback, ...] = (),
    seat: Seat | None = None,
) -> dict[str, Any]:
    """Do what `train.train` promises."""
    check(arguments)
    processes.begin()
    task = task_of(arguments.task)
    directory, identity = arguments.directory(), arguments.identity()
    data = load(task, arguments.data_dir)
    source = model_source(arguments.model)
    tokenizer = None if task.images else load_tokenizer(source)
    used = tokens.sample(data.splits, arguments.max_train_samples, arguments.max_eval_samples)
    identity |= digests(used, source) | processes.identity()
    choice = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    finished = processes.from_first(lambda: run_directory.find_run(directory, identity, **choice))
    if finished is not None:
        if processes.is_first():
            print(f"{directory} holds this run, finished; --overwrite runs it again")
        return finished

    if task.images:
        rows, scored, order = digits.encode(used, *image_shape(source))
    else:
        encode = tokens.encode if task.generation is None else prompts.encode
        rows, scored, order = encode(used, tokenizer, arguments.max_length)
    loaded, attached = _attach(task, source, tokenizer, arguments, seat)
    if not task.images:
        tokens.check_ids((rows, *scored.values()), getattr(loaded.model.config, "vocab_size", None))
    result = {
        **describe_run(arguments, task, source),
        **describe_data(task, data, used, scored),
        **describe_model(attached),
        "notes": [*data.notes, *loaded.notes, *attached.notes],
    }
    if processes.is_first():
        show.print_parameters(result)
    with ExitStack() as held:
        opened = run_directory.opened(directory, identity, **choice)
        checkpoint = processes.from_first(lambda: held.enter_context(opened))
        trainer = _trainer(task, attached, tokenizer, rows, scored, arguments, callbacks, seat)
        processes.seed_apart(arguments.seed)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.graphs is not None and (seat is None or seat.alone):
            print(trainer.graphs)
            result["notes"] += str(trainer.graphs).splitlines()
        if seat is not None:
            result["notes"] += seat.notes(trainer.state.global_step)
        result["metrics"] = trainer.score(scored)
        if task.generation is None:
            predictions = predictions_of(task, scored, order, trainer.predictions)
        else:
            limits = arguments.max_length, arguments.eval_batch_size
            with trainer.meter.phase("final scoring"):
                written = write_held_out(task, trainer.model, tokenizer, used, data.splits, limits)
            for split, scores in written.scores.items():
                result["metrics"][split] |= scores
            result["notes"] += written.notes
            predictions = written.rows
        result |= describe_training(task, trainer)
        if arguments.method == "lora_adaptive":
            result |= describe_ranks(trainer.model)
        result |= describe_numbers(result, trainer.step_losses)
        finish = partial(
            run_directory.finish,
            directory,
            result,
            trainer.step_losses,
            predictions,
            lambda path: WAYS[arguments.method].save(trainer.model, path),
        )
        processes.from_first(finish)
    return result


def _attach(
    task: Task, source: str, tokenizer: Any, arguments: Arguments, seat: Seat | None
) -> tuple[Loaded, Attached]:
    """The pretrained model with a head for the task, and the same made ready to train."""
    set_seed(arguments.seed)
    loaded = load_model(
        source,
        task,
        getattr(tokenizer, "pad_token_id", None),
        arguments.max_length,
        arguments.model_dropout,
    )
    if arguments.gradient_checkpointing:
        checkpoint_activations(loaded.model)
    if seat is not None:
        seat.begin(loaded.model, task.metrics[0])
    return loaded, attach(arguments, loaded.model, loaded.new)


def _trainer(
    task: Task,
    attached: Attached,
    tokenizer: Any,
    rows: datasets.Dataset,
    scored: dict[str, datasets.Dataset],
    arguments: Arguments,
    callbacks: tuple[transformers.TrainerCallback, ...],
    seat: Seat | None,
) -> ExactTrainer:
    """The training loop over `rows`, which scores the validation split after every epoch."""

    def metrics(output: transformers.EvalPrediction) -> dict[str, float]:
        return metrics_of(task, logits_of(output.predictions), output.label_ids)

    collator = tokens.collator if task.generation is None else prompts.collator
    trainer = ExactTrainer(
        model=attached.model,
        args=_training_arguments(arguments, len(rows), scored, task),
        train_dataset=rows.remove_columns("length"),
        eval_dataset=scored.get("validation"),
        data_collator=default_data_collator
        if tokenizer is None
        else collator(
            tokenizer, arguments.max_length, arguments.pad_to_max, 64 if arguments.graphs else 8
        ),
        compute_metrics=metrics if task.generation is None else None,
        lengths=rows["length"],
        scores=partial(metrics_of, task) if task.generation is None else None,
        new=attached.new,
        graphs=arguments.graphs,
        seat=seat,
        callbacks=[
            *(SaveEvery(arguments.save_steps), *attached.callbacks, *callbacks),
            *([] if seat is None else [seat]),
        ],
    )
    for callback in trainer.callback_handler.callbacks:
        # TensorBoard's place would be the folder of checkpoints, which does not outlive the run.
        if getattr(callback, "logging_dir", "") is None:
            callback.logging_dir = str(arguments.directory() / run_directory.TRACKED)
    return trainer


def _training_arguments(
    arguments: Arguments, rows: int, scored: Container[str], task: Task
) -> TrainingArguments:
    """Trainer's own settings, for a training split of `rows` rows."""
    batches = math.ceil(rows / arguments.batch_size)
    steps = arguments.epochs * math.ceil(batches / arguments.gradient_accumulation)
    if arguments.max_steps is not None:
        steps = arguments.max_steps
    validate = "validation" in scored
    if arguments.best_epoch and not validate:
        raise ValueError(f"--best-epoch: task {task.name} has no validation split here")
    # Texts are written at the end alone.
    best = task.metrics[0] if task.generation is None else "loss"
    gpu = torch.cuda.is_available()
    training = TrainingArguments(
        output_dir=str(arguments.directory() / run_directory.CHECKPOINTS),
        num_train_epochs=arguments.epochs,
        max_steps=-1 if arguments.max_steps is None else arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.eval_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation,
        learning_rate=arguments.rate(),
        weight_decay=arguments.weight_decay,
        adam_beta1=arguments.adam_beta1,
        adam_beta2=arguments.adam_beta2,
        adam_epsilon=arguments.adam_epsilon,
        label_smoothing_factor=arguments.label_smoothing,
        warmup_steps=math.ceil(arguments.warmup_ratio * steps),
        lr_scheduler_type=arguments.scheduler,
        fp16=arguments.precision == "fp16",
        bf16=arguments.precision == "bf16",
        seed=arguments.seed,
        eval_strategy="epoch" if validate else "no",
        save_strategy="epoch",
        save_total_limit=KEPT,
        load_best_model_at_end=arguments.best_epoch,
        metric_for_best_model=f"eval_{best}" if arguments.best_epoch else None,
        greater_is_better=best != "loss" if arguments.best_epoch else None,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        remove_unused_columns=False,  # ours are exactly the model's
        label_names=["labels"],
        dataloader_pin_memory=gpu,
        use_cpu=not gpu,
        report_to=arguments.trackers or "none",
    )
    if training.n_gpu > 1:
        training._n_gpu = 1  # DataParallel would multiply the batch size unasked
    return training
