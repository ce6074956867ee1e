"""The command line: parse, call, print.

    reroll COMMAND …          `reroll` alone lists the commands, each with an example

Every mistake is reported in one line that names the argument, its value and the remedy. Exit codes: 0 success, 1 a
failure while running, 2 a request that could not be carried out as written. A traceback is printed only with --debug.
Nothing heavy is imported before a command needs it.
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
    "train": ("train", "train a recipe, with your own settings and data", "reroll train copy --steps 300"),
    "demo": ("demo", "compare CD-RGE with backprop on real text, in two minutes", "reroll demo"),
    "recipes": ("show", "list what can be trained", "reroll recipes"),
    "show": ("show", "show the config of a recipe or run, and where each value is from", "reroll show copy --lr 0.2"),
    "runs": ("runs", "list the runs under a folder and their progress; stop a run", "reroll runs --follow"),
    "eval": ("models", "score a model on its held-out data or on another file", "reroll eval RUN --path more.txt"),
    "sample": ("models", "generate text from a prompt", 'reroll sample RUN --prompt "The "'),
    "forecast": ("forecast", "predict the next rows of a series, in its own units", "reroll forecast RUN --steps 24"),
    "export": ("models", "write a model as safetensors, with its config", "reroll export RUN --to model.safetensors"),
    "replay": ("models", "rebuild the weights of any step, without the data", "reroll replay RUN --to 100 --checksum"),
    "data": ("data", "prepare files to train on", "reroll data prepare eigenworms --path FOLDER"),
    "bench": ("bench", "measure speed and memory, as ratios within one run", "reroll bench zeroth"),
    "reproduce": ("bench", "measure the papers' claims on this machine", "reroll reproduce --list"),
    "records": ("records", "show, verify or submit records of the speedruns", "reroll records show cpu-bytes"),
    "doctor": ("doctor", "check this machine, and say how to fix what is missing", "reroll doctor"),
}
"""Every command: the module here whose `run(command, arguments)` implements it, what it does, an example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for handler in logging.root.handlers:
        handler.setFormatter(_Visible())
    for stream in (sys.stdout, sys.stderr):
        # A character the terminal cannot show, or a file name that is not valid text, must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        sys.stdout.flush()  # so that a failed write is reported here, not when Python exits
        return code
    except SystemExit as end:  # after --help
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:
        # Whoever read our output is gone (`reroll runs | head`): there is nobody to report to.
        _drop_output()
        return 0
    except KeyboardInterrupt as interrupt:
        print(visible(" ".join(["Interrupted.", *map(str, interrupt.args)])), file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"error: {visible(explain(error))}", file=sys.stderr)
        _drop_output()
        return error.exit_code if isinstance(error, RerollError) else 1


class _Visible(logging.Formatter):
    """Makes control characters visible: the folder names in a warning could hold terminal commands."""

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
        raise UsageError(f'command "{command}" is unknown.{did_you_mean(command, COMMANDS)}')
    module = importlib.import_module(f"reroll.cli.{COMMANDS[command][0]}")
    return module.run(command, arguments[1:])


def _drop_output() -> None:
    """Discard output that cannot be written; otherwise Python would try again at exit and print an error of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: Exception) -> str:
    """Return one line about an error: ours as it is, common system errors in words, others with their type."""
    if isinstance(error, RerollError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        where = f" ({' '.join(str(error.filename).split())})" if error.filename else ""
        full = " Free some space, or choose another folder with --run-dir." if error.errno == errno.ENOSPC else ""
        return f"{error.strerror}{where}.{full}"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return (
            f"Out of memory: {text[:120] or 'an array did not fit'}. Lower --batch, --length or --hidden; with probes "
            "also gradient.micro_batch or gradient.chunk (--set gradient.micro_batch=8)."
        )
    return f"{type(error).__name__}: {text[:300]} (run again with --debug for the traceback)"


def overview() -> str:
    """Return what `reroll --help` prints."""
    lines = [
        "reroll: train sequence models by forward passes alone, in parallel along time,",
        "or by backpropagation.",
        "",
        "start here:   reroll train     (a small model, on the text of Python's own docs)",
        "",
        "commands:",
    ]
    lines += [f"  {name:<10} {about}\n             $ {example}" for name, (_, about, example) in COMMANDS.items()]
    lines += ["", "Details: reroll COMMAND --help. Exit codes: 2 for a mistake, 1 for a failure."]
    return "\n".join(lines)
