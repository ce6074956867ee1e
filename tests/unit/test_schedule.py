import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroll.errors import UsageError
from reroll.optim import Plateau, Schedule


@given(
    steps=st.integers(1, 300),
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 50),
    warmdown=st.none() | st.integers(1, 400),
    floor=st.floats(0, 1),
)
def test_multipliers_stay_in_bounds_and_never_rise_after_the_warm_up(steps, shape, warmup, warmdown, floor):
    schedule = Schedule(steps, shape, warmup, warmdown, floor)
    values = [schedule(t) for t in range(steps + 20)]
    assert all(0 <= v <= 1 for v in values)
    after = values[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert values[:warmup] == [(t + 1) / warmup for t in range(warmup)][: len(values)]
    if shape != "constant" and warmup < steps:
        assert values[-1] == pytest.approx(floor)


def test_cosine_is_a_half_wave():
    schedule = Schedule(101, "cosine", warmup=1, floor=0.1)
    for t in range(1, 101):
        assert schedule(t) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 1) / 100)))


def test_linear_without_warmdown_falls_from_the_start():
    assert [Schedule(4, "linear")(t) for t in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(steps=0), "steps=0"),
        (dict(steps=3, shape="step"), 'schedule="step" must be constant, linear, cosine'),
        (dict(steps=3, warmup=-1), "warmup=-1"),
        (dict(steps=3, floor=2), "floor=2"),
    ],
)
def test_bad_schedules_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        Schedule(**arguments)
