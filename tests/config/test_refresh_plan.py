"""The text that says where blocks are refreshed."""

import pytest

from asteria.config.refresh_plan import MEASURING, Choice, is_plan_text, plan_text, read_plan

PLAN = {(768, 3072): Choice("device", "ldlr"), (3, 4, 5): Choice("host", "qr", 20)}


def test_a_plan_is_read_as_it_was_written() -> None:
    assert plan_text(PLAN) == "768x3072 device ldlr; 3x4x5 host qr every 20"
    assert read_plan(plan_text(PLAN)) == PLAN
    assert read_plan(plan_text({})) == {}


def test_a_plan_that_is_yet_to_be_made_has_no_choice() -> None:
    assert read_plan("") == read_plan(MEASURING) == {}
    assert is_plan_text(MEASURING)


@pytest.mark.parametrize(
    "text",
    [None, 3, "x", "768", "768x3072 device", "768x3072 device eigh", "1x2 host qr every 0"]
    + ["1x2 host qr every", "1x2 host qr,", "1x2 host qr;1x2 host qr", " 1x2 host qr"]
    + ["1x2 host qr\n", "1x2 " * 9999],
)
def test_what_is_no_plan_is_known(text: object) -> None:
    assert not is_plan_text(text)


def test_no_plan_is_not_read() -> None:
    with pytest.raises(ValueError, match="no refresh plan: 'host'"):
        read_plan("host")
