"""`eval`, `sample`, `export` and `replay`: what can be done with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from reroll.cli.flags import parse
from reroll.errors import UsageError

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Eval:
    model: Annotated[str, Positional]
    """a run folder, the name of one under runs/, or a file of `reroll export`"""
    path: str | None = None
    """data to score instead of the run's own held-out part: all of the file's validation part"""
    split: str | None = None
    """valid, test or longer; none: the first there is"""


@dataclass(frozen=True)
class Sample:
    model: Annotated[str, Positional]
    """a run folder, the name of one under runs/, or a file of `reroll export`"""
    prompt: str = ""
    """text to go on with; none: a newline, or the first symbol"""
    length: int = 200
    """symbols to add"""
    temperature: float = 0.8
    """towards 0: the most likely symbols only; 1: as the model says"""
    top_k: int | None = None
    """draw from so many most likely symbols only"""
    seed: int = 0
    """another seed, another text"""


@dataclass(frozen=True)
class Export:
    model: Annotated[str, Positional]
    """a run folder, or the name of one under runs/"""
    to: Path = Path("model.safetensors")
    """the file to write; its config goes beside it"""


@dataclass(frozen=True)
class Replay:
    run: Annotated[str, Positional]
    """a run folder trained by probes, or the name of one under runs/"""
    to: int | None = None
    """steps to replay; none: all"""
    checksum: bool = False
    """print the weights' checksum, alone on the last line"""
    out: Path | None = None
    """write the weights to this file, as `reroll export` does"""


REQUESTS: dict[str, type[Any]] = {"eval": Eval, "sample": Sample, "export": Export, "replay": Replay}
ABOUT = {
    "eval": "Score a model on held-out data.",
    "sample": "Let a model of symbols go on with a prompt.",
    "export": "Write a model as safetensors, with its config beside it.",
    "replay": "Make the weights of a step again from seed and journal, without the data.",
}


def run(command: str, arguments: Sequence[str]) -> int:
    request = parse(REQUESTS[command], arguments, f"reroll {command}", ABOUT[command])
    return {"eval": _eval, "sample": _sample, "export": _export, "replay": _replay}[command](request)


def _eval(request: Eval) -> int:
    from dataclasses import replace

    from reroll.train.build import build_task
    from reroll.train.evaluate import evaluate
    from reroll.train.load import open_model

    loaded = open_model(request.model)
    config = loaded.config.task
    if request.path is not None:
        if config.path is None:
            raise UsageError(f"--path {request.path}: {request.model} was trained on generated sequences; drop --path.")
        config = replace(config, path=request.path)
    task = build_task(replace(config, eval_batches=0), loaded.config.run.seed, loaded.tokenizer)
    split = request.split or task.splits[0]
    if split not in task.splits:
        raise UsageError(f'split="{split}" is not there; this task has {", ".join(task.splits)}.')
    found = evaluate(loaded.model, task, split)
    print(f"{split}, after {loaded.step} steps: " + "  ".join(f"{name} {value:.6g}" for name, value in found.items()))
    return 0


def _sample(request: Sample) -> int:
    from reroll.train.load import open_model

    loaded = open_model(request.model)
    encode, decode, start = _symbols(loaded)
    prompt = encode(request.prompt) if request.prompt else start
    new = loaded.model.generate(prompt, request.length, request.temperature, request.top_k, request.seed)
    print(request.prompt + decode(new.tolist()))
    return 0


def _symbols(loaded: Any) -> tuple[Any, Any, list[int]]:
    """How text becomes symbols and back, for a model of text or of a generated task; and what to begin with."""
    if loaded.tokenizer is not None:
        start = loaded.tokenizer.encode("\n").tolist() or [0]
        return lambda text: loaded.tokenizer.encode(text).tolist(), loaded.tokenizer.decode, start
    from reroll.train.build import build_task

    if loaded.model.vocab is None:
        raise UsageError("sample needs a model of symbols; this one reads real-valued series.")
    task = build_task(loaded.config.task, loaded.config.run.seed)
    return task.encode, task.decode, [0]


def _export(request: Export) -> int:
    from reroll.train.load import export, open_model

    written = export(open_model(request.model), request.to)
    print(f"written: {', '.join(map(str, written))}")
    return 0


def _replay(request: Replay) -> int:
    from reroll.train import checkpoint
    from reroll.train.load import Loaded, export
    from reroll.train.replay import replay
    from reroll.train.run import find_run, read_config

    path = find_run(request.run)
    model, steps = replay(path, request.to)
    print(f"replayed {steps} steps of {path}")
    if request.out is not None:
        from reroll.data.tokenizers import from_dict
        from reroll.train.run import read_json

        saved = read_json(path / "environment.json").get("tokenizer")
        loaded = Loaded(model, read_config(path), from_dict(saved) if saved else None, steps)
        print(f"written: {', '.join(map(str, export(loaded, request.out)))}")
    if request.checksum:
        print(checkpoint.checksum(checkpoint.weights_of(model)))
    return 0
