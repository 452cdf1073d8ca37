"""The targets that a language model writes for held-out prompts, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..data import prompts, sentences
from ..data.tasks import Task

Splits = Mapping[str, datasets.Dataset]


class Written(NamedTuple):
    """Split -> scores, a row for each prompt as in `predictions.csv`, and what is not scored."""

    scores: dict[str, dict[str, float]]
    rows: list[dict[str, Any]]
    notes: list[str]


def write_held_out(
    task: Task, model: Any, tokenizer: Any, used: Splits, whole: Splits, limits: tuple[int, int]
) -> Written:
    """Write a target for each prompt of the held-out splits, and score it.

    The prompts are those of `used`, the references all targets that `whole` has for them.
    `limits` are the tokens of prompt and target together, and the texts that are searched at a
    time.
    """
    found = Written({}, [], [])
    for name in (name for name in used if name != "train"):
        references: dict[str, list[str]] = {}
        for prompt, target in zip(whole[name]["text"], whole[name]["target"], strict=True):
            references.setdefault(prompt, []).append(target)
        first: dict[str, int] = {}
        for row, prompt in enumerate(used[name]["text"]):
            first.setdefault(prompt, row)
        texts = write(task, model, tokenizer, list(first), limits, name)
        found.scores[name], note = sentences.scores(texts, [references[p] for p in first])
        found.notes.extend([note] if note and note not in found.notes else [])
        targets = used[name]["target"][:]
        found.rows.extend(
            {"split": name, "row": row, "label": targets[row], "prediction": text}
            for row, text in zip(first.values(), texts, strict=True)
        )
    return found


def write(
    task: Task,
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    limits: tuple[int, int],
    name: str = "",
) -> list[str]:
    """What the model writes after each prompt, by the beam search that the task names.

    Prompts of one length are searched together, so that none is padded: padding would count among
    the tokens that `limits` allows.
    """
    longest, at_a_time = limits
    options = dict(task.generation or {})
    size = max(1, at_a_time // options.get("num_beams", 1))
    ids = prompts.prompt_ids(texts, tokenizer, longest)
    by_length: dict[int, list[int]] = {}
    for row in range(len(ids)):
        by_length.setdefault(len(ids[row]), []).append(row)
    batches = [
        rows[start : start + size]
        for _, rows in sorted(by_length.items())
        for start in range(0, len(rows), size)
    ]
    model.eval()
    written = [""] * len(ids)
    for rows in tqdm(batches, desc=f"writing {name}", leave=False):
        batch = torch.tensor([ids[row] for row in rows], device=model.device)
        with torch.no_grad():
            out = model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                **options,
                do_sample=False,
                max_length=longest,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=True,
            )
        found = tokenizer.batch_decode(out[:, batch.shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, found, strict=True):
            written[row] = text.strip()
    return written
