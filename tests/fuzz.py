"""What is thrown at the command line, and what must hold of any answer."""

import contextlib
import io
import json
import typing

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from reroll.cli import main
from reroll.cli.flags import flag_fields
from reroll.specs import GRADIENTS, MODELS, OPTIMIZERS, ROLLOUTS, SCHEDULES, TASKS
from reroll.specs.base import hints
from reroll.specs.run import RunSpec


def examples(count):
    """Run a test this many times; how long each takes is its own affair."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=checks)


def call(*arguments):
    """Call the command line, check what must hold for any of them, and return its exit code and outputs."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        code = main([str(argument) for argument in arguments])
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    # A run that diverged ends with 1 and says so as its result.
    assert code in {0: (0, 1), 1: (1, 2)}.get(len(errors), ()), (code, err)
    assert err.count("\n") == len(errors), err
    assert "--debug" not in err, err
    assert "Traceback" not in out + err
    return code, out, err


# Values

ANY_TEXT = st.text(st.characters(exclude_categories=(), exclude_characters="/~"), max_size=12)
WORDS = st.sampled_from([
    "", " ", "-", "--", "=", ".", "none", "None", "auto", "true", "[", "[[", "{}", "%s", "[/]", "a\nb", "a\0b",
    "\ud800", "a\udcffb", "é", "∞", "nan", "-nan", "0x10", "1e999", "1_0", "٣", "'", '"""', "x" * 5000, "9" * 5000,
])  # fmt: skip
SMALL = st.integers(1, 4)
INTEGERS = st.sampled_from([-5, -1, 0, 2**31 + 1, 2**63, 2**64, 10**30, 10**400])
LARGE = st.sampled_from([7, 100, 2**20, 2**24, 2**31 - 1, 2**31])
FLOATS = st.sampled_from([0.0, -0.0, -1.0, 0.5, 1.0, 1e-45, 1e-30, 1e18, 1e30, 1e308]) | st.floats()
VALUES = WORDS | ANY_TEXT | INTEGERS.map(str) | FLOATS.map(str)
PATHS = ANY_TEXT | st.sampled_from([
    "", ".", "..", "file", "file/x", "folder", "absent", "absent/x", "a*", "[", "**/*.txt", "a\nb", "x" * 300,
    "x/" * 2100, "a\0b", "\ud800", "a\udcffb", "none", "-", "~nobody/x", "config.toml", "é[/]", "folder/",
    "/proc/self/mem",
])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


# Flags and pairs

TABLES = {
    "task": TASKS, "model": MODELS, "model.rollout": ROLLOUTS, "gradient": GRADIENTS, "optim": OPTIMIZERS,
    "optim.schedule": SCHEDULES, "run": {"": RunSpec},
}  # fmt: skip
KINDS = {
    f"{section}.{name}": hint
    for section, table in TABLES.items()
    for kind in dict.fromkeys(table.values())
    for name, hint in hints(kind).items()
    if name not in ("kind", "rollout", "schedule")
} | {f"{section}.kind": typing.Literal[*table] for section, table in TABLES.items() if len(table) > 1}
FLAGS = {flag: dotted for flag, (dotted, *_) in flag_fields().items()}
TYPOS = ["optm.lr", "run.stpes", "task", ".lr", "recipe", "run.steps.more"]


def fitting(kind, sizes):
    """Values of a field's type, as they are written."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(parts)
    if typing.get_origin(kind) is tuple:
        return st.tuples(FLOATS, FLOATS).map(lambda pair: str(list(pair)))
    if parts:
        return st.one_of(*(fitting(part, sizes) for part in parts))
    numbers = FLOATS.map(str) | st.sampled_from(["0.001", "0.1", "0.5"])
    plain = {int: sizes.map(str), float: numbers, str: PATHS, type(None): st.just("none")}
    return plain[kind] if kind in plain else st.sampled_from(["true", "false"])


@st.composite
def changes(draw, sizes):
    """Flags and pairs, from well-formed to hopeless; `sizes` are the integers among their values."""
    flags, pairs = [], []
    for name in draw(st.lists(st.sampled_from([*KINDS] * 4 + TYPOS), max_size=3)):
        hopeless = not draw(st.integers(0, 9))
        value = draw(VALUES if hopeless or name not in KINDS else fitting(KINDS[name], sizes))
        if name not in ("task.path", "task.kind"):
            pairs.append(f"{name}={value}")
    for name in draw(st.lists(st.sampled_from([*FLAGS] * 2 + ["resume", "stpes", "init"]), max_size=3)):
        hopeless = not draw(st.integers(0, 9))
        value = draw(VALUES if hopeless or name not in FLAGS else fitting(KINDS[FLAGS[name]], sizes))
        written = [[f"--{name}={value}"]] * 8 + [[f"--{name}", value], [f"--{name}"]]
        flags += [f"--{name}"] if name == "overfit" else draw(st.sampled_from(written))
    return [*(["--set", *pairs] if pairs else []), *flags]


# Files


def mangled(whole):
    """Bytes near some whole ones: cut, changed, doubled, or others altogether."""

    @st.composite
    def strategy(draw):
        data = bytearray(whole)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, max(len(data) - 1, 0)))
            kind = draw(st.sampled_from(["cut", "change", "remove", "insert", "double"]))
            if kind == "cut":
                del data[at:]
            elif kind == "change" and data:
                data[at] = draw(st.integers(0, 255))
            elif kind == "remove":
                del data[at : at + draw(st.integers(1, 40))]
            elif kind == "insert":
                data[at:at] = draw(st.binary(max_size=12))
            else:
                data[at:at] = data[at : at + 60]
        return bytes(data)

    return strategy()


def dumped(value):
    """A value as JSON, or as near to it as it comes: integers of hundreds of digits, NaN."""
    return json.dumps(value).encode("utf-8", "replace")


def changed(whole):
    """A dictionary with some of its values, however deep, replaced, or keys missing."""

    @st.composite
    def strategy(draw):
        value = json.loads(json.dumps(whole))
        for _ in range(draw(st.integers(1, 2))):
            inside, key = None, None
            node = value
            while isinstance(node, dict | list) and node and (inside is None or draw(st.booleans())):
                key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
                inside, node = node, node[key]
            if inside is not None and draw(st.integers(0, 4)):
                inside[key] = draw(JSON)
            elif isinstance(inside, dict):
                del inside[key]
        return value

    return strategy()


def tables():
    """TOML with sections and values of any kind."""
    values = st.one_of(
        INTEGERS.map(str), FLOATS.map(str),
        st.sampled_from(["true", "[]", "[1, 2]", "[0.9, 0.99]", "{}", "1979-05-27", '"x"']),
        st.text(max_size=6).map(json.dumps),
    )  # fmt: skip
    lines = st.one_of(
        st.sampled_from(["task", "model", "gradient", "optim", "run", "optm", "a.b"]).map("[{}]".format),
        st.tuples(st.sampled_from([name.rpartition(".")[2] for name in KINDS]), values).map(" = ".join),
        st.sampled_from(["format = 2", "format = 1", 'recipe = "x"', "recipe = 3", "# note", "=", "[", "\ufeff", "\0"]),
    )
    return st.lists(lines, max_size=6).map("\n".join).map(str.encode)
