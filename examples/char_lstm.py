"""A character LSTM on the prose of Python's own documentation, by CD-RGE: config, run, load, sample.

A recipe is plain data; this one is the demo's, made smaller. What it leaves is a run folder, as `reroll train` does.

    python examples/char_lstm.py --steps 200
"""

import argparse
import math
import tempfile
from pathlib import Path

from reroll.recipes import RECIPES
from reroll.train.load import open_model
from reroll.train.loop import train


def main(steps: int) -> dict[str, float]:
    config = RECIPES["demo"]().replace(
        recipe="char_lstm",
        task={"batch": 16, "eval_batches": 8},
        model={"hidden": 48},
        optim={"schedule": "constant"},
        run={"steps": steps},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        summary = train(config, path)
        trained = open_model(path)  # reroll.load(path) gives the model alone
    assert trained.tokenizer is not None
    prompt = trained.tokenizer.encode("The ").tolist()
    text = trained.tokenizer.decode(trained.model.generate(prompt, 120, temperature=0.6, seed=0).tolist())
    uniform = math.log2(trained.tokenizer.size)
    print(f"{summary['state']}: {summary['reason']}")
    print(f"held-out {summary['valid_bits']:.3f} bits per character; knowing nothing would take {uniform:.3f}")
    print(f"a sample: {'The ' + text!r}")
    return {"bits": summary["valid_bits"], "uniform": uniform}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    result = main(parser.parse_args().steps)
