import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroll.optim import Plateau
from reroll.specs.base import change
from reroll.specs.optim import SCHEDULES, Cosine, Linear, ScheduleSpec


@given(
    steps=st.integers(1, 300),
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 50),
    warmdown=st.none() | st.integers(1, 400),
    floor=st.floats(0, 1),
)
def test_multipliers_stay_in_bounds_and_never_rise_after_the_warm_up(steps, shape, warmup, warmdown, floor):
    schedule = change(ScheduleSpec(warmup=warmup), shape, SCHEDULES)
    falling = {name: value for name, value in (("warmdown", warmdown), ("floor", floor)) if hasattr(schedule, name)}
    schedule = replace(schedule, **falling)
    values = [schedule(t, steps) for t in range(steps + 20)]
    assert all(0 <= v <= 1 for v in values)
    after = values[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert values[:warmup] == [(t + 1) / warmup for t in range(warmup)][: len(values)]
    if shape != "constant" and warmup < steps:
        assert values[-1] == pytest.approx(floor)


def test_cosine_is_a_half_wave():
    schedule = Cosine(warmup=1, floor=0.1)
    for t in range(1, 101):
        assert schedule(t, 101) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 1) / 100)))


def test_linear_without_warmdown_falls_from_the_start():
    assert [Linear()(t, 4) for t in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_plateau_halves_only_without_progress():
    plateau = Plateau(patience=5)
    assert all(plateau.see(10 * 0.8**t) == 1 for t in range(50))
    plateau = Plateau(patience=5)
    multipliers = [plateau.see(1.0) for _ in range(16)]
    assert multipliers == [1.0] * 5 + [0.5] * 5 + [0.25] * 5 + [0.125]
    assert Plateau(patience=0).see(1.0) == 1.0


def test_plateau_resumes_and_ignores_what_is_not_finite():
    a, b = Plateau(patience=3), Plateau(patience=3)
    losses = [3.0, 2.9, math.nan, 2.9, 2.9, 2.9, math.inf, 2.9, 2.9]
    for loss in losses[:4]:
        a.see(loss)
    b.load_state_dict(a.state_dict())
    assert [a.see(x) for x in losses[4:]] == [b.see(x) for x in losses[4:]]
