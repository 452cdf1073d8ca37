"""Expressions of unknown origin match as `re` matches, and in a bounded time."""

from __future__ import annotations

import random
import re
import time

import pytest

from lora_kernels.injection.expressions import check_expression, fullmatch

ATOMS = (
    "a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", r"\w", "0", r"\b", r"\B", "^", "$", "(?=a)",
    "(?!b)", "(?<=a)", "(?<!b)", r"\W", "[a-c0-1_]", r"[\d.]", r"[^\W_]", r"\Z",
)  # fmt: skip
REPEATS = ("*", "+", "?", "*?", "{1,2}", "{2}", "{0,3}?", "{2,}")


def expression(draw: random.Random, depth: int) -> str:
    kind = draw.random() if depth else 0.0
    if kind < 0.35:
        return draw.choice(ATOMS)
    first = expression(draw, depth - 1)
    if kind < 0.6:
        return first + expression(draw, depth - 1)
    if kind < 0.75:
        return f"(?:{first}|{expression(draw, depth - 1)})"
    return f"({first}){draw.choice(REPEATS)}"


def test_random_expressions_match_as_re_does():
    draw = random.Random(1)
    matched = 0
    for _ in range(4000):
        pattern = expression(draw, 4)
        text = "".join(draw.choice("ab.01_\n") for _ in range(draw.randint(1, 7)))
        expected = re.fullmatch(pattern, text) is not None
        assert fullmatch(pattern, text) == expected, (pattern, text)
        matched += expected
    assert matched > 200


@pytest.mark.parametrize(
    "pattern, matching",
    [
        (r".*\.layers\.(\d+)\.(self_attn|mlp)\.(q_proj|up_proj)", True),
        (r"(?:.*?(?:language|layers).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|\bx\b", True),
        (r"^(model(?=\.).*\.(q_proj|k_proj))$", True),
        (r"(?!.*layers).*q_proj", False),
        ("q_proj", False),
    ],
)
def test_expressions_of_real_configurations(pattern, matching):
    path = "model.layers.11.self_attn.q_proj"
    assert fullmatch(pattern, path) == matching == (re.fullmatch(pattern, path) is not None)
    assert fullmatch("q_proj", path, after=r"(?:.*\.)?") and not fullmatch("j", path, after=".*x")


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "a*" * 40 + "b", "(a{1,1000000000})*b", "((((a*)*)*)*)*b",
     "(a?){60}a{60}b", "(?=(a+)+b)a*", "(?:){999999999}b", "(a|aa){2000000000}"],
)  # fmt: skip
def test_no_expression_takes_long(pattern):
    start = time.perf_counter()
    assert not fullmatch(pattern, "a" * 100)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "pattern",
    ["(", "*", "[a-", r"(a)\1", "(?i)a", "(?i:a)", "(" * 60 + "a" + ")" * 60, "(" * 5000],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_in_one_line(pattern):
    with pytest.raises(ValueError) as caught:
        check_expression(pattern)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
