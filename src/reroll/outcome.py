"""How a computation ended, as a value. The text of each outcome is the help a person needs; raising is a choice.

Estimators and rollouts return an `Outcome` beside their result, so that a caller can look, log, or raise, and nothing
fails silently. (The pattern is that of optimistix' RESULTS.)
"""

from __future__ import annotations

from enum import Enum


class Outcome(Enum):
    """How a gradient estimate or a rollout ended; `.value` says what it means and what to change."""

    ok = "Everything asked for was computed."
    some_probes_lost = (
        "Some probes gave a non-finite loss; they were left out and the mean was taken over the others. "
        "If it happens at more than a few steps, lower epsilon or lr."
    )
    all_probes_lost = (
        "Every probe gave a non-finite loss, so there is no gradient. "
        "Lower epsilon (the probes leave the region where the loss is finite) or lr (the weights have left it)."
    )
    no_difference = (
        "The two losses of every probe are exactly equal, so the gradient is zero: the loss does not see the weights "
        "(a constant, another model's loss), or cannot tell probes apart. Look at loss_fn, or raise epsilon."
    )
    fell_back = (
        "Some sequences did not converge; they were evaluated step by step from where they were still exact. "
        "Raise max_iterations, damp the iteration (elk, quasi_elk with a smaller variance), or use Sequential: see "
        "reroll.predictability for which of them can work."
    )
    solver_too_loose = (
        "What the rollout's solver leaves over moves a probe's loss difference by more than a tenth of what probes do, "
        "so the gradient is partly its error. Lower rtol and atol of the rollout "
        "(model.rollout.rtol=1e-6), or raise epsilon."
    )
    not_finite = "The loss is not finite. Lower lr, or clip the gradient (clip)."
    gradient_not_finite = (
        "The loss is finite but its gradient is not, or the sum of its squares, so the step was not taken. Lower lr, "
        "evaluate in a wider dtype, clip the gradient (clip), or shorten the sequences it goes back through (truncate)."
    )

    def __bool__(self) -> bool:
        """True when a usable result was computed."""
        return self not in (Outcome.all_probes_lost, Outcome.not_finite, Outcome.gradient_not_finite)
