"""The command line: parse, call, print.

    reroll COMMAND …          `reroll` alone lists the commands, each with an example

Every mistake is one line that names the argument, its value and the remedy. Exit codes: 0; 1 if something failed while
it ran; 2 if it could not be started as asked. A traceback is printed with --debug only. Nothing heavy is imported
before a command needs it.
"""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from reroll.errors import RerollError, UsageError, did_you_mean, visible

COMMANDS = {
    "train": ("train", "train a recipe: a model, on a task, by a gradient", "reroll train copy --steps 300"),
    "demo": ("demo", "two minutes on real text, CD-RGE beside backprop, with a result", "reroll demo"),
    "recipes": ("show", "what can be trained, a line each", "reroll recipes"),
    "show": ("show", "the config of a recipe or run, and where its values are from", "reroll show copy --lr 0.2"),
    "runs": ("runs", "every run under a folder, and how it is doing; stop one", "reroll runs --follow"),
    "eval": ("models", "score a run or file on held-out data, or on a file", "reroll eval RUN --path more.txt"),
    "sample": ("models", "generate text from a prompt", 'reroll sample RUN --prompt "The "'),
    "forecast": ("forecast", "the rows that follow a series, in its own units", "reroll forecast RUN --steps 24"),
    "export": ("models", "write a model as safetensors and config", "reroll export RUN --to model.safetensors"),
    "replay": ("models", "the weights of any step again, without the data", "reroll replay RUN --to 100 --checksum"),
    "data": ("data", "turn files of an archive into one to train on", "reroll data prepare eigenworms --path FOLDER"),
    "bench": ("bench", "speed and memory as ratios, measured in one run", "reroll bench zeroth"),
    "reproduce": ("bench", "the claims of the papers, measured here", "reroll reproduce --list"),
    "doctor": ("doctor", "what this machine has, and how to mend what it lacks", "reroll doctor"),
}
"""Every command: the module here whose `run(command, arguments)` carries it out, what it does, an example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for handler in logging.root.handlers:
        handler.setFormatter(_Visible())
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character, or the name of a file that is no text, must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        sys.stdout.flush()  # what cannot be written is an error here, and not at the end of Python
        return code
    except SystemExit as end:  # after --help
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:
        # The reader of our output has gone (`reroll runs | head`); there is nobody to tell.
        _drop_output()
        return 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"error: {visible(explain(error))}", file=sys.stderr)
        _drop_output()
        return error.exit_code if isinstance(error, RerollError) else 1


class _Visible(logging.Formatter):
    """Warnings name folders, whose names could command a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(record.getMessage())


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        from reroll import __version__

        print(__version__)
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        raise UsageError(f'"{command}" is no command.{did_you_mean(command, COMMANDS)}')
    module = importlib.import_module(f"reroll.cli.{COMMANDS[command][0]}")
    return module.run(command, arguments[1:])


def _drop_output() -> None:
    """Let go of output that cannot be written; else Python tries again when it ends, and has an error of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: Exception) -> str:
    """Return one line about an error: ours as it is, the usual ones of the system in words, others with their name."""
    if isinstance(error, RerollError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = f" ({' '.join(str(error.filename).split())})" if error.filename else ""
        full = " Free some space, or name another folder with --run-dir." if error.errno == errno.ENOSPC else ""
        return f"{error.strerror}{where}.{full}"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return (
            f"Out of memory: {text[:120] or 'an array did not fit'}. Lower --batch, --length or --hidden; with probes, "
            "set gradient.micro_batch or gradient.chunk lower (--set gradient.micro_batch=8)."
        )
    return f"{type(error).__name__}: {text[:300]} (run again with --debug for the traceback)"


def overview() -> str:
    """Return what `reroll --help` prints."""
    lines = [
        "reroll: train sequence models by forward passes alone, in parallel along time, or by backpropagation.",
        "",
        "start here:   reroll train                trains a small model on text that every Python brings along",
        "",
        "commands:",
    ]
    lines += [f"  {name:<10} {about}\n             $ {example}" for name, (_, about, example) in COMMANDS.items()]
    lines += ["", "`reroll COMMAND --help` says more about one. A mistake ends with exit code 2, a failure with 1."]
    return "\n".join(lines)
