"""The speedrun's history retold on two cores: one technique after another on `cpu-bytes`, by held-out loss.

    python benchmarks/ablation.py [ROW …] --json FILE [--figure FILE.svg]

Every row has the steps, batches and threads of the others, and five seeds. Runs that the file has are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import Any

from reroll.data.cache import replacing
from reroll.recipes import cpu_bytes
from reroll.train.config import Config

STEPS, SEEDS = 150, 5
GPT2 = {
    "position": "learned", "qk_norm": False, "activation": "gelu", "zero_init": False, "tied": True,
    "embed_norm": False,
}  # fmt: skip
ADAMW = {
    "kind": "adamw", "lr": 0.0006, "embedding_lr": None, "head_lr": None, "vector_lr": None, "betas": (0.9, 0.95),
    "weight_decay": 0.1, "clip": 1.0, "schedule": {"kind": "cosine", "warmup": 15},
}  # fmt: skip
TUNED = {"lr": 0.001, "weight_decay": 0.0, "clip": None, "schedule": {"kind": "linear", "warmup": 10, "warmdown": 45}}
MUON = {
    "kind": "muon", "lr": 0.04, "embedding_lr": 0.001, "head_lr": 0.001, "momentum": 0.95,
    "betas": (0.9, 0.95), "adjust_lr_fn": "original", "schedule": {"kind": "linear", "warmup": 0, "warmdown": 45},
}  # fmt: skip
ADDED: dict[str, dict[str, Any]] = {
    "GPT-2 by AdamW": {"model": GPT2, "optim": ADAMW},
    "tuned learning rate": {"optim": TUNED},
    "rotary, QK-norm, ReLU²": {"model": {"position": "rotary", "qk_norm": True, "activation": "relu2"}},
    "zero initialisation": {"model": {"zero_init": True}},
    "Muon": {"optim": MUON},
    "untied head, norm of the embedding": {
        "model": {"tied": False, "embed_norm": True}, "optim": {"embedding_lr": 0.3, "head_lr": 0.01},
    },
    "momentum warm-up": {"optim": {"momentum_warmup": 50}},
}  # fmt: skip
"""What every row changes in the row before; the first one, in the recipe."""
INSTEAD: dict[str, dict[str, Any]] = {
    "12 Newton–Schulz steps": {"optim": {"ns_coefficients": "polar_express", "ns_steps": 12}},
    "exact polar factor (SVD)": {"optim": {"ns_coefficients": "svd"}},
    "Polar Express": {"optim": {"ns_coefficients": "polar_express"}},
    "Turbo-Muon, 4 steps": {"optim": {"ns_coefficients": "turbo"}},
    "rows normalised (MuonEq-R)": {"optim": {"normalize_rows": True}},
    "NorMuon": {"optim": {"beta2": 0.95}},
    "AdamW, its rate tuned": {"optim": {**ADAMW, **TUNED, "lr": 0.004, "embedding_lr": 0.3, "head_lr": 0.01}},
    "LSTM": {
        "model": {"kind": "lstm", "layers": 1, "heads": 1, "hidden": 384, "embed": 128, "rollout": "auto"},
        "optim": {"vector_lr": 0.01},
    },
    "GRU": {
        "model": {"kind": "gru", "layers": 1, "hidden": 384, "embed": 128, "rollout": "auto"},
        "optim": {"vector_lr": 0.01},
    },
}
"""What other rows change in the last one."""


def configs() -> dict[str, Config]:
    """Return the config of every row."""
    config, rows = cpu_bytes().replace(run={"steps": STEPS, "eval_every": None, "threads": 1}), {}
    for name, changes in ADDED.items():
        rows[name] = config = config.replace(**changes)
    return rows | {name: config.replace(**changes) for name, changes in INSTEAD.items()}


def measure(job: tuple[str, Config]) -> tuple[str, dict[str, Any]]:
    """Train one run; return its name, and what it reached."""
    import torch

    from reroll.train import train

    torch.set_num_threads(1)
    name, config = job
    with tempfile.TemporaryDirectory() as folder:
        summary = train(config, Path(folder) / "run")
    return name, {
        "row": name, "seed": config.run.seed, "loss": summary["valid_loss"], "seconds": summary["total_seconds"],
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> str:
    """Return the rows as a table of Markdown: means and standard deviations over seeds."""
    lines = ["| row | held-out loss, nats per byte | seconds |", "|---|---|---|"]
    for name in configs():
        losses, seconds = ([run[key] for run in runs if run["row"] == name] for key in ("loss", "seconds"))
        if len(losses) > 1:
            spread = statistics.stdev(losses)
            lines.append(f"| {name} | {statistics.mean(losses):.3f} ± {spread:.3f} | {statistics.mean(seconds):.0f} |")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw a bar for the mean of every row, and a dot for every seed."""
    from matplotlib.figure import Figure

    names = [name for name in configs() if any(run["row"] == name for run in runs)]
    figure = Figure(figsize=(8, 0.42 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        losses = [run["loss"] for run in runs if run["row"] == name]
        axes.barh(place, statistics.mean(losses), color="#4c72b0" if name in ADDED else "#b0b7c3")
        axes.plot(losses, [place] * len(losses), ".", color="black", markersize=4)
        axes.annotate(f" {statistics.mean(losses):.2f}", (max(losses), place), va="center")
    axes.set_yticks(range(len(names)), [f"+ {name}" if name in list(ADDED)[1:] else name for name in names])
    axes.invert_yaxis()
    axes.set_xlabel(f"held-out loss after {STEPS} steps, nats per byte (blue: each row adds to the one above)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    request = parser.parse_args()
    done = json.loads(request.json.read_text()) if request.json.exists() else {"runs": []}
    had = {(run["row"], run["seed"]) for run in done["runs"]}
    every = [(name, config.replace(run={"seed": seed})) for seed in range(SEEDS) for name, config in configs().items()]
    jobs = [(n, c) for n, c in every if (not request.rows or n in request.rows) and (n, c.run.seed) not in had]
    with multiprocessing.get_context("spawn").Pool(request.workers, maxtasksperchild=1) as pool:
        for _, run in pool.imap_unordered(measure, jobs, chunksize=1):
            done["runs"].append(run)
            with replacing(request.json) as file:
                file.write(f"{json.dumps(done, indent=1)}\n".encode())
            print(f"{run['row']}, seed {run['seed']}: {run['loss']:.4f} in {run['seconds']:.0f} s", flush=True)
    print(table(done["runs"]))
    if request.figure is not None:
        draw(done["runs"], request.figure)


if __name__ == "__main__":
    main()
