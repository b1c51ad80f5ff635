"""The demo fails where a stage has not raised the accuracy as it must."""

from __future__ import annotations

from typing import Any

import pytest

from demo.__main__ import check
from demo.settings import BASE, RAISES, TUNED, DemoError

START = 0.4


def measured(**changed: float) -> list[dict[str, Any]]:
    """Just enough of a raise in every stage; `changed`: the sampled accuracy of some."""
    sampled = {BASE: 0.1, TUNED: START} | {name: START + least + 0.01 for name, least in RAISES.items()} | changed
    return [{"name": name, "greedy": found, "sampled": found} for name, found in sampled.items()]


def test_enough_everywhere() -> None:
    check(measured())


def test_the_short_demo_has_no_later_stages() -> None:
    check([each for each in measured() if each["name"] in (BASE, TUNED)])


@pytest.mark.parametrize("name", RAISES)
def test_a_later_stage_that_raises_too_little(name: str) -> None:
    with pytest.raises(DemoError, match=f"{name} should raise the accuracy"):
        check(measured(**{name: START + RAISES[name]}))


def test_fine_tuning_that_raises_nothing() -> None:
    with pytest.raises(DemoError, match=r"fine-tuning did not raise the accuracy \(40% before, 40% after\)"):
        check(measured(**{BASE: START}))
