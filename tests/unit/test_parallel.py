"""Parallel evaluation along time: counts, limits and failures that the literature states."""

import math

import pytest
import torch

from reroll.cells import ARGRU, GRU, Lorenz96, MeanField, cell_from
from reroll.errors import UsageError
from reroll.outcome import Outcome
from reroll.rollout import (
    Kalman,
    Sequential,
    auto,
    deer,
    elk,
    jacobi,
    lyapunov,
    memory,
    predictability,
    quasi_deer,
    quasi_elk,
    verify_agreement,
)  # fmt: skip
from reroll.rollout.damping import Undamped
from reroll.rollout.linearise import Transition
from reroll.rollout.monitor import monitoring


@torch.no_grad()
def test_smoother_is_levenberg_marquardt():
    """The correction solves (JᵀJ + 1/σ²) δ = Jᵀr, J the matrix of δ_t − A_t δ_{t−1}."""
    size, time, variance = 3, 20, 1 / 0.3
    a = torch.randn(size, size, time, 1, dtype=torch.float64)
    a[:, :, 0] = 0
    r = torch.randn(size, time, 1, dtype=torch.float64)
    jacobian = torch.eye(size * time, dtype=torch.float64)
    for t in range(1, time):
        jacobian[t * size : (t + 1) * size, (t - 1) * size : t * size] = -a[:, :, t, 0]
    left = jacobian.T @ jacobian + torch.eye(size * time, dtype=torch.float64) / variance
    truth = torch.linalg.solve(left, jacobian.T @ r[:, :, 0].T.reshape(-1)).view(time, size).T
    found = Kalman(variance, smoother=True).correct(Transition("dense", a), r, None)
    torch.testing.assert_close(found[:, :, 0], truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
@torch.no_grad()
def test_without_distrust_the_filter_is_newton(kind):
    a = torch.randn(*((3,) if kind == "diagonal" else (3, 3)), 40, 2, dtype=torch.float64) * 0.4
    a[..., 0, :] = 0
    r = torch.randn(3, 40, 2, dtype=torch.float64)
    plain = Undamped().correct(Transition(kind, a), r, None)
    for smoother in (False, True):
        found = Kalman(1e12, smoother=smoother).correct(Transition(kind, a), r, None)
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)
    assert torch.equal(Kalman(math.inf).correct(Transition(kind, a), r, None), plain)


@torch.no_grad()
def test_an_adaptive_variance_recovers_from_a_bad_one():
    torch.manual_seed(0)
    cell, x = GRU(3, 3).double(), torch.randn(2, 100, 3, dtype=torch.float64)
    fixed = quasi_elk(0.05, max_iterations=40)(cell, x)
    adaptive = quasi_elk(0.05, adaptive=True, max_iterations=40)(cell, x)
    assert not fixed.converged.any()
    assert bool(adaptive.converged.all())


@torch.no_grad()
def test_lyapunov_exponents_that_are_known():
    x = torch.zeros(2, 400, 3, dtype=torch.float64)
    rates = torch.tensor([0.3, 0.9, 0.5], dtype=torch.float64)
    found = lyapunov(cell_from(lambda u, s: rates * s + u, 3), x)
    torch.testing.assert_close(found, torch.full((2,), math.log(0.9), dtype=torch.float64), rtol=0, atol=0.02)
    logistic = cell_from(lambda u, s: 4 * s * (1 - s), 1)  # exponent log 2
    start = torch.full((1, 1), 0.3123, dtype=torch.float64)
    found = lyapunov(logistic, torch.zeros(1, 20_000, 1, dtype=torch.float64), start)
    torch.testing.assert_close(found, torch.full((1,), math.log(2.0), dtype=torch.float64), rtol=0, atol=0.02)


@torch.no_grad()
def test_predictability_says_what_to_use():
    torch.manual_seed(0)
    forgets = predictability(GRU(4, 4), torch.randn(2, 2000, 4))
    assert forgets.exponent < 0
    assert max(forgets.expected_iterations.values()) < 40
    assert "forgets" in str(forgets)
    chaotic = predictability(MeanField(32, 4.0), torch.randn(1, 600, 32) * 0.1)
    assert chaotic.exponent > 0
    assert chaotic.rollout == Sequential()
    assert min(chaotic.expected_iterations.values()) > 100


def test_agreement_notices_a_wrong_rollout():
    class Shifted(Sequential):
        def __call__(self, cell, inputs, state=None, reset=None):
            found = super().__call__(cell, inputs, state, reset)
            return found._replace(states=found.states * 1.01)

    torch.manual_seed(0)
    assert not verify_agreement(Shifted(), GRU(3, 3), torch.randn(2, 9, 3)).ok
    assert "DOES NOT AGREE" in str(verify_agreement(Shifted(), GRU(3, 3), torch.randn(2, 9, 3)))


@torch.no_grad()
def test_a_watch_sees_iterations_and_hands_on_guesses():
    cell, x = GRU(3, 3).double(), torch.randn(2, 50, 3, dtype=torch.float64)
    with monitoring(keep=True) as first:
        quasi_deer()(cell, x)
    with monitoring(guesses=first.trajectories) as second:
        quasi_deer()(cell, x)
        elk(max_iterations=1)(cell, x)
    assert first.iterations > 3
    assert second.calls == 2
    assert second.fell_back == 2
    with monitoring(guesses=first.trajectories) as third:
        quasi_deer()(cell, x)
    assert third.iterations <= 2


@torch.no_grad()
def test_auto_takes_the_loop_for_short_sequences_and_says_which():
    from reroll.kernels import dispatch

    cell = GRU(3, 3)
    assert auto().choose(cell, torch.randn(2, 20, 3)) == Sequential()
    assert dispatch.report()["rollout"].reason
    assert auto()(cell, torch.randn(2, 20, 3)).outcome is Outcome.ok


@pytest.mark.parametrize("rollout", [deer(), quasi_deer(), elk(), jacobi(max_iterations=300)])
@torch.no_grad()
def test_what_is_not_a_number_never_counts_as_converged(rollout):
    torch.manual_seed(0)
    cell, x = GRU(3, 5), torch.randn(2, 1000, 3)
    x[1, 500, 0] = torch.nan
    found, expected = rollout(cell, x), Sequential(kernel="reference")(cell, x)
    assert found.outcome is Outcome.fell_back
    assert found.converged.tolist() == [True, False]
    torch.testing.assert_close(found.states, expected.states, rtol=0, atol=1e-4, equal_nan=True)
    assert bool(found.states[1, 500:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_a_diverged_iterate_does_not_hide_where_the_exact_part_ends(dtype):
    cell = Lorenz96()
    first = torch.tensor([[8.0, 8.1, 7.9, 8.0, 8.2]], dtype=dtype)
    x = torch.zeros(1, 150, 1, dtype=dtype)
    expected = Sequential()(cell, x, first).states
    for rollout in (deer(max_iterations=5), quasi_deer(max_iterations=5)):
        found = rollout(cell, x, first)
        assert found.outcome is Outcome.fell_back
        torch.testing.assert_close(found.states, expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 2e-2)


def packed(u, s):
    a = torch.sigmoid(s)
    b = torch.tanh(0.5 * a)
    c = torch.tanh(0.3 * b)
    p = torch.sigmoid(2 * c)
    return torch.tanh(torch.nn.functional.linear(torch.cat([p, torch.tanh(p)], -1), WIDE.to(s.dtype)) + u)


WIDE = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)) * 0.15
ODD_STEPS = {
    "ranges of two writers": packed,
    "subtract": lambda u, s: torch.subtract(u, 0.3 * s),
    "not equal": lambda u, s: torch.tanh(0.5 * s * (u[..., :1].round() != 1) + u),
    "where on the state": lambda u, s: 0.3 * s + torch.where(s > 0, u, -u),
    "a mask of the state": lambda u, s: u * (s > -0.2),
    "in place": lambda u, s: torch.tanh(u).add_(0.5 * s),
    "sign": lambda u, s: 0.3 * torch.tanh(s) + 0.2 * torch.sign(s) + u,
    "a growing feature": lambda u, s: torch.cat([s[:, :1] + 1, torch.tanh(0.95 * s[:, 1:].roll(1, -1) + u[:, 1:])], -1),
}


@pytest.mark.parametrize("name", ODD_STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_steps_that_are_easily_misread(name, dtype):
    torch.manual_seed(0)
    cell, x = cell_from(ODD_STEPS[name], 5), torch.randn(3, 301, 5, dtype=dtype)
    expected = Sequential()(cell, x).states
    for rollout in (jacobi(max_iterations=400), quasi_deer(max_iterations=400), deer(max_iterations=400)):
        found = rollout(cell, x)
        torch.testing.assert_close(found.states, expected, rtol=1e-4, atol=2e-3 if dtype == torch.float32 else 1e-6)


@torch.no_grad()
def test_no_sequences_and_other_defaults():
    cell = GRU(3, 5)
    assert quasi_deer()(cell, torch.zeros(0, 7, 3)).states.shape == (0, 7, 5)
    x = torch.randn(2, 900, 3)
    expected = quasi_deer()(cell, x).states
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(quasi_deer()(cell, x).states, expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        found = quasi_deer()(ARGRU(), torch.randn(1, 400, 1))
    assert bool(found.converged.all())


def test_a_containers_limit_counts_as_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    free = memory.memory_left(torch.device("cpu"))
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.memory_left(torch.device("cpu")) > free / 2
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.memory_left(torch.device("cpu")) == 4000


@torch.no_grad()
def test_jacobians_beyond_memory_are_refused_with_their_size(monkeypatch):
    assert 1 << 20 < memory.memory_left(torch.device("cpu")) < 1 << 50
    monkeypatch.setattr(memory, "memory_left", lambda device: 10**9)
    cell, x = cell_from(lambda u, s: 0.5 * s + u, 512), torch.zeros(4, 400, 512)
    needed = r"4 sequences × 400 steps × 512² numbers.* 5,033,164,800 bytes; 1,000,000,000 are free"
    with pytest.raises(UsageError, match=needed + r". Use quasi_deer\(\), or a shorter window \(window=79\)"):
        deer(window=None)(cell, x)
    with pytest.raises(UsageError, match=r"10,066,329,600 bytes.* Use quasi_elk\(\), .*window=39"):
        elk(window=None)(cell, x)
    assert bool(deer(window=79)(cell, x).converged.all())
    assert bool(quasi_deer(window=None)(cell, x).converged.all())


@torch.no_grad()
def test_dropout_that_begins_later_is_noticed():
    dropout = torch.nn.Dropout(0.5).eval()
    cell = cell_from(lambda u, s: dropout(torch.tanh(0.5 * s + u)), 4, module=dropout)
    quasi_deer()(cell, torch.randn(2, 30, 4))
    cell.train()
    with pytest.raises(UsageError, match="different results"):
        quasi_deer()(cell, torch.randn(2, 30, 4))


def test_a_trajectory_prints_as_a_line():
    text = repr(quasi_deer()(GRU(3, 5), torch.zeros(2, 300, 3)))
    assert text.startswith("Trajectory(states [2, 300, 5], outcome ok, at most ")
    assert text.endswith("2 of 2 converged)")
