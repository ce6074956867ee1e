"""A run as one value: a task, a model, where the gradient comes from, an optimizer, and the limits of the run.

    Config(task, model, gradient, optim, run)

Frozen specs, no torch: a recipe is a function that returns a config, a TOML file or a flag replaces some of its fields,
and `resolve` derives the rest, once. A run saves it as `config.toml`, which `--config` reads back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reroll.errors import UsageError
from reroll.specs.base import Options, change, option
from reroll.specs.gradient import GRADIENTS, GradientSpec, Probes
from reroll.specs.model import LSTM, MODELS, ModelSpec
from reroll.specs.optim import OPTIMIZERS, SGD, OptimizerSpec
from reroll.specs.run import RunSpec
from reroll.specs.task import TASKS, Generated, TaskSpec


@dataclass(frozen=True)
class Config(Options):
    """The config of a run. Sections and fields are those of its `config.toml`.

    Example:
        >>> Config().replace(model="gru", gradient={"probes": 512}, run={"seed": 1}).model.kind
        'gru'
    """

    recipe: str = option("custom", "what it was made from")
    task: TaskSpec = option(Generated(), "what to learn", kinds=TASKS)
    model: ModelSpec = option(LSTM(), "the recurrent cell, or gpt", flag="cell", kinds=MODELS)
    gradient: GradientSpec = option(
        Probes(), "probes: forward passes only (CD-RGE); backprop: automatic differentiation", flag="gradient",
        kinds=GRADIENTS,
    )  # fmt: skip
    optim: OptimizerSpec = option(SGD(), "the update rule", flag="optimizer", kinds=OPTIMIZERS)
    run: RunSpec = option(RunSpec(), "how long, where, and what is written", kinds={"": RunSpec})

    def replace(self, **sections: Any) -> Config:
        """Return a config with other values: fields by section, or a section's kind alone; see `change`."""
        return change(self, sections)


def resolve(config: Config) -> Config:
    """Check a config and fill in the derived fields; a resolved config is left unchanged.

    Raises:
        UsageError: naming the field, its value and the remedy.
    """
    config.check()
    _check_together(config)
    optim, run, update = config.optim, config.run, config.optim.update
    if update == "auto":
        update = ("fused" if optim.fuses else "stream") if config.gradient.seeded else "write"
    eval_every = run.eval_every or max(1, run.steps // 10)
    return config.replace(
        model=config.model.resolved(),
        optim={"update": update},
        run={"eval_every": eval_every, "checkpoint_every": run.checkpoint_every or eval_every},
    )


def _check_together(config: Config) -> None:
    """Refuse sections that do not work together; each section alone is checked by its kind."""
    task, model, gradient, optim = config.task, config.model, config.gradient, config.optim
    evaluate = getattr(gradient, "evaluate", "auto")
    rules = [
        (gradient.per_branch_state and not task.carries, "gradient.episode needs text whose state is carried on; set "
         "task.carry = true."),
        (model.iterates and evaluate in ("tiles", "batched"), f"evaluate={evaluate} does not work with a rollout "
         "that iterates to convergence; use evaluate=in_place or auto."),
        (not gradient.seeded and optim.update in ("stream", "fused"), f'update="{optim.update}" needs a '
         'gradient from probes; this one is already in .grad. Use update="write".'),
        (evaluate == "in_place" and config.run.dtype == "bf16", "evaluate=in_place cannot change the dtype of the "
         "weights; with dtype=bf16 use evaluate=tiles."),
        (config.run.compile == "on" and (gradient.seeded or model.kind != "gpt"),
         "compile=on is for model=gpt by gradient=backprop; use compile=auto or off (in Python: model.compile())."),
    ]  # fmt: skip
    for broken, message in rules:
        if broken:
            raise UsageError(message)
