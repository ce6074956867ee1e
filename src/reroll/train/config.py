"""The sentence of a run as one value: take batches of a task, run a model, get a gradient, step, write the record.

    Config(task, model, gradient, optim, run)

Plain frozen dataclasses, no torch: a recipe is a function that returns one, a TOML file or a flag replaces some of its
fields, and `resolve` derives the rest, once. What a run did is its `config.toml`, which `--config` reads back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from reroll.errors import UsageError, require_positive


def option(default: Any, help: str, *, flag: str | None = None) -> Any:
    """A field with a default, a help text, and the name of its command-line flag, if it has one of its own."""
    return field(default=default, metadata={"help": help, "flag": flag})


@dataclass(frozen=True)
class TaskConfig:
    """What to learn."""

    name: str = option("copy", "the task: a generated one (copy, sort, add …), text, or arrays")
    path: str | None = option(None, "file, folder or glob of text; .npy, .npz or .csv; or stdlib", flag="path")
    length: int = option(10, "steps of a sequence (for generated tasks: symbols of the prompt)", flag="length")
    batch: int = option(32, "sequences per step", flag="batch")
    symbols: int | None = option(None, "content symbols of a generated task; none: what is usual for it")
    tokenizer: Literal["byte", "char", "word", "gpt2"] = option("byte", "what a symbol of a text is", flag="tokenizer")
    max_vocab: int | None = option(None, "largest vocabulary of char and word; none: 1024 and 10000")
    field: str = option("text", "field of a JSON line that holds the text")
    carry: bool = option(False, "read a text on and on, and carry the state from window to window")
    readout: Literal["last", "mean", "every"] = option("last", "where the answer is read, for one target per series")
    eval_batches: int = option(64, "most batches of an evaluation; 0: the whole held-out part")
    overfit: bool = option(False, "train on the first batch for ever", flag="overfit")
    curriculum_start: int | None = option(None, "length to begin with; none: the full length at once")
    curriculum_step: int = option(1, "by how much the length grows")
    curriculum_threshold: float = option(0.5, "loss (fast average) below which it grows")
    curriculum_patience: int = option(10, "steps below the threshold before it grows")


@dataclass(frozen=True)
class ModelConfig:
    """What to train."""

    cell: Literal["rnn", "gru", "lstm", "dnc", "lem", "min_gru", "min_rnn", "para_gru", "para_lstm"] = option(
        "lstm", "the recurrent cell", flag="cell"
    )
    hidden: int = option(64, "features of the state; the cost grows with its square", flag="hidden")
    heads: int = option(1, "blocks of the recurrent matrix (lstm), read heads (dnc)", flag="heads")
    layers: int = option(1, "cells on top of one another", flag="layers")
    embed: int | None = option(None, "features of a symbol; none: half of hidden, at most 100")
    word_size: int = option(16, "numbers in a memory row (dnc)")
    memory_size: int = option(32, "memory rows (dnc); adds no parameters")
    rollout: Literal["sequential", "deer", "quasi_deer", "elk", "quasi_elk", "picard", "jacobi", "auto"] = option(
        "sequential", "how the recurrence is evaluated along time: step by step, or in parallel", flag="rollout"
    )
    rollout_variance: float | None = option(None, "σ² of elk and quasi_elk: smaller is more careful; none: usual")
    rollout_rtol: float | None = option(None, "tolerance of a rollout in parallel; none: 1e-5 in fp32")
    rollout_iterations: int | None = option(None, "most iterations of a rollout in parallel; none: 100, deer 50")
    window_floats: int = option(1 << 22, "numbers kept alive at once without a gradient; smaller: shorter windows")


@dataclass(frozen=True)
class GradientConfig:
    """Where the gradient comes from."""

    method: Literal["probes", "backprop"] = option(
        "probes", "probes: forward passes only (CD-RGE); backprop: automatic differentiation", flag="gradient"
    )
    probes: int = option(96, "directions per step: the cost grows with it, the error as 1/√N", flag="probes")
    epsilon: float | None = option(None, "size of a probe; none: tied to the learning rate", flag="epsilon")
    epsilon_ratio: float = option(1.0, "a tied ε is this times the current learning rate")
    epsilon_min: float = option(1e-5, "floor of a tied ε, and of what plateaus leave of a fixed one")
    noise: Literal["rademacher", "normal", "sparse"] = option("rademacher", "what a direction is made of", flag="noise")
    density: float | None = option(None, "share of non-zero coordinates of sparse noise: 1/2, 1/4 …")
    difference: Literal["central", "one_sided"] = option("central", "both signs of a probe, or one and the clean loss")
    shaping: Literal["raw", "zscore", "rank", "sign"] = option("raw", "what of a loss difference is kept")
    share: Literal["shared", "split"] = option("shared", "every probe sees the whole batch, or they share it out")
    evaluate: Literal["auto", "in_place", "tiles", "batched"] = option(
        "auto", "how perturbed losses are computed", flag="evaluate"
    )
    chunk: int | None = option(None, "probes of a unit; none: by static rules")
    workers: int | None = option(None, "units at a time; none: by static rules (never changes a result)")
    micro_batch: int | None = option(None, "most sequences evaluated at once; none: the batch")
    restore: Literal["copy", "grid"] = option("copy", "in_place: keep a copy, or round the weights to a grid")
    sums: Literal["fp32", "fp64"] = option("fp32", "precision of sums over probes")
    episode: int | None = option(None, "windows for which carried text keeps its probes and a state per branch (NRES)")
    accumulate: int = option(1, "backprop: parts the batch is cut into")
    truncate: int | None = option(None, "backprop: steps through which the gradient flows; none: all")
    checkpoint: bool = option(False, "backprop: recompute on the way back, memory as √T")


@dataclass(frozen=True)
class OptimConfig:
    """What to do with the gradient."""

    optimizer: Literal["sgd", "adamw", "muon"] = option("sgd", "the update rule", flag="optimizer")
    lr: float | Literal["auto"] = option(0.1, "learning rate, or auto: search for one", flag="lr")
    momentum: float = option(0.9, "of sgd and muon; 0 lets the update be fused into the weights", flag="momentum")
    betas: tuple[float, float] = option((0.9, 0.999), "of adamw")
    weight_decay: float = option(0.0, "decoupled decay of matrices")
    clip: float | None = option(None, "largest norm of the gradient; none: any", flag="clip")
    update: Literal["auto", "write", "stream", "fused"] = option("auto", "how the gradient reaches the weights")
    average: float | None = option(
        None, "decay of a running average of the weights, used to evaluate; none: no average"
    )
    schedule: Literal["constant", "linear", "cosine"] = option("constant", "learning rate over time", flag="schedule")
    warmup: int = option(0, "steps of linear warm-up")
    warmdown: int | None = option(None, "steps of the final descent of the linear schedule; none: all")
    floor: float = option(0.0, "where the schedule ends, as a share of the learning rate")
    plateau: int = option(0, "steps without improvement before learning rate and ε are halved; 0: never")
    plateau_factor: float = option(0.5, "what learning rate and ε are multiplied by on a plateau")
    search_low: float = option(1e-5, "lr=auto: smallest rate tried")
    search_high: float = option(0.1, "lr=auto: largest rate tried")
    search_steps: int = option(10, "lr=auto: steps per rate")


@dataclass(frozen=True)
class RunConfig:
    """How long, where, and what is written."""

    steps: int = option(200, "steps of training", flag="steps")
    seed: int = option(0, "names all randomness: weights, data, probes", flag="seed")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute", flag="device")
    dtype: Literal["fp32", "bf16"] = option("fp32", "precision of the forward passes; weights stay fp32", flag="dtype")
    threads: int | None = option(None, "threads of torch within a unit; none: by static rules", flag="threads")
    max_seconds: float | None = option(None, "stop after this time of training", flag="max-seconds")
    target_loss: float | None = option(None, "stop when the training loss is below", flag="target-loss")
    target_valid: float | None = option(None, "stop when the held-out loss is below")
    diverged: float = option(3.0, "stop when the loss is this many times the first one")
    eval_every: int | None = option(None, "steps between evaluations; none: a tenth of the run")
    checkpoint_every: int | None = option(None, "steps between checkpoints; none: as evaluations")
    log_every: int = option(10, "steps between diagnostics that cost as much as a step (the norm of the gradient)")
    warm_up: int = option(0, "steps taken and undone before the clock starts, so that compiling is not timed")
    keep: int = option(2, "checkpoints kept")


@dataclass(frozen=True)
class Config:
    """A whole run. Sections and fields are those of its `config.toml`.

    Example:
        >>> Config().replace(gradient={"probes": 512}, run={"seed": 1}).gradient.probes
        512
    """

    recipe: str = "custom"
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    gradient: GradientConfig = GradientConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    def replace(self, recipe: str | None = None, **sections: dict[str, Any]) -> Config:
        """Return a config with some fields of some sections replaced; how a recipe varies another."""
        changed = {name: replace(getattr(self, name), **fields) for name, fields in sections.items()}
        return replace(self, recipe=recipe or self.recipe, **changed)


SECTIONS = ("task", "model", "gradient", "optim", "run")


def fields_of(config: Config) -> list[tuple[str, dataclasses.Field[Any], Any]]:
    """Return (section, field, value) of everything in a config, in order."""
    return [
        (section, f, getattr(getattr(config, section), f.name))
        for section in SECTIONS
        for f in dataclasses.fields(getattr(config, section))
    ]


def resolve(config: Config) -> Config:
    """Check a config and fill in what follows from the rest of it; a resolved one stays as it is.

    Raises:
        UsageError: naming the field, its value and the remedy.
    """
    _check(config)
    model, gradient, optim, run = config.model, config.gradient, config.optim, config.run
    probes = gradient.method == "probes"
    update = optim.update
    if update == "auto":
        plain = optim.optimizer == "sgd" and optim.momentum == 0
        update = ("fused" if plain else "stream") if probes else "write"
    eval_every = run.eval_every or max(1, run.steps // 10)
    return config.replace(
        model={"embed": model.embed or max(1, min(100, model.hidden // 2))},
        optim={"update": update},
        run={"eval_every": eval_every, "checkpoint_every": run.checkpoint_every or eval_every},
    )


SIZES = ("length", "batch", "hidden", "heads", "layers", "embed", "word_size", "memory_size", "probes")
MOST = dict.fromkeys(SIZES, 1 << 24) | {"threads": 1024, "workers": 1024, "window_floats": 1 << 62, "seed": 1 << 64}
"""Largest values that can be meant: products of sizes must not overflow, and a process dies of too many threads."""


THRESHOLDS = ("target_loss", "target_valid", "curriculum_threshold", "diverged", "max_seconds")
"""Numbers that others are compared with, which may be as large as they like."""


def _check_values(config: Config) -> None:
    """Refuse what no config file can hold, and integers that would overflow, or fill the memory, far from here."""
    for section, f, value in [("config", None, config.recipe), *fields_of(config)]:
        name = f.name if f else "recipe"
        if isinstance(value, str) and ("\0" in value or not _is_text(value)):
            raise UsageError(f"{section}.{name}={value!r} holds a character that no file can hold; leave it out.")
        most = MOST.get(name, 1 << 31)
        if isinstance(value, int) and abs(value) > most:
            raise UsageError(f"{name}={_short(value)} is too large; it can be {most:,} at most.")
        # Products of two such numbers are still numbers of single precision.
        if isinstance(value, float) and abs(value) > 1e18 and name not in THRESHOLDS:
            raise UsageError(f"{name}={value:g} is too large; it can be 1e18 at most.")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a character, as the name of a file on the command line can have
        return False
    return True


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**30 else f"a number of {value.bit_length() * 3 // 10} digits or more"


def _check(config: Config) -> None:
    _check_values(config)
    task, model, gradient, optim, run = (getattr(config, section) for section in SECTIONS)
    require_positive(
        length=task.length, batch=task.batch, hidden=model.hidden, heads=model.heads, layers=model.layers,
        embed=model.embed, word_size=model.word_size, memory_size=model.memory_size,
        window_floats=model.window_floats, rollout_variance=model.rollout_variance,
        rollout_rtol=model.rollout_rtol, rollout_iterations=model.rollout_iterations, probes=gradient.probes,
        epsilon=gradient.epsilon,
        epsilon_ratio=gradient.epsilon_ratio, epsilon_min=gradient.epsilon_min, episode=gradient.episode,
        lr=None if optim.lr == "auto" else optim.lr, clip=optim.clip, steps=run.steps, threads=run.threads,
        max_seconds=run.max_seconds, diverged=run.diverged, eval_every=run.eval_every, keep=run.keep,
        checkpoint_every=run.checkpoint_every, log_every=run.log_every, curriculum_start=task.curriculum_start,
        search_low=optim.search_low, search_high=optim.search_high, search_steps=optim.search_steps,
    )  # fmt: skip
    probes, one_sided = gradient.method == "probes", gradient.difference == "one_sided"
    rules = [
        (model.cell == "lstm" and model.hidden % model.heads, f"hidden={model.hidden} is not divisible by "
         f"heads={model.heads}; choose a divisor of it."),
        (model.cell not in ("lstm", "dnc") and model.heads > 1, f"heads={model.heads} is for cell=lstm and cell=dnc; "
         f"cell={model.cell} has one. Drop it."),
        (model.rollout_variance and model.rollout not in ("elk", "quasi_elk"), f"rollout_variance="
         f"{model.rollout_variance} is for rollout=elk and rollout=quasi_elk; rollout is {model.rollout}."),
        (model.rollout not in ("sequential", "auto") and gradient.evaluate in ("tiles", "batched") and
         gradient.method == "probes", f"evaluate={gradient.evaluate} cannot follow rollout={model.rollout}, which "
         "iterates until it has converged; use evaluate=in_place or auto."),
        (not 0 <= run.seed < 2**64, f"seed={run.seed} must lie in [0, 2**64)."),
        (optim.average is not None and not 0 <= optim.average < 1, f"average={optim.average} must lie in [0, 1)."),
        (optim.search_low >= optim.search_high, f"search_low={optim.search_low} must be below "
         f"search_high={optim.search_high}."),
        (gradient.method == "backprop" and optim.update in ("stream", "fused"), f'update="{optim.update}" is for '
         'gradient=probes; a backprop gradient is in .grad already. Use update="write".'),
        (optim.update == "fused" and (optim.optimizer != "sgd" or optim.momentum),
         f'update="fused" adds the gradient to the weights and nothing else; optimizer={optim.optimizer} with '
         f'momentum={optim.momentum} needs update="stream".'),
        (gradient.episode and not task.carry, f"episode={gradient.episode} keeps probes while text is carried on; "
         "set task.carry = true."),
        (probes and one_sided and gradient.share == "split", "share=split and difference=one_sided exclude each other: "
         "a probe's loss is of its own sequences, the unperturbed one of all. Drop one of them."),
        (probes and one_sided and gradient.episode, f"episode={gradient.episode} and difference=one_sided exclude each "
         "other: the unperturbed model has no state of its own among the branches. Drop one of them."),
        (probes and gradient.episode and gradient.micro_batch, f"episode={gradient.episode} and "
         f"micro_batch={gradient.micro_batch} exclude each other: the states of branches are not cut by sequences. "
         "Drop one of them."),
        (task.carry and task.name != "text", "carry=true reads a text on and on; it is for the task text only."),
        (task.curriculum_start and task.curriculum_start > task.length, f"curriculum_start={task.curriculum_start} is "
         f"longer than length={task.length}, up to which the curriculum grows."),
        (task.carry and task.curriculum_start, "carry=true and curriculum_start exclude each other: carried windows "
         "have one length."),
        (task.carry and task.overfit, "carry=true and overfit exclude each other: overfitting stays on one batch."),
        (task.name in ("text", "arrays") and task.path is None, f"task {task.name} needs --path."),
        (gradient.evaluate == "in_place" and run.dtype == "bf16" and gradient.method == "probes",
         "evaluate=in_place cannot change the dtype of the weights; with dtype=bf16 use evaluate=tiles."),
    ]  # fmt: skip
    for broken, message in rules:
        if broken:
            raise UsageError(message)
