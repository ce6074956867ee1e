"""The command line called in process, and what its tests compare."""

from typing import NamedTuple

from reroll.train import checkpoint

TINY = (
    *("--length", "3", "--batch", "2", "--hidden", "8", "--steps", "4", "--probes", "3"),
    *("--schedule", "constant"),  # else a step would depend on how many are to come
    *("--set", "model.embed=4", "run.checkpoint_every=1", "run.eval_every=4", "run.threads=1"),
)
TRAIN = ("train", "copy", *TINY)
"""A run of a tenth of a second, with a checkpoint after each of its four steps."""
BACKPROP = (*TRAIN[: TRAIN.index("--probes")], *TRAIN[TRAIN.index("--probes") + 2 :], "--gradient", "backprop")


class Result(NamedTuple):
    """What a call of the command line came to."""

    code: int
    out: str
    err: str

    @property
    def error(self):
        """The one line of a mistake."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), lines
        assert "--debug" not in lines[0], f"an error nobody thought of: {lines[0]}"
        return lines[0]


def weights_of(path):
    """The checksum of the weights in the newest checkpoint of a run."""
    return checkpoint.checksum(checkpoint.newest(path / "checkpoints").weights)


def contents(path):
    """Every file under a folder with its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
