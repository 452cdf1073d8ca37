"""Times of CUDA-graph replays, predicted from datasheets, and their error on measured cards.

The model is `lora_kernels.hardware.cost`, which `choose` uses. It needs the attainable shares of
the datasheet's numbers: those that the kernel suite measured on the card, else the median over all
measured cards, else the assumptions of the model. What stays in cache between kernels is not
modelled, so the prediction is too high where x and y fit in L2 (marked *).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lora_kernels.hardware import cost
from lora_kernels.hardware.cards import CARDS, Card, card_of

from . import cases
from .cases import DTYPES, LAYERS, Case
from .costs import PROVIDERS, launches_of
from .records import RESULTS, Row, every_row

TRITON = ("split", "fused", "hybrid")


class Efficiency(NamedTuple):
    """Attainable shares of the datasheet's bandwidth and matrix rate, and their source."""

    memory: float
    rate: float
    source: str


@dataclass(frozen=True)
class Prediction:
    """A provider's time in a case on a card, in microseconds, and how many launches it has."""

    microseconds: float
    launches: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench roofline`."""
    parser.add_argument("--gpu", help=f"one of {', '.join(CARDS)} (default: all)")
    parser.add_argument("--case", action="append", help="a layer's name (default: the goals')")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--dtype", choices=cases.DTYPES, default="bfloat16")
    parser.add_argument("--kernels", action="store_true", help="list each kernel's bytes and FLOPs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")


def run(arguments: argparse.Namespace) -> int:
    """Print the predictions, then their error wherever a card was measured."""
    if arguments.gpu and card_of(arguments.gpu) is None:
        raise ValueError(f"no datasheet row for {arguments.gpu!r}: one of {', '.join(CARDS)}")
    names = arguments.case or list(dict.fromkeys(n for g in cases.GOALS for n in g.layers))
    unknown = [name for name in names if name not in LAYERS]
    if unknown:
        raise ValueError(f"unknown layer {unknown[0]!r}: one of {', '.join(LAYERS)}")
    size = (arguments.tokens, arguments.rank, arguments.dropout, arguments.dtype)
    chosen = [Case(LAYERS[name], *size) for name in names]
    measured = [row for row in every_row("kernels", arguments.results) if row["device"] == "cuda"]
    chosen_card = card_of(arguments.gpu) if arguments.gpu else None
    for card in [chosen_card] if chosen_card else CARDS.values():
        print(table(card, chosen, efficiency(card, arguments.dtype, measured)))
        if arguments.kernels:
            print("\n".join(kernel_lines(card, chosen[0])))
    print(errors(measured))
    return 0


def efficiency(card: Card, dtype: str, measured: Iterable[Row]) -> Efficiency:
    """The shares measured on the card, else the median of other cards, else the assumed ones."""
    shares: dict[str, tuple[list[float], list[float]]] = {}
    for row in measured:
        other = card_of(row["gpu"])
        if other is not None and row["dtype"] == dtype and row.get("matrix_tflops"):
            memory, rate = shares.setdefault(other.name, ([], []))
            memory.append(row["copy_gb_per_s"] / other.memory)
            rate.append(row["matrix_tflops"] / _rate(other, dtype))
    medians = {
        name: (statistics.median(memory), statistics.median(rate))
        for name, (memory, rate) in shares.items()
    }
    if card.name in medians:
        return Efficiency(*medians[card.name], f"measured on {card.name}")
    if medians:
        memory, rate = (statistics.median(values) for values in zip(*medians.values(), strict=True))
        return Efficiency(memory, rate, f"measured on {', '.join(medians)}")
    source = "assumed: no card has been measured"
    return Efficiency(cost.MEMORY_SHARE, cost.VENDOR_SHARE, source)


def _rate(card: Card, dtype: str) -> float:
    return card.rate(DTYPES[dtype], tf32=dtype == "tf32")


def predict(
    card: Card, provider: str, case: Case, direction: str, share: Efficiency
) -> Prediction | None:
    """The time of a provider; None if its launches are unknown or the card cannot run it."""
    if provider not in PROVIDERS or refusal(card, provider, case):
        return None
    launches = launches_of(provider, case, direction, card)
    time = cost.microseconds(
        launches, card, case.torch_dtype, tf32=case.dtype == "tf32",
        memory=share.memory, vendor=share.rate,
    )  # fmt: skip
    return Prediction(time, len(launches))


def refusal(card: Card, provider: str, case: Case) -> str | None:
    """Why a card cannot run a provider in a case; None if it can."""
    if card.arch == "sm_75" and case.dtype == "bfloat16":
        return "no fast bfloat16 on sm_75"
    if card.arch == "sm_75" and provider in TRITON:
        return "Triton has no matrix instructions for sm_75"
    return None


def table(card: Card, chosen: Sequence[Case], share: Efficiency) -> str:
    """Forward + backward: microseconds of the floor, then each provider's time over the floor's."""
    lines = [
        f"\n{card.name} ({card.arch}): PREDICTION, not a measurement",
        f"  {card.memory:g} GB/s x {share.memory:.2f}, {_rate(card, chosen[0].dtype):g} TFLOP/s x "
        f"{share.rate:.2f} ({share.source}); {cost.GAP_US:g} us a launch; datasheet: {card.source}",
        f"  {'forward + backward':<46}{'floor us':>10}"
        + "".join(f"{name:>19}" for name in PROVIDERS if name != "floor"),
    ]
    for case in chosen:
        found = {name: predict(card, name, case, "forward_backward", share) for name in PROVIDERS}
        floor = found.pop("floor")
        if floor is None:
            lines.append(f"  {case!s:<46}{refusal(card, 'floor', case)}")
            continue
        width = case.layer.K + sum(case.layer.N)
        in_cache = case.M * width * case.torch_dtype.itemsize < card.cache * 2**20
        cells = "".join(
            f"{'-' if p is None else f'{p.microseconds / floor.microseconds:.2f} x':>19}"
            for p in found.values()
        )
        title = f"{case} {'*' if in_cache else ' '}"
        lines.append(f"  {title:<46}{floor.microseconds:>10.1f}{cells}")
    return "\n".join(lines)


def kernel_lines(card: Card, case: Case) -> list[str]:
    """Each launch of each provider in one case, as declared."""
    lines = [f"\n  declared for {case}, forward + backward"]
    for name in PROVIDERS:
        launches = launches_of(name, case, "forward_backward", card)
        total = sum(launch.bytes for launch in launches) / 1e6
        lines.append(f"  {name}: {len(launches)} launches, {total:.1f} MB")
        lines += [
            f"    {each.kernel:<18}{each.bytes / 1e6:>10.2f} MB{each.flops / 1e9:>10.2f} GFLOP"
            for each in launches
        ]
    return lines


def errors(measured: Sequence[Row]) -> str:
    """How far the predictions are off, by card and provider, where rows were measured."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in measured:
        card = card_of(row["gpu"])
        if card is None or row["mode"] != "graph" or not row.get("median_us"):
            continue
        case = case_of(row)
        if case is None:
            continue
        share = efficiency(card, row["dtype"], measured)
        predicted = predict(card, row["provider"], case, row["direction"], share)
        if predicted is not None:
            error = predicted.microseconds / row["median_us"] - 1
            found.setdefault((card.name, row["provider"]), []).append(error)
    if not found:
        return "\nchecked against no card: there are no GPU results yet"
    lines = ["\nerror of the predictions where measured (predicted / measured - 1)"]
    for (card_name, provider), values in found.items():
        size = statistics.median(map(abs, values))
        lines.append(
            f"  {card_name:<14}{provider:<20}median {statistics.median(values):+.0%}, median size "
            f"{size:.0%}, from {min(values):+.0%} to {max(values):+.0%} over {len(values)} rows"
        )
    return "\n".join(lines)


def case_of(row: Row) -> Case | None:
    """The case of a result row; None if its layer is no longer a row."""
    layer = LAYERS.get(row["case"])
    if layer is None:
        return None
    return Case(layer, row["M"], row["R"], row["dropout"], row["dtype"])
