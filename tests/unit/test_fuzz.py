"""Malformed command lines and files of any kind: each ends with 0, 1 or 2 and one line, never in an error of Python's.

What nobody thought of would be told as `SomeError: … (run again with --debug …)`. That it is never reached is the test.
"""

import contextlib
import io
import json
import shutil
import typing
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from reroll.cli import main
from reroll.cli.flags import flag_fields
from reroll.specs import GRADIENTS, MODELS, OPTIMIZERS, ROLLOUTS, SCHEDULES, TASKS
from reroll.specs.base import hints
from reroll.specs.run import RunSpec
from reroll.train.load import export, open_model
from tests.cli import TINY, TRAIN

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("little_room")]


def examples(count):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=checks)


def call(*arguments):
    """Call the command line, check what must hold for any of them, and return its exit code and error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said of a run, such as that nothing depends on the weights
        code = main([str(argument) for argument in arguments])
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    # A run that diverged ends with 1 and says so as its result.
    assert code in {0: (0, 1), 1: (1, 2)}.get(len(errors), ()), (code, err)
    assert err.count("\n") == len(errors), err
    assert "--debug" not in err, err
    assert "Traceback" not in out + err
    shutil.rmtree("new", ignore_errors=True)
    return code, err


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/~\0"), max_size=12)
NUMBERS = (
    st.sampled_from([-5, 0, 2**31, 2**63, 10**400, -0.0, 0.5, 1e-45, 1e18, 1e308]) | st.integers(1, 4) | st.floats()
)
WORDS = st.sampled_from([
    "", "-", "--", "=", "none", "auto", "true", "[[", "{}", "%s", "[/]", "a\nb", "a\udcffb", "nan", "0x10", "1_0", "٣",
    '"""', "x" * 5000,
])  # fmt: skip
VALUES = WORDS | TEXT | NUMBERS.map(str)
PATHS = TEXT | st.sampled_from([
    "", ".", "..", "file", "file/x", "folder", "absent/x", "a*", "[", "**/*.txt", "x" * 300, "x/" * 2100,
    "~nobody/x", "é[/]", "folder/",
])  # fmt: skip
JSON = st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.just([]) | st.just({"a": [None]})


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
    if name not in ("kind", "rollout", "schedule", "path")
} | {f"{section}.kind": typing.Literal[*table] for section, table in TABLES.items() if section not in ("task", "run")}
FLAGS = {flag: dotted for flag, (dotted, *_) in flag_fields().items() if flag != "path"}


def fitting(kind):
    """Values of a field's type, as they are written."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(parts)
    if parts and typing.get_origin(kind) is not tuple:
        return st.one_of(*map(fitting, parts))
    plain = {int: st.integers(1, 4).map(str) | NUMBERS.map(str), float: NUMBERS.map(str), type(None): st.just("none")}
    return plain.get(kind, st.sampled_from(["true", "[0.9, 0.99]", "file"]))


@st.composite
def changes(draw):
    """Flags and pairs, from well-formed to hopeless."""
    pairs, flags = [], []
    for name in draw(st.lists(st.sampled_from([*KINDS, "optm.lr", "task", ".lr", "run.steps.more"]), max_size=3)):
        pairs.append(f"{name}={draw(st.one_of(*[fitting(KINDS.get(name, int))] * 4, VALUES))}")
    for name in draw(st.lists(st.sampled_from([*FLAGS, "resume", "stpes", "init"]), max_size=3)):
        value = draw(st.one_of(*[fitting(KINDS.get(FLAGS.get(name), int))] * 4, VALUES))
        flags += [f"--{name}"] if name == "overfit" else draw(st.sampled_from([[f"--{name}={value}"], [f"--{name}"]]))
    return [*(["--set", *pairs] if pairs else []), *flags]


@given(changes(), st.sampled_from(["copy", "smoke", "text", "arrays", "demo"]))
@examples(30)
def test_any_flags_are_shown_or_refused(flags, recipe):
    call("show", recipe, *flags)


@given(changes(), st.sampled_from(["copy", "sort", "recall", "memorise"]))
@examples(20)
def test_any_flags_are_trained_or_refused(flags, task):
    small = (*TINY, f"task.kind={task}", "optim.search_steps=1", "run.checkpoint_every=1")
    sizes = ("--length=3", "--batch=2", "--hidden=8", "--probes=2", "--layers=1", "--steps=1", "--run-dir=new")
    call("train", "copy", *small, *flags, *sizes)


@given(st.sampled_from(["eval", "export", "show", "stop", "init", "config", "text", "arrays", "run-dir"]), PATHS)
@examples(25)
def test_any_path_is_read_written_or_refused(command, path):
    Path("file").touch()
    Path("folder").mkdir(exist_ok=True)
    small = (*TINY[2:], "--length", 2, "--steps", 1, "--run-dir", "new")
    lines = {
        "stop": ("runs", "stop", path), "run-dir": (*TRAIN, "--steps", 1, f"--run-dir={path}"),
        "text": ("train", "text", *small, f"--path={path}"), "arrays": ("train", "arrays", *small, f"--path={path}"),
        **{flag: ("train", "copy", *small, f"--{flag}", path) for flag in ("init", "config")},
    }  # fmt: skip
    call(*lines.get(command, (command, path)))


# Files


@st.composite
def mangled(draw, whole):
    """Bytes near some whole ones, cut or changed, or others altogether."""
    data = bytearray(whole)
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    kind = draw(st.sampled_from(["cut", "insert", "double", "other"]))
    if kind == "other":
        return draw(st.binary(max_size=60))
    data[at : None if kind == "cut" else at] = data[at : at + 60] if kind == "double" else draw(st.binary(max_size=9))
    return bytes(data)


@st.composite
def changed(draw, whole):
    """The JSON of a dictionary with a value in it, however deep, replaced or gone."""
    value = node = json.loads(json.dumps(whole))
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        if not (isinstance(node[key], dict | list) and node[key]) or draw(st.booleans()):
            break
        node = node[key]
    if isinstance(node, list) or draw(st.booleans()):
        node[key] = draw(JSON)
    else:
        del node[key]
    return json.dumps(value).encode("utf-8", "replace")


CONFIG = '[task]\nkind = "copy"\nlength = 3\nbatch = 2\n[model]\nhidden = 8\n[gradient]\nprobes = 3\n[run]\nsteps = 1\n'
LINES = st.sampled_from(
    ["[task]", "[optm]", "[a.b]", "format = 2", "recipe = 3", "=", "\ufeff", "\0", "steps = 1979-05-27"]
)
TOML = st.lists(LINES | st.sampled_from([*CONFIG.splitlines()]), max_size=6).map("\n".join).map(str.encode)


@given(TOML | mangled(CONFIG.encode()), st.booleans())
@examples(25)
def test_any_config_is_taken_or_refused(content, train):
    Path("config.toml").write_bytes(content)
    small = ("--batch", 2, "--probes", 2, "--hidden", 8, "--layers", 1, "--length", 2, "--steps", 1, "--run-dir", "new")
    call(*(("train", "copy", *small) if train else ("show",)), "--config", "config.toml")


def saved_array(save, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


SERIES = np.sin(np.arange(120.0)).reshape(4, 15, 2).astype(np.float32)
DATA = {
    "text.txt": b"one line, and then another one of the same kind.\n" * 3,
    "text.jsonl": b"".join(b'{"text": "line %d of many", "id": {"a": null}}\r\n' % i for i in range(12)),
    "array.npy": saved_array(np.save, arr=SERIES),
    "array.npz": saved_array(np.savez, inputs=SERIES, targets=np.array([0, 1, 2, 1]), lengths=np.full(4, 15)),
    "table.csv": b'series;x;y\n"",?,1\n'
    + b"".join(b"%d;%d,5;01/%02d/2020\n" % (i % 2, i * i, i) for i in range(1, 30)),
}


@given(st.data(), st.sampled_from(sorted(DATA)), st.sampled_from(["byte", "char", "word"]))
@examples(37)
def test_any_data_are_learned_or_refused(data, name, tokenizer):
    Path(name).write_bytes(data.draw(mangled(DATA[name])))
    recipe, more = ("text", ("--tokenizer", tokenizer)) if name.startswith("text") else ("arrays", ())
    call("train", recipe, "--path", name, *TINY[2:], "--length", 4, "--steps", 1, *more, "--run-dir", "new")


@given(
    st.sampled_from(["inputs", "targets", "mask", "lengths", "held_out", "labels"]),
    st.lists(st.sampled_from([0, 1, 4, 15]), max_size=4),
    st.sampled_from(["bool", "i1", "u8", "f2", "f8", "c8", "S3", "O", "M8[s]", "V4"]),
)
@examples(20)
def test_any_type_and_shape_of_arrays_is_learned_or_refused(name, shape, kind):
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(kind)
    np.savez("array.npz", **({"inputs": SERIES} | {name: array}))
    call("train", "arrays", "--path", "array.npz", *TINY[2:], "--length", 4, "--steps", 1, "--run-dir", "new")


def test_archives_that_lie():
    """An .npz whose members are no arrays, or promise more than there is memory for."""
    header = b"\x93NUMPY\x01\x00v\x00"
    header += b"{'descr': '<f8', 'fortran_order': False, 'shape': (2000000000000,), }".ljust(117) + b"\n"
    for content in (b"", b"nothing", header, header + b"\0" * 64):
        with zipfile.ZipFile("array.npz", "w") as archive:
            archive.writestr("inputs.npy", content)
        Path("array.npy").write_bytes(content)
        for name in ("array.npz", "array.npy"):
            assert call("train", "arrays", "--path", name, "--run-dir", "new")[0] in (1, 2)


# Runs and models

RUN_FILES = [
    "config.toml", "environment.json", "status.json", "metrics.jsonl", "journal",
    "checkpoints/step-00000004/state.json", "checkpoints/step-00000004/model.safetensors",
]  # fmt: skip
USES = [
    ("eval", "run"), ("export", "run", "--to", "x.safetensors"), ("replay", "run", "--checksum"), ("show", "run"),
    ("runs", "."), ("train", "--run-dir", "run", "--resume", "--steps", "5"),
    (*TRAIN, "--init", "run", "--steps", "1", "--run-dir", "new"),
]  # fmt: skip


@given(st.data(), st.sampled_from(RUN_FILES), st.sampled_from(USES))
@examples(37)
def test_any_damage_to_a_run_is_said(tiny, data, name, use):
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree(tiny, "run")
    whole = Path("run", name).read_bytes()
    options = [mangled(whole)]
    if name.endswith("json"):
        options.append(changed(json.loads(whole)))
    if name.endswith("jsonl"):
        options.append(changed(json.loads(whole.splitlines()[0])).map(lambda row: row + b"\n" + whole))
    Path("run", name).write_bytes(data.draw(st.one_of(*options, TOML)))
    call(*use)


@given(st.data(), st.sampled_from([("eval",), ("export", "--to", "x.safetensors"), (*TRAIN, "--init")]))
@examples(20)
def test_any_model_file_is_read_or_refused(tiny, data, use):
    export(open_model(tiny), Path("model.safetensors"))
    whole = Path("model.safetensors").read_bytes()
    about = json.loads(json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["reroll"])
    others = changed(about).map(lambda value: save(load(whole), {"reroll": value.decode()}))
    Path("model.st").write_bytes(data.draw(mangled(whole) | others))
    call(*(*use, "model.st", "--run-dir", "new") if use[-1] == "--init" else (use[0], "model.st", *use[1:]))
