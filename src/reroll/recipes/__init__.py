"""Every result as a function that returns one config. A recipe is where to start: change it by flags, files, or code.

    RECIPES["copy"]().replace(gradient={"probes": 512})
    RECIPES["memorise"](size="large")                        reroll train memorise --size large

Plain data, no torch. The first line of a function's docstring is what `reroll recipes` prints; its arguments are flags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from reroll.errors import UsageError
from reroll.train.config import Config

OPTIM = {
    "probes": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "clip": None},
    "backprop": {"kind": "adamw", "lr": 0.003, "clip": 1.0, "schedule": "constant"},
}
"""The optimizer a recipe takes when it is trained by another gradient than its own."""


def by(config: Config, gradient: str) -> Config:
    """Return a config trained by a gradient of a kind, with an optimizer that suits it.

    Example:
        >>> by(demo(), "backprop").optim.kind
        'adamw'
    """
    other = gradient != config.gradient.kind and gradient in OPTIM
    return config.replace(gradient=gradient, optim=OPTIM[gradient]) if other else config


def demo() -> Config:
    """A character LSTM by CD-RGE on the prose of Python's own documentation: two minutes on two cores, no download."""
    return Config(recipe="demo").replace(
        task={
            "kind": "text", "path": "stdlib:prose", "tokenizer": "char", "max_vocab": 100, "length": 32, "batch": 32,
        },
        model={"kind": "lstm", "hidden": 64, "embed": 24},
        gradient={"kind": "probes", "probes": 96, "epsilon": 0.01},
        optim={"lr": 0.1, "momentum": 0.9, "schedule": {"kind": "linear", "warmdown": 300, "floor": 0.05}},
        run={"steps": 1000},
    )  # fmt: skip


def demo_backprop() -> Config:
    """The demo's model and data, trained by backpropagation through time with AdamW."""
    return by(demo(), "backprop").replace(recipe="demo_backprop", run={"steps": 3000})


def smoke() -> Config:
    """Nine symbols memorised by CD-RGE, in seconds: does this installation train?"""
    return memorise().replace(
        recipe="smoke",
        model={"hidden": 64, "heads": 4, "embed": 32},
        gradient={"probes": 32, "epsilon": 0.05},
        run={"steps": 60, "eval_every": None, "threads": 1},
    )


def _one_of(kind: Any, **argument: Any) -> None:
    """Raise `UsageError` unless an argument is one of a `Literal`."""
    for name, value in argument.items():
        if value not in get_args(kind):
            raise UsageError(f"{name}={value!r} must be one of {', '.join(get_args(kind))}.")


Size = Literal["tiny", "small", "medium", "large", "xlarge"]
SIZES = dict(zip(get_args(Size), ((240, 12), (1600, 32), (9600, 64), (66_000, 220), (297_500, 350))))
"""The paper's LSTMs, (hidden, heads): 0.15 M, 1.1 M, 11 M, 113 M and 1.2 B weights."""


def memorise(size: Size = "small") -> Config:
    """The paper's smoke test: nine symbols, its LSTM of 1.1 M weights (or --size), 96 probes, ε = η = 0.1."""
    _one_of(Size, size=size)
    hidden, heads = SIZES[size]
    return Config(recipe="memorise").replace(
        task={"kind": "memorise", "length": 9, "batch": 1, "symbols": 100},
        model={"kind": "lstm", "hidden": hidden, "heads": heads, "embed": 100},
        gradient={"kind": "probes", "probes": 96, "epsilon": None},
        optim={"kind": "sgd", "lr": 0.1, "momentum": 0.9},
        run={"steps": 20, "target_loss": 0.1, "eval_every": 20},
    )


def text() -> Config:
    """A byte LSTM by CD-RGE on your own text: --path FILE, FOLDER, GLOB, JSONL or PARQUET."""
    task = {"path": None, "tokenizer": "byte", "max_vocab": None, "length": 64}
    return demo().replace(recipe="text", task=task, run={"steps": 1000})


def ptb() -> Config:
    """Penn Treebank by CD-RGE, by words, carrying the state: --path FOLDER with ptb.train.txt and ptb.valid.txt."""
    return text().replace(
        recipe="ptb",
        task={"tokenizer": "word", "max_vocab": 10_000, "length": 35, "batch": 20, "carry": True},
        model={"hidden": 128, "embed": 64},
    )


def arrays() -> Config:
    """A GRU by CD-RGE on your own series: --path FILE.csv, .tsv, .parquet, .npy or .npz."""
    return Config(recipe="arrays").replace(
        task={"kind": "arrays", "length": 64, "batch": 32},
        model={"kind": "gru", "hidden": 32},
        gradient={"kind": "probes", "probes": 96, "epsilon": 0.01},
        optim={"kind": "sgd", "lr": 0.05, "momentum": 0.9},
        run={"steps": 500},
    )


def parallel() -> Config:
    """A GRU by backprop on long windows of text, evaluated for all steps at once by quasi-DEER: exact gradients."""
    return by(demo(), "backprop").replace(
        recipe="parallel",
        task={"length": 512, "batch": 8},
        model={"kind": "gru", "hidden": 32, "embed": 16, "rollout": "quasi_deer"},
        run={"steps": 300},
    )


def parallel_elk() -> Config:
    """The recipe parallel by ELK: full Jacobians, with a Kalman filter that damps steps that would go too far."""
    model = {"hidden": 12, "rollout": {"kind": "elk", "variance": 1e4}}
    return parallel().replace(recipe="parallel_elk", task={"length": 256}, model=model)


def parallel_probes() -> Config:
    """A GRU by CD-RGE through quasi-DEER: every probe starts from the trajectory of the unperturbed weights."""
    return by(parallel(), "probes").replace(
        recipe="parallel_probes",
        task={"length": 128},
        model={"hidden": 24, "rollout": {"rtol": 1e-6}},
        gradient={"probes": 32, "epsilon": 0.02},
    )


Record = Literal["1", "2", "3", "4", "5", "6", "7", "8"]
RECORDS: dict[str, dict[str, Any]] = {
    "1": {
        "task": {"kind": "tokens", "path": "fineweb", "length": 1024, "batch": 512, "epochs": 2},
        "model": {
            "kind": "gpt", "layers": 12, "heads": 12, "width": 768, "vocab": 50_257, "position": "learned",
            "qk_norm": False, "activation": "gelu", "zero_init": False, "tied": True, "embed_norm": False,
        },
        "gradient": "backprop",
        "optim": {
            "kind": "adamw", "lr": 0.0006, "betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0,
            "schedule": {"kind": "cosine", "warmup": 700},
        },
        # 10.26 billion tokens: 103 shards have 19,485 batches of them, so the last ones are seen again.
        "run": {"steps": 19_560, "dtype": "bf16", "eval_every": 125, "target_valid": 3.28, "log_every": 125},
    },
    "2": {
        "task": {"epochs": 1},
        "model": {"position": "rotary"},
        "optim": {"lr": 0.0018, "clip": None, "schedule": {"kind": "linear", "warmup": 250, "warmdown": 2000}},
        "run": {"steps": 9_536},
    },
    "3": {
        "optim": {
            # 0.1 · 0.0036 · √max(m, n), written as 0.2 · 0.0018 · √max(m, n).
            "kind": "muon", "lr": 0.0018, "embedding_lr": 0.0036, "head_lr": 0.0036, "vector_lr": 0.0036,
            "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0,
        },
        "run": {"steps": 6_676},
    },
    "4": {"optim": {"schedule": {"warmup": 0, "warmdown": 1800}}, "run": {"steps": 6_200}},
    "5": {
        "model": {"vocab": 50_304, "heads": 6, "activation": "relu2", "qk_norm": True, "zero_init": True},
        "optim": {"schedule": {"warmup": 0, "warmdown": 1450}},
        "run": {"steps": 5_100},
    },
    "6": {},
    "7": {},
    "8": {
        "model": {"tied": False, "embed_norm": True},
        "optim": {
            "lr": 0.02, "adjust_lr_fn": "original", "embedding_lr": 0.3, "head_lr": 0.002,
            "schedule": {"warmup": 0, "warmdown": 1308},
        },
        "run": {"steps": 4_578},
    },
}  # fmt: skip
"""What each record of the NanoGPT speedrun changed (modded-nanogpt, its README and logs of 2024).

Record 1 is llm.c's GPT-2, here with norms without gains and without biases. Of record 3 no log exists: its steps are
from an issue, its schedule is record 2's, and its rates are those of 4 to 7. Records 6 and 7 changed how the work is
shared out and the version of torch. The steps of record 8 are those of its code and log; its README says 4,768.
"""


def fineweb_124m(record: Record = "8") -> Config:
    """The NanoGPT speedrun: a GPT of 124 M weights on FineWeb to a held-out loss of 3.28, by Muon; --record 1 … 8."""
    _one_of(Record, record=str(record))
    config = Config(recipe="fineweb_124m")
    for number in get_args(Record)[: int(record)]:
        config = config.replace(**RECORDS[number])
    return config


Rule = Literal["muon", "adamw"]


def fineweb_1b5(rule: Rule = "muon") -> Config:
    """The speedrun at 1.5 billion weights: 10 billion tokens to a held-out loss of 2.7297, by --rule adamw to 2.7737.

    Everything but the seed and how the rates were chosen is in the two logs of 2024-10-20 (modded-nanogpt, ScaleUp1B):
    record 7's model with 52 layers of width 1536, for 9.7 and 9.6 hours on 8 H100s. They score 10,420,224 and
    10,403,840 tokens, and have no target.
    """
    _one_of(Rule, rule=rule)
    # The rates of records 3 to 7, halved: matrices 0.1 · 0.0018 · √max(m, n), again as 0.2 · 0.0009 · √max(m, n).
    config = fineweb_124m("7").replace(
        recipe="fineweb_1b5",
        task={"batch": 480, "valid_tokens": 10_420_224},
        model={"layers": 52, "heads": 12, "width": 1536},
        optim={"lr": 0.0009, "embedding_lr": 0.0018, "head_lr": 0.0018, "schedule": {"warmdown": 5812}},
        run={"steps": 20_344, "target_valid": None},
    )
    if rule == "muon":
        return config
    optim = {"kind": "adamw", "schedule": {"warmup": 500}}
    return config.replace(task={"valid_tokens": 10_403_840}, optim=optim)


def cpu_bytes() -> Config:
    """A GPT of bytes by Muon on source code that pip has installed: a minute on two cores, no download."""
    return Config(recipe="cpu_bytes").replace(
        task={
            "kind": "tokens", "path": "cpu-bytes", "length": 256, "batch": 16, "valid_tokens": 1 << 17, "shuffle": True,
        },
        model={"kind": "gpt", "layers": 4, "heads": 2, "width": 128},
        gradient="backprop",
        optim={
            "kind": "muon", "lr": 0.04, "embedding_lr": 0.3, "head_lr": 0.01, "momentum": 0.95, "betas": (0.9, 0.95),
            "adjust_lr_fn": "original", "schedule": {"kind": "linear", "warmdown": 45},
        },
        run={"steps": 150, "eval_every": 75},
    )  # fmt: skip


def cpu_bytes_small() -> Config:
    """The recipe cpu_bytes on one per cent of its text, seen several times: how much can be learned from little?"""
    return cpu_bytes().replace(
        recipe="cpu_bytes_small",
        task={"path": "cpu-bytes-small", "epochs": 4},
        optim={"weight_decay": 0.1, "schedule": {"warmdown": 90}},
        run={"steps": 280},
    )


GENERATED = {
    "copy": "repeat a sequence: abc|abc$",
    "repeat_copy": "repeat a sequence as often as its last symbol says: ab3|ababab$",
    "reverse": "repeat a sequence backwards: abc|cba$",
    "sort": "sort the symbols of a sequence: cab|abc$",
    "add": "add two numbers, digit by digit: 07+95|102$",
    "parity": "say whether the number of ones is odd: 1011|1$",
    "recall": "give the value of a key, associative recall: akbz|bz$",
}
"""What the generated tasks are."""


def cdrge_gpt_bytes() -> Config:
    """The GPT of bytes by CD-RGE: forward passes only, on the same source code."""
    config = cpu_bytes().replace(recipe="cdrge_gpt_bytes", model={"layers": 2, "heads": 2, "width": 32})
    return config.replace(
        task={"length": 64, "batch": 32},
        gradient={"kind": "probes", "probes": 96, "epsilon": 0.01},
        optim={
            "kind": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": {"kind": "linear", "floor": 0.05, "warmdown": None},
        },
        run={"steps": 1000, "eval_every": 250},
    )  # fmt: skip


def cdrge_lstm_owt() -> Config:
    """An LSTM by CD-RGE on GPT-2 token shards, its state carried from window to window: --path FOLDER."""
    return Config(recipe="cdrge_lstm_owt").replace(
        task={"kind": "tokens", "length": 64, "batch": 64, "carry": True, "valid_tokens": 1 << 20, "vocab": 50_260},
        model={"kind": "lstm", "hidden": 512, "heads": 8, "embed": 100},
        gradient={"kind": "probes", "probes": 96, "epsilon": 0.01},
        optim={"kind": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": {"kind": "linear", "floor": 0.05}},
        run={"steps": 10_000, "eval_every": 1000},
    )


def _generated(name: str, **task: int) -> Callable[[], Config]:
    def recipe() -> Config:
        return Config(recipe=name).replace(
            task={"kind": name, "length": 5, "batch": 64, **task},
            model={"kind": "lstm", "hidden": 64, "heads": 4, "embed": 32},
            gradient={"kind": "probes", "probes": 96, "epsilon": 0.02},
            # Constant, the noise of the estimate undoes after some hundred steps what was learned before.
            optim={"kind": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": {"kind": "linear", "floor": 0.05}},
            run={"steps": 1000},
        )

    recipe.__doc__ = f"An LSTM by CD-RGE learns to {GENERATED[name]} (generated, no files)."
    return recipe


def cpu_copy() -> Config:
    """An LSTM by backpropagation learns to repeat four of eight symbols: seconds, and a track for any gradient."""
    copy = _generated("copy", length=4, symbols=8)()
    return by(copy, "backprop").replace(recipe="cpu_copy", optim={"lr": 0.01}, run={"steps": 150})


RECIPES: dict[str, Callable[..., Config]] = {
    recipe.__name__: recipe
    for recipe in (
        demo,
        demo_backprop,
        smoke,
        memorise,
        text,
        ptb,
        arrays,
        parallel,
        parallel_elk,
        parallel_probes,
        fineweb_124m,
        fineweb_1b5,
        cpu_bytes,
        cpu_bytes_small,
        cpu_copy,
        cdrge_gpt_bytes,
        cdrge_lstm_owt,
    )
} | {name: _generated(name) for name in GENERATED}
"""Every recipe by name. The tests run over this table: each, shrunk, must improve."""

INSTEAD = {"fineweb_124m": "cpu_bytes", "fineweb_1b5": "cpu_bytes"}
"""Recipes that take a GPU → what to train without one."""
