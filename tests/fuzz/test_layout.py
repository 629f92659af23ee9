"""Layout strings of any kind: a layout that fits the model, or one message; never a long string or a long wait."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ross.config.layout import StageLayout, parse_layout
from tests.helpers.hostile import at_most, attempt

PIECES = ["V", "E", "t", "N", "D", "H", "|", "*", "(", ")", ",", " ", "0", "2", "9", "t*2", "tt|", ")*2", "x", "²", "٣"]


def _layout(text: str, pipeline: int) -> StageLayout:
    return parse_layout(text, num_layers=4, pipeline_model_parallel_size=pipeline, has_denoiser=True)


def _parse(text: str, pipeline: int = 2) -> str | None:
    with at_most(16):
        layout, message = attempt(ValueError, _layout, text, pipeline)
    if layout is None:
        assert message.startswith("layout=")
        assert len(message) < 1000
        return message
    assert sum(stage.num_layers for stage in layout.stages) == 4
    return None


@given(text=st.lists(st.sampled_from(PIECES), max_size=30).map("".join), pipeline=st.integers(1, 5))
@example(text="VEtt|ttNDH", pipeline=2)
@example(text="(t)*0", pipeline=1)
def test_strings_of_the_layout_alphabet(text: str, pipeline: int) -> None:
    _parse(text, pipeline)


@given(text=st.text(max_size=60))
def test_any_text(text: str) -> None:
    _parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "t*999999999999",
        "t*" + "9" * 5000,
        "(tt|)*99999999999",
        "(" * 20 + "t" + ")*9" * 20,
        "((((t)*9000)*9000)*9000)*9000",
        "t*5000" * 100,
        "|" * 10_000_000,
    ],
    ids=["letter", "digits", "group", "nested", "nested large", "many", "long"],
)
def test_what_unfolds_without_end_is_refused(text: str) -> None:
    message = _parse(text)
    assert message is not None
    assert "stands for more than 8192 letters" in message


def test_a_layout_that_fits_is_accepted() -> None:
    assert _parse("VEt*2|(t)*2NDH") is None
