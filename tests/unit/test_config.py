"""The config: what is derived, what is refused, and that a file says exactly what a run did."""

import dataclasses
import tomllib
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroll.cli.flags import flag_fields
from reroll.errors import UsageError
from reroll.recipes import RECIPES
from reroll.specs import GRADIENTS, MODELS, OPTIMIZERS, ROLLOUTS, SCHEDULES, TASKS
from reroll.specs.base import hints, leaves
from reroll.specs.run import RunSpec
from reroll.train import toml
from reroll.train.config import Config, resolve

FLAGS = {
    "path", "length", "batch", "tokenizer", "overfit", "cell", "rollout", "hidden", "width", "heads", "layers",
    "gradient", "probes", "epsilon", "noise", "evaluate", "optimizer", "lr", "momentum", "clip", "schedule", "steps",
    "seed", "device", "device-batch", "dtype", "threads", "max-seconds", "target-loss", "field", "sep", "decimal",
    "columns", "time", "missing", "price",
}  # fmt: skip


def test_the_visible_flags_are_these():
    """A new knob is a field; a new flag is a decision, made here."""
    assert set(flag_fields()) == FLAGS


SECTIONS = {"task": TASKS, "model": MODELS, "gradient": GRADIENTS, "optim": OPTIMIZERS, "run": {"": RunSpec}}
NESTED = {"rollout": ROLLOUTS, "schedule": SCHEDULES}
KINDS = list(dict.fromkeys(kind for table in (*SECTIONS.values(), *NESTED.values()) for kind in table.values()))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_says_what_its_fields_are_and_has_defaults_that_are_allowed(kind):
    assert all(f.metadata["help"] for f in dataclasses.fields(kind))
    kind().check()


@pytest.mark.parametrize("name", RECIPES)
def test_resolving_twice_changes_nothing_and_files_keep_everything(name):
    config = RECIPES[name]()
    resolved = resolve(config)
    assert resolve(resolved) == resolved
    for base in (Config(), RECIPES["demo"]()):
        assert toml.overlay(base, tomllib.loads(toml.dumps(resolved)), "test") == resolved


def values(kind):
    """A strategy for values of a field's type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(parts)
    if origin is tuple:
        return st.tuples(*map(values, parts))
    if origin is not None:
        return st.one_of(*map(values, parts))
    return {
        int: st.integers(-5, 10**12),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: st.text(max_size=20),
        type(None): st.none(),
    }[kind]


@st.composite
def specs(draw, table):
    """A spec of any kind of a table, some of its fields with any value of their type."""
    name = draw(st.sampled_from(sorted(table)))
    strategies = {
        f: specs(NESTED[f]) if f in NESTED else values(hint) for f, hint in hints(table[name]).items() if f != "kind"
    }
    chosen = draw(st.sets(st.sampled_from(["", *strategies]), max_size=4))
    return table[name](**({"kind": name} if name else {}), **{f: draw(strategies[f]) for f in chosen - {""}})


@given(st.text(max_size=10), st.tuples(*map(specs, SECTIONS.values())))
def test_any_config_survives_its_file(recipe, sections):
    config = Config(recipe, *sections)
    again = toml.overlay(Config(), tomllib.loads(toml.dumps(config)), "test")
    assert leaves(config).keys() == leaves(again).keys()
    for (name, a), b in zip(leaves(config).items(), leaves(again).values()):
        # "none" is how a file says None, so a text of that name cannot be told from it.
        assert a == b or (a == "none" and b is None), name


def test_another_kind_keeps_what_it_can():
    config = Config().replace(
        model={"hidden": 24, "heads": 4}, optim={"lr": 0.3, "schedule": {"kind": "linear", "floor": 0.1}}
    )
    gru = config.replace(model="gru").model
    assert (gru.kind, gru.hidden, hasattr(gru, "heads")) == ("gru", 24, False)
    assert config.replace(model="dnc").model.heads == 4
    cosine = config.replace(optim={"kind": "adamw", "schedule": "cosine"}).optim
    assert (cosine.lr, cosine.schedule.floor, cosine.betas) == (0.3, 0.1, (0.9, 0.999))


@pytest.mark.parametrize(
    "tables, message",
    [
        ({"optm": {}}, 'unknown key optm. Did you mean "optim"'),
        ({"model": {"cell": "gru"}}, "model.cell is now called model.kind"),
        ({"gradient": {"share": "split"}}, "gradient.share is now called gradient.batch"),
        ({"optim": {"lrr": 1}}, r'unknown key optim.lrr. Did you mean "lr"'),
        ({"optim": 3}, "optim=3 must be a table"),
        ({"optim": {"lr": "fast"}}, "optim.lr='fast' must be a number or \"auto\""),
        ({"optim": {"lr": True}}, "optim.lr=True must be"),
        ({"optim": {"kind": "adamw", "betas": [0.9]}}, "optim.betas=.* must be a list of 2 numbers"),
        ({"run": {"steps": 1.5}}, "run.steps=1.5 must be an integer"),
        ({"run": {"steps": True}}, "run.steps=True must be an integer"),
        ({"task": {"overfit": 1}}, "task.overfit=1 must be true or false"),
        ({"gradient": "object"}, "gradient.kind='object' is unknown. Known: backprop, probes"),
        ({"model": "lsmt"}, "model.kind='lsmt' is unknown. Did you mean \"lstm\""),
        ({"model": {"rollout": "dear"}}, "model.rollout.kind='dear' is unknown. Did you mean \"deer\""),
        ({"model": {"kind": "gru", "heads": 2}}, "heads=2 is for model lstm or dnc or gpt; this one is gru"),
        ({"model": {"rollout": {"variance": 2.0}}}, "variance=2.0 is for model.rollout elk or quasi_elk"),
        ({"gradient": {"truncate": 3}}, "truncate=3 is for gradient backprop; this one is probes"),
        (
            {"gradient": {"evaluate": "tile"}},
            "gradient.evaluate='tile' must be auto, .*batched. Did you mean \"tiles\"",
        ),
        ({"format": 1}, "format=1 is of another version of reroll"),
        ({"recipe": 3}, "recipe=3 must be text"),
    ],
)
def test_what_does_not_fit_is_named(tables, message):
    with pytest.raises(UsageError, match=message):
        toml.overlay(Config(), tables, "file.toml")


CARRIED = {"kind": "text", "path": "somewhere", "carry": True}


@pytest.mark.parametrize(
    "sections, message",
    [
        (dict(model={"hidden": 10, "heads": 3}), "hidden=10 is not divisible by heads=3"),
        (dict(task={"batch": 0}), r"batch=0 must lie in \[1, "),
        (dict(gradient={"probes": -3}), "probes=-3"),
        (dict(gradient={"epsilon": 0.0}), "epsilon=0.0"),
        (dict(optim={"lr": -1.0}), "lr=-1.0"),
        (dict(run={"seed": -1}), "seed=-1 must lie in"),
        (dict(optim={"average": 1.0}), r"average=1.0 must lie in \[0, 1\)"),
        (dict(optim={"update": "stream"}, gradient="backprop"), 'Use update="write"'),
        (dict(gradient={"episode": 3}), "set task.carry = true"),
        (dict(task={"curriculum_start": 11}), "curriculum_start=11 is longer than length=10"),
        (dict(optim={"kind": "adamw", "update": "fused"}), 'optimizer=adamw needs update="stream"'),
        (dict(optim={"lr": 1e30}), r"lr=1e\+30 must lie in"),
        (dict(gradient={"probes": 1 << 30}), "probes=1073741824 must lie in"),
        (dict(task={"kind": "text", "path": "a\0b"}), "has a character that cannot be stored in a file"),
        (
            dict(gradient={"batch": "split", "difference": "one_sided"}),
            "difference=.* and batch=.* exclude each other",
        ),
        (
            dict(task=CARRIED, gradient={"episode": 3, "difference": "one_sided"}),
            "a state per branch and difference=.* exclude each other",
        ),
        (
            dict(task=CARRIED, gradient={"episode": 3, "micro_batch": 2}),
            "a state per branch and micro_batch=2 exclude each other",
        ),
        (dict(task=CARRIED | {"overfit": True}), "carry=true and overfit exclude each other"),
        (dict(task={"kind": "text", "path": "a.csv"}), "contains numbers"),
        (dict(model={"rollout": "auto"}, gradient={"evaluate": "batched"}), "evaluate=batched does not work"),
        (dict(optim={"plateau_factor": -0.5}), "plateau_factor=-0.5"),
        (dict(optim={"plateau": -1}), "plateau=-1"),
        (dict(task={"curriculum_step": 0}), "curriculum_step=0"),
        (dict(task={"curriculum_threshold": -1.0}), r"curriculum_threshold=-1.0 must lie in \(0, inf\)"),
        (dict(task={"curriculum_patience": 0}), "curriculum_patience=0"),
        (dict(task={"kind": "text", "eval_batches": -1}), "eval_batches=-1"),
        (dict(gradient={"density": 0.5}), "density=0.5 is for noise="),
        (dict(gradient={"evaluate": "in_place"}, run={"dtype": "bf16"}), "use evaluate=tiles"),
        (dict(optim={"search_low": 1.0}), "search_low=1.0 must be below"),
    ],
)
def test_what_cannot_be_together_is_named(sections, message):
    with pytest.raises(UsageError, match=message):
        resolve(Config().replace(**sections))


def test_pairs():
    assert toml.parse_pairs(["a.b=[1, 2]", "a.c=x y", "d.e=none"]) == {
        "a": {"b": [1, 2], "c": "x y"},
        "d": {"e": "none"},
    }
    for bad in ("a.b", "a=3", "=3", ".x=3"):
        with pytest.raises(UsageError, match="section.field=value"):
            toml.parse_pairs([bad])


def test_how_an_update_is_chosen():
    def chosen(**sections):
        return resolve(Config().replace(**sections)).optim.update

    assert chosen(optim={"momentum": 0.0}) == "fused"
    assert chosen(optim={"kind": "adamw"}) == "stream"
    assert chosen(optim="adamw") == "stream"
    assert chosen(gradient="backprop") == "write"
