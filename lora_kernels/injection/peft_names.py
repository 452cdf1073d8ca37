"""PEFT's rules for names: which modules of a model its `LoraConfig` means, and the names to write.

PEFT compares names by rules of its own: regular expressions here, ends of strings there, and the
task heads that its model classes train unasked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .expressions import fullmatch
from .targets import inside, layer_index

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


# What PEFT cannot train in full, since it cannot be called.
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def peft_matches(config: Mapping[str, Any], path: str) -> bool:
    """Whether a PEFT configuration puts LoRA on the module at `path`.

    `exclude_modules` and `modules_to_save` go before `target_modules`. If that is a string, it is a
    regular expression for the whole path. If it is a list, it holds paths or dotted suffixes;
    `layers_to_transform`, if given, says of which layers. Names in `modules_to_save` and
    `layers_pattern` are taken as they are.
    """
    if excluded := config.get("exclude_modules"):
        if isinstance(excluded, str):
            if fullmatch(excluded, path):
                return False
        elif _is_suffix(excluded, path):
            return False
    if any(f".{name}." in f".{path}." for name in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return fullmatch(targets, path)
    if path in targets:
        return True
    indices = config.get("layers_to_transform")
    if not _is_suffix(targets, path) or indices in (None, []):
        return _is_suffix(targets, path)
    patterns = config.get("layers_pattern") or [None]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        name = () if pattern is None else (re.escape(pattern),)
        if (index := layer_index(path, *name)) is not None:
            return index in ([indices] if isinstance(indices, int) else indices)
    return False


def trained_by_peft(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules that `modules_to_save` means: the outermost ones whose paths end in a name."""
    ends = tuple(names)
    every = model.named_modules(remove_duplicate=False)
    paths = [path for path, _ in every if path and path.endswith(ends)]
    return [path for path in paths if inside(path, paths) == path]


def _task(model: nn.Module) -> str | None:
    """PEFT's task type of a model, by the end of its class's name.

    None where PEFT's class for that task would call the model otherwise than it is called: models
    that generate text from sound or pictures, or without an encoder (Whisper, LLaVA).
    """
    ends = (task for end, task in TASK_TYPES.items() if type(model).__name__.endswith(end))
    task = next(ends, None)
    if task == "SEQ_2_SEQ_LM":
        config = getattr(model, "config", None)
        reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
        task = task if reads_text and getattr(config, "is_encoder_decoder", True) else None
    return task


def names_for_peft(model: nn.Module, layers: set[str], train: Iterable[str]) -> dict[str, Any]:
    """The fields by which PEFT finds `layers`, and trains `train` in full, and nothing else.

    `modules_to_save` is None where PEFT cannot train exactly `train`: a name in it means all paths
    that end so, and no container. PEFT then takes their values from the file, and trains none.
    """
    guess = _task(model)
    train = sorted(train)
    modules = [model.get_submodule(path) for path in train]
    shared = twice(model)
    exact = not any(isinstance(module, _CONTAINERS) for module in modules)
    exact &= not any(id(part) in shared for module in modules for part in module.modules())
    for task in dict.fromkeys((guess, None)):
        saved = (*train, *TASK_HEADS.get(task or "", ()))
        target = _target(model, layers, saved)
        if exact and target and trained_by_peft(model, saved) == _in_order(model, train):
            return _fields(model, task, target, train or None)
    return _fields(model, None, _target(model, layers, ()), None)


def twice(model: nn.Module) -> dict[int, str]:
    """id -> first path of each module that hangs in the model more than once."""
    first = {id(module): path for path, module in model.named_modules()}
    every = model.named_modules(remove_duplicate=False)
    return {id(module): first[id(module)] for path, module in every if first[id(module)] != path}


def _in_order(model: nn.Module, paths: list[str]) -> list[str]:
    return [path for path, _ in model.named_modules() if path in paths]


def _target(model: nn.Module, layers: set[str], saved: tuple[str, ...]) -> Any:
    """The shortest `target_modules` that means `layers` alone; None if `saved` excludes some."""
    paths = [path for path, _ in model.named_modules() if path]
    short = sorted({path.split(".")[-1] for path in layers})
    regex = "|".join(re.escape(path) for path in sorted(layers))
    for target in (short, sorted(layers), regex):
        config = {"target_modules": target, "modules_to_save": saved}
        if {path for path in paths if peft_matches(config, path)} == layers:
            return target
    return None


def _fields(model: nn.Module, task: str | None, target: Any, saved: Any) -> dict[str, Any]:
    # FSDP2 puts a class of its own before the model's.
    cls = next(c for c in type(model).__mro__ if not c.__module__.startswith("torch.distributed"))
    mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return {
        "target_modules": target,
        "task_type": task,
        "auto_mapping": None if task else mapping,
        "modules_to_save": saved,
    }


def by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first expression that matches a dotted suffix."""
    for pattern, value in (patterns or {}).items():
        if fullmatch(pattern, path, after=r"(?:.*\.)?"):
            return value
    return default


def exactly(path: str) -> str:
    """The expression by which `by_pattern` finds `path` alone."""
    return "^" + re.escape(path)


def _is_suffix(names: Iterable[str], path: str) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)
