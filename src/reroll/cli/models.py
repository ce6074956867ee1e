"""`eval`, `sample`, `export` and `replay`: what can be done with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reroll.cli.flags import as_flags, parse, positional
from reroll.errors import UsageError, visible
from reroll.specs.base import option

if TYPE_CHECKING:
    from reroll.train.load import Loaded


@dataclass(frozen=True)
class Eval:
    model: str = positional("a run folder, the name of one under runs/, or a file of `reroll export`")
    path: str | None = option(
        None,
        "data to score instead of the run's own held-out part: all of it; of files named train and valid, the latter",
    )
    split: str | None = option(None, "valid, test or longer; none: the first there is")


@dataclass(frozen=True)
class Sample:
    model: str = positional("a run folder, the name of one under runs/, or a file of `reroll export`")
    prompt: str = option("", "text to continue; none: a newline, or the first symbol")
    length: int = option(200, "symbols to add")
    temperature: float = option(0.8, "towards 0: the most likely symbols only; 1: as the model says")
    top_k: int | None = option(None, "draw from so many most likely symbols only")
    seed: int = option(0, "another seed, another text")


@dataclass(frozen=True)
class Export:
    model: str = positional("a run folder, or the name of one under runs/")
    to: Path = option(Path("model.safetensors"), "the file to write; its config goes beside it")


@dataclass(frozen=True)
class Replay:
    run: str = positional("a run folder trained by probes, or the name of one under runs/")
    to: int | None = option(None, "steps to replay; none: all")
    checksum: bool = option(False, "print the weights' checksum, alone on the last line")
    out: Path | None = option(None, "write the weights to this file, as `reroll export` does")


REQUESTS: dict[str, type[Any]] = {"eval": Eval, "sample": Sample, "export": Export, "replay": Replay}
ABOUT = {
    "eval": "Score a model on held-out data.",
    "sample": "Generate text from a prompt.",
    "export": "Write a model as safetensors, with its config beside it.",
    "replay": "Make the weights of a step again from seed and journal, without the data.",
}


def run(command: str, arguments: Sequence[str]) -> int:
    request = parse(REQUESTS[command], arguments, f"reroll {command}", ABOUT[command])
    return {"eval": _eval, "sample": _sample, "export": _export, "replay": _replay}[command](request)


def _eval(request: Eval) -> int:
    from reroll.outcome import Outcome
    from reroll.rollout.monitor import monitoring
    from reroll.train.evaluate import evaluate
    from reroll.train.load import open_model

    loaded = open_model(request.model)
    task = task_of(loaded, request)
    split = request.split or task.splits[0]
    if split not in task.splits:
        raise UsageError(f'split="{split}" is not there; this task has {", ".join(task.splits)}.')
    with monitoring() as rollouts:
        scores = evaluate(loaded.model, task, split, progress=_progress)
    part = split if "train" in getattr(task, "tokens", {}) else "all of it"  # files named after splits keep them
    what = split if request.path is None else f"{request.path} ({part})"
    print(f"{what}, after {loaded.step} steps: " + "  ".join(f"{name} {value:.6g}" for name, value in scores.items()))
    for note in _notes(loaded, task, split, request):
        print(note)
    if rollouts.fell_back:
        print(f"{rollouts.fell_back} evaluations of a sequence: {Outcome.fell_back.value}")
    return 0


def _progress(done: int, batches: int) -> None:
    """On a terminal, a line that is written over, and erased at the end."""
    if sys.stderr.isatty():
        line = f"\r{done}/{batches} batches" if done < batches else "\r\033[K"
        print(line, end="", file=sys.stderr, flush=True)


def task_of(loaded: Any, request: Any) -> Any:
    """What to score: the run's own task, or all of another file of the same kind."""
    from dataclasses import replace

    from reroll.models import Interface
    from reroll.specs.task import FileTask

    spec = loaded.config.task
    if isinstance(spec, FileTask):
        spec = replace(spec, eval_batches=0)
    if request.path is None:
        return spec.build(loaded.config.run.seed, loaded.tokenizer, units=loaded.units)
    if not isinstance(spec, FileTask):
        raise UsageError(f"--path {request.path}: {request.model} was trained on generated sequences; drop --path.")
    spec = replace(spec, path=request.path)
    with as_flags({"path"}):
        task = spec.build(loaded.config.run.seed, loaded.tokenizer, units=loaded.units, whole=True)
    data, wanted = Interface.of(task), Interface.of(loaded.model)
    if data.inputs != wanted.inputs:
        raise UsageError(
            f"--path {request.path} has {data.inputs} columns of numbers, but {request.model} reads {wanted.inputs}; "
            f"give a file with {wanted.inputs}."
        )
    fewer = task.categorical and data.outputs <= wanted.outputs  # not every class need be in the file
    if data.readout != wanted.readout or not (fewer or data.outputs == wanted.outputs):
        raise UsageError(
            f"--path {request.path} asks for {data.outputs} outputs ({_place(data)}), but {request.model} gives "
            f"{wanted.outputs} ({_place(wanted)}); give a file whose targets are those of the training."
        )
    return task


def _place(sizes: Any) -> str:
    return "at every step" if sizes.readout == "every" else "for every series"


def _notes(loaded: Any, task: Any, split: str, request: Eval) -> list[str]:
    """How much was scored, and what of the data the model cannot know."""
    notes, seen = [], getattr(loaded.config.task, "eval_batches", 0)
    if getattr(task, "predicts", "") == "next" and (rules := task.baselines(split)):
        notes.append("loss without training: " + "  ".join(f"{rule} {loss:.6g}" for rule, loss in rules.items()))
    if request.path is None and 0 < seen < task.batches(split):
        notes.append(f"All {task.batches(split)} batches are scored; scores while training are of the first {seen}.")
    if loaded.tokenizer is not None and loaded.tokenizer.has_unknown:
        tokens = task.tokens[split]
        count = int((tokens == 0).sum())
        if count:
            share = f"{count:,} of {len(tokens):,} symbols ({100 * count / len(tokens):.2f} %)"
            notes.append(f"{share} were not in the vocabulary of the training; all of them count as one symbol.")
    if request.path is not None and task.inputs is not None and loaded.units is None:
        notes.append("The run does not say in what units it was trained: the file was read in units of its own.")
    return notes


def _sample(request: Sample) -> int:
    from reroll.models.generate import generate
    from reroll.rollout.monitor import monitoring
    from reroll.train.load import open_model

    loaded = open_model(request.model)
    encode, decode, start = _symbols(loaded)
    _refuse_unknown(loaded, request.prompt)
    prompt = encode(request.prompt) if request.prompt else start
    with monitoring():  # fallbacks are not reported beside generated text
        new = generate(loaded.model, prompt, request.length, request.temperature, request.top_k, request.seed)
    print(visible(request.prompt + decode(new.tolist())))
    return 0


def _refuse_unknown(loaded: Loaded, prompt: str) -> None:
    if loaded.tokenizer is None:
        return
    unknown = loaded.tokenizer.unknown(prompt)
    if unknown and loaded.tokenizer.name == "char":
        raise UsageError(
            f"--prompt: {', '.join(map(repr, unknown))} {'is' if len(unknown) == 1 else 'are'} not among the "
            f"{loaded.tokenizer.size - 1} characters the model was trained with; leave out what it cannot know."
        )
    if unknown:
        print(f"--prompt: read as <unk>, since the model does not know them: {', '.join(unknown)}", file=sys.stderr)


def _symbols(loaded: Any) -> tuple[Any, Any, list[int]]:
    """How text becomes symbols and back, for a model of text or of a generated task; and what to begin with."""
    if loaded.tokenizer is not None:
        start = loaded.tokenizer.encode("\n").tolist() or [0]
        return lambda text: loaded.tokenizer.encode(text).tolist(), loaded.tokenizer.decode, start
    if loaded.model.vocab is None:
        raise UsageError("sample needs a model of symbols; this one reads real-valued series.")
    task = loaded.config.task.build(loaded.config.run.seed)
    return task.encode, task.decode, [0]


def _export(request: Export) -> int:
    from reroll.train.load import export, open_model

    written = export(open_model(request.model), request.to)
    print(visible(f"written: {', '.join(map(str, written))}"))
    return 0


def _replay(request: Replay) -> int:
    from reroll.train import checkpoint
    from reroll.train.load import Loaded, export, read_about, refuse_unwritable
    from reroll.train.records import find_run, read_config, read_json
    from reroll.train.replay import replay

    path = find_run(request.run)
    if request.out is not None:
        refuse_unwritable(request.out)
    model, steps = replay(path, request.to)
    print(visible(f"replayed {steps} steps of {path}"))
    if request.out is not None:
        _, tokenizer, units = read_about(read_json(path / "environment.json"), str(path / "environment.json"))
        loaded = Loaded(model, read_config(path), tokenizer, steps, units)
        print(visible(f"written: {', '.join(map(str, export(loaded, request.out)))}"))
    if request.checksum:
        print(checkpoint.checksum(checkpoint.weights_of(model)))
    return 0
