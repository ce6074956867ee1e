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
from reroll.train import toml
from reroll.train.config import SECTIONS, Config, fields_of, resolve

FLAGS = {
    "path", "length", "batch", "tokenizer", "overfit", "cell", "rollout", "hidden", "heads", "layers", "gradient",
    "probes",
    "epsilon", "noise", "evaluate", "optimizer", "lr", "momentum", "clip", "schedule", "steps", "seed", "device",
    "dtype", "threads", "max_seconds", "target_loss",
}  # fmt: skip


def test_the_visible_flags_are_these():
    """A new knob is a field; a new flag is a decision, made here."""
    assert set(flag_fields()) == FLAGS


def test_every_field_has_a_help_text():
    assert all(f.metadata["help"] for _, f, _ in fields_of(Config()))


@pytest.mark.parametrize("name", RECIPES)
def test_resolving_twice_changes_nothing_and_files_keep_everything(name):
    config = RECIPES[name]()
    if config.task.name in ("text", "arrays") and config.task.path is None:
        config = config.replace(task={"path": "somewhere"})
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
def configs(draw):
    config = Config(recipe=draw(st.text(max_size=10)))
    for section in SECTIONS:
        kind = type(getattr(config, section))
        hints = typing.get_type_hints(kind)
        chosen = draw(st.lists(st.sampled_from([f.name for f in dataclasses.fields(kind)]), max_size=4, unique=True))
        config = config.replace(**{section: {name: draw(values(hints[name])) for name in chosen}})
    return config


@given(configs())
def test_any_config_survives_its_file(config):
    text = toml.dumps(config)
    again = toml.overlay(Config(), tomllib.loads(text), "test")
    for (_, f, a), (_, _, b) in zip(fields_of(config), fields_of(again)):
        # "none" is how a file says None, so a text of that name cannot be told from it.
        assert a == b or (a == "none" and b is None), f.name


@pytest.mark.parametrize(
    "tables, message",
    [
        ({"optm": {}}, r'unknown section \[optm\]. Did you mean "optim"'),
        ({"optim": {"lrr": 1}}, r'unknown key optim.lrr. Did you mean "lr"'),
        ({"optim": 3}, "optim=3 must be a table"),
        ({"optim": {"lr": "fast"}}, "optim.lr='fast' must be a number or \"auto\""),
        ({"optim": {"lr": True}}, "optim.lr=True must be"),
        ({"optim": {"betas": [0.9]}}, "optim.betas=.* must be a list of 2 numbers"),
        ({"run": {"steps": 1.5}}, "run.steps=1.5 must be an integer"),
        ({"run": {"steps": True}}, "run.steps=True must be an integer"),
        ({"task": {"overfit": 1}}, "task.overfit=1 must be true or false"),
        ({"model": {"cell": "lsmt"}}, "model.cell='lsmt' must be rnn, .*para_lstm. Did you mean \"lstm\""),
        ({"format": 2}, "another version of reroll"),
        ({"recipe": 3}, "recipe=3 must be a text"),
    ],
)
def test_what_does_not_fit_is_named(tables, message):
    with pytest.raises(UsageError, match=message):
        toml.overlay(Config(), tables, "file.toml")


CARRIED = {"name": "text", "path": "somewhere", "carry": True}


@pytest.mark.parametrize(
    "sections, message",
    [
        (dict(model={"hidden": 10, "heads": 3}), "hidden=10 is not divisible by heads=3"),
        (dict(model={"cell": "gru", "heads": 2}), "heads=2 is for cell=lstm"),
        (dict(task={"batch": 0}), "batch=0 must be greater than zero"),
        (dict(gradient={"probes": -3}), "probes=-3"),
        (dict(gradient={"epsilon": 0.0}), "epsilon=0.0"),
        (dict(optim={"lr": -1.0}), "lr=-1.0"),
        (dict(run={"seed": -1}), "seed=-1 must lie in"),
        (dict(optim={"average": 1.0}), r"average=1.0 must lie in \[0, 1\)"),
        (dict(optim={"update": "fused"}, gradient={"method": "backprop"}), 'Use update="write"'),
        (dict(gradient={"episode": 3}), "set task.carry = true"),
        (dict(task={"curriculum_start": 11}), "curriculum_start=11 is longer than length=10"),
        (dict(optim={"update": "fused"}), 'with momentum=0.9 needs update="stream"'),
        (dict(optim={"lr": 1e30}), r"lr=1e\+30 is too large"),
        (dict(gradient={"probes": 1 << 30}), "probes=1073741824 is too large"),
        (dict(task={"path": "a\0b"}), "holds a character that no file can hold"),
        (
            dict(gradient={"share": "split", "difference": "one_sided"}),
            "share=split and difference=one_sided exclude each other",
        ),
        (
            dict(task=CARRIED, gradient={"episode": 3, "difference": "one_sided"}),
            "episode=3 and difference=one_sided exclude each other",
        ),
        (
            dict(task=CARRIED, gradient={"episode": 3, "micro_batch": 2}),
            "episode=3 and micro_batch=2 exclude each other",
        ),
        (dict(task={"carry": True}), "for the task text only"),
        (dict(task={"name": "text"}), "task text needs --path"),
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
    assert chosen(optim={"momentum": 0.9}) == "stream"
    assert chosen(optim={"optimizer": "adamw"}) == "stream"
    assert chosen(gradient={"method": "backprop"}) == "write"
