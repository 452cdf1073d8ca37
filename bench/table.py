"""Measured rows as text: one case, and the table of goals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .cases import GOALS, Case, Goal
from .records import Row
from .timing import is_tie


def print_case(case: Case, rows: Sequence[Row]) -> None:
    """Print the rows of one case: time, spread, and ratios to the floor and to eager PEFT."""
    print(f"\n{case}")
    for key in dict.fromkeys((row["direction"], row["mode"]) for row in rows):
        same = [row for row in rows if (row["direction"], row["mode"]) == key]
        peft = next((row for row in same if row["provider"] == "peft"), None)
        print(f"  {key[0].replace('_', ' + ')}, {key[1]}")
        for row in same:
            print(f"    {row['provider']:<26}{_line(row, peft)}")


def _line(row: Row, peft: Row | None) -> str:
    if row.get("median_us") is None:
        return f"{row['status']}: {row['reason']}"
    text = f"{row['median_us']:>11.1f} us  ({row['p20_us']:.1f} - {row['p80_us']:.1f})"
    if row.get("floor_ratio"):
        text += f"  {row['floor_ratio']:5.2f} x floor"
    if peft is not None and row["provider"] not in ("peft", "floor"):
        text += f"  PEFT / this: {speed_up(row, peft)}"
    return text


def speed_up(row: Row, peer: Row | None) -> str:
    """The peer's time over the row's; "tie" within the noise, "-" where one is not measured."""
    if peer is None or not (row.get("median_us") and peer.get("median_us")):
        return "-"
    a, b = row["median_us"], peer["median_us"]
    if is_tie(a, b, row["noise"], peer["noise"]):
        return "tie"
    return f"{b / a:.2f}"


def goals_table(rows: Iterable[Row]) -> str:
    """Each goal beside the worst of its measured cases; "-" if none is measured."""
    index = {
        (row["case"], row["M"], row["provider"]): row
        for row in rows
        if (row["dtype"], row["dropout"], row["R"]) == ("bfloat16", 0.1, 16)
        and (row["direction"], row["mode"]) == ("forward_backward", "graph")
        and row["device"] == "cuda"
        and row.get("median_us")
    }
    if not index:
        return "\ngoals: no GPU rows yet"
    lines = [
        f"\n{'goal (worst case measured / goal)':<48}{'x floor':>16}{'PEFT':>16}{'compiled':>16}"
    ]
    return "\n".join(lines + [_goal_line(goal, index) for goal in GOALS])


def _goal_line(goal: Goal, index: dict[tuple[str, int, str], Row]) -> str:
    over_floor: list[float] = []
    ratios: dict[str, list[float]] = {"peft": [], "peft-compile": []}
    for name in goal.layers:
        for M in goal.tokens:
            ours = index.get((name, M, "auto"))
            if ours and ours.get("floor_ratio"):  # over the floor of the same run
                over_floor.append(ours["floor_ratio"])
            for peer, found in ratios.items():
                row = index.get((name, M, peer))
                if ours and row:
                    found.append(row["median_us"] / ours["median_us"])
    cells = (
        _cell(max(over_floor, default=None), goal.floor),
        _cell(min(ratios["peft"], default=None), goal.peft),
        _cell(min(ratios["peft-compile"], default=None), goal.compiled),
    )
    return f"{goal.title:<48}" + "".join(f"{cell:>16}" for cell in cells)


def _cell(measured: float | None, goal: float) -> str:
    return f"{'-' if measured is None else f'{measured:.2f}'} / {goal}"
