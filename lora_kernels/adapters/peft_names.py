"""PEFT's rules for names: which modules of a model its `LoraConfig` means, and the names to write.

PEFT compares names by rules of its own: regular expressions here, ends of strings there, and the
task heads that its model classes train unasked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..injection.targets import inside

# End of a model class's name -> PEFT's task type.
TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
# What PEFT's model class for a task trains in full unasked, and then expects in the file.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def peft_matches(config: Mapping[str, Any], path: str) -> bool:
    """Whether a PEFT configuration puts LoRA on the module at `path`.

    `exclude_modules` and `modules_to_save` go before `target_modules`. If that is a string, it is a
    regular expression for the whole path. If it is a list, it holds paths or dotted suffixes;
    `layers_to_transform`, if given, says of which layers.
    """
    if excluded := config.get("exclude_modules"):
        if isinstance(excluded, str):
            if re.fullmatch(excluded, path):
                return False
        elif _is_suffix(excluded, path):
            return False
    if any(
        re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.get("modules_to_save") or ()
    ):
        return False
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    indices = config.get("layers_to_transform")
    if not _is_suffix(targets, path) or indices in (None, []):
        return _is_suffix(targets, path)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(found[1]) in ([indices] if isinstance(indices, int) else indices)
    return False


def trained_by_peft(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules that `modules_to_save` means: the outermost ones whose paths end in a name."""
    ends = tuple(names)
    paths = [path for path, _ in model.named_modules() if path and path.endswith(ends)]
    return [path for path in paths if inside(path, paths) == path]


def names_for_peft(model: nn.Module, layers: set[str], train: list[str]) -> dict[str, Any]:
    """The task_type and target_modules by which PEFT finds `layers` and `train`, nothing else."""
    guess = next(
        (task for end, task in TASK_TYPES.items() if type(model).__name__.endswith(end)), None
    )
    paths = [path for path, _ in model.named_modules() if path]
    # PEFT copies all modules whose paths end in a name of `train`. These may be more than the model
    # trains; all of them are saved.
    copied = set(trained_by_peft(model, train))
    cls = type(model)
    for task in dict.fromkeys((guess, None)):
        saved = (*train, *TASK_HEADS.get(task or "", ()))
        if set(trained_by_peft(model, saved)) != copied:
            continue
        short = sorted({path.split(".")[-1] for path in layers})
        regex = "|".join(re.escape(path) for path in sorted(layers))
        for target in (short, sorted(layers), regex):
            config = {"target_modules": target, "modules_to_save": saved}
            if {path for path in paths if peft_matches(config, path)} == layers:
                mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
                return {
                    "target_modules": target,
                    "task_type": task,
                    "auto_mapping": None if task else mapping,
                }
    raise ValueError(
        f"no PEFT configuration names exactly {sorted(layers)[:3]}... and trains {train}"
    )


def by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first expression that matches a dotted suffix."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def exactly(path: str) -> str:
    """The expression by which `by_pattern` finds `path` alone."""
    return "^" + re.escape(path)


def _is_suffix(names: Iterable[str], path: str) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)
