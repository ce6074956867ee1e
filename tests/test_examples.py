"""Every script in examples/ is run as a user runs it, with fewer steps, and must reach what it says it shows."""

import math
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script of the folder, away from it, and return what it found."""

    def start(name, steps):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, "--steps", str(steps)])
        found = runpy.run_path(str(EXAMPLES / name), run_name="__main__")["result"]
        assert not any(tmp_path.iterdir()), "an example leaves nothing behind where it is run"
        return found

    return start


def test_own_model(run, capsys):
    """Hard steps and the error rate: nothing here has a gradient, and the error on held-out points still falls."""
    found = run("own_model.py", 25)
    assert 0.4 < found["before"] < 0.6
    assert found["after"] < 0.36  # always answering "inside" is wrong for 57 % of the points, "outside" for 43 %
    assert f"{found['after']:.3f} after" in capsys.readouterr().out


def test_own_loop(run):
    found = run("own_loop.py", 20)
    assert abs(found["cosine"] - found["expected"]) < 0.02
    assert found["expected"] == pytest.approx(math.sqrt(256 / (256 + 257 - 1)))
    assert found["last"] < 0.8 * found["first"]


def test_own_cell(run):
    """Both estimators train the same cell; the answer's own variance is 1/3."""
    losses = run("own_cell.py", 100)
    for method in ("probes", "backprop"):
        assert len(losses[method]) == 100
        assert losses[method][0] > 1 / 3
        assert losses[method][-1] < 0.2


def test_char_lstm(run, capsys):
    found = run("char_lstm.py", 15)
    assert found["bits"] < found["uniform"] - 0.8
    assert "a sample: 'The " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of theirs
def test_hugging_face(run):
    for package in ("transformers", "accelerate", "peft"):
        pytest.importorskip(package, reason=f"the example is for {package}")
    found = run("hugging_face.py", 12)
    assert found["trainer"] < math.log(16) - 0.05  # the mean over the run; the first loss is that of guessing
    assert found["after"] < found["before"]


def test_every_example_is_short_and_tested():
    for path in EXAMPLES.glob("*.py"):
        assert f"test_{path.stem}" in globals(), f"{path.name} has no test here"
        assert len(path.read_text().splitlines()) < 60, f"{path.name} is to be copied; keep it short"
