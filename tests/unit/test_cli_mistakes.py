"""Every mistake is one line that names the argument, its value and the remedy, and leaves nothing behind."""

import os

import numpy as np
import pytest
import torch

from tests.cli import BACKPROP, TINY, contents


def mistakes(folder):
    """Arguments, exit code, and what the line must say; made where files are needed."""
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("abc")
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "latin.txt").write_bytes("naïve ".encode("latin-1") * 300)
    (folder / "nothing").mkdir()
    (folder / "lines.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    np.save(folder / "short.npy", np.zeros((1, 2), dtype=np.float32))
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.savez(folder / "no_inputs.npz", z=np.zeros(3))
    inputs = np.zeros((6, 5, 2))
    np.savez(folder / "shape.npz", inputs=inputs, targets=np.zeros(3))
    np.savez(folder / "mask.npz", inputs=inputs, mask=np.ones((6, 4)))
    (folder / "cut.npz").write_bytes((folder / "mask.npz").read_bytes()[:-30])
    (folder / "ragged.csv").write_text("a,b\n" + "1,2\n" * 29 + "1,2,3\n")
    (folder / "cut.npy").write_bytes((folder / "short.npy").read_bytes()[:-3])
    (folder / "junk.npy").write_text("these are words")
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("a,b\n")
    (folder / "words.csv").write_text("a,b\n1,2\nx,3\n")
    (folder / "old.toml").write_text("format = 0\n[optim]\nlr = 1.0\n")
    (folder / "typo.toml").write_text("[optim]\nlrr = 1.0\n")
    (folder / "bad.toml").write_text("[optim\n")
    (folder / "binary.toml").write_bytes(b"\xff\xfe\x00")
    char = ("--tokenizer", "char")
    text, arrays = ("train", "text", "--path"), ("train", "arrays", "--path")
    return [
        (("trian",), 2, ['"trian"', 'mean "train"']),
        (("train", "smokee"), 2, ['recipe "smokee"', 'mean "smoke"']),
        (("show", "smokee"), 2, ['recipe "smokee"', 'mean "smoke"']),
        (("train", "smoke", "--stpes", "3"), 2, ["--stpes is unknown. Did you mean --steps?"]),
        (("train", "smoke", "--hiden=3", "--stpes", "3"), 2, ["--hiden, --stpes are unknown. Did you mean --hidden, "]),
        ((*text, "short.txt", "--max-vocab", "300"), 2, ["--max-vocab is unknown", "mean --set task.max_vocab=300?"]),
        (("train", "smoke", "--every=1"), 2, ["mean --set run.eval_every=1, --set run.checkpoint_every=1, "]),
        (("data", "prepare", "tokens", "--every-k", "1"), 2, ["--every-k is unknown. Did you mean --every?"]),
        (("train", "smoke", "--zzz"), 2, ["--zzz is unknown. Drop it"]),
        (("train", "short.txt"), 2, ['"short.txt" is unknown. To train on the file: reroll train text --path short']),
        (("train", "short.npy"), 2, ["reroll train arrays --path short.npy"]),
        (("train", "--resume"), 2, ["--resume", "--run-dir"]),
        (("train", "--run-dir", "nope", "--resume"), 2, ["--run-dir nope has no run to resume", "train RECIPE --run"]),
        (("train", "--run-dir", "nothing", "--resume", "--lr", "1"), 2, ["--run-dir nothing has no run to resume"]),
        (("show", "runs/nope"), 2, ["'runs/nope' is not a run", "reroll runs"]),
        (("train", "copy", "--path", "short.txt"), 2, ["--path='short.txt' is for task text or arrays"]),
        (("train", "copy", "--tokenizer", "char"), 2, ["--tokenizer='char' is for task text"]),
        ((*arrays, "short.npy", *char), 2, ["--tokenizer='char' is for task text"]),
        ((*text, "short.npy"), 2, ["contains numbers", "reroll train arrays --path short.npy"]),
        ((*text, "empty.csv"), 2, ["contains numbers", "reroll train arrays --path empty.csv"]),
        ((*text, "no_inputs.npz"), 2, ["contains numbers", "reroll train arrays --path no_inputs.npz"]),
        ((*arrays, "junk.npy"), 2, ["junk.npy is no file of numbers"]),
        (("train", "smoke", "--steps"), 2, ["--steps", "argument"]),
        (("train", "smoke", "--steps", "many"), 2, ["--steps", "'many'"]),
        (("train", "smoke", "--cell", "lsmt"), 2, ["--cell='lsmt' is unknown. Did you mean \"lstm\"?"]),
        (("train", "smoke", "--set", "model.rollout.rtol=0.1"), 2, ["rtol=0.1 is for model.rollout deer or"]),
        (("train", "smoke", "--rollout", "zzz"), 2, ["--rollout='zzz' is unknown. Known: auto, deer, elk"]),
        (("train", "smoke", "--lr", "fast"), 2, ["--lr", "'fast'", "auto"]),
        (("train", "smoke", "--lr", "nan"), 2, ["--lr=nan", "a number"]),
        (("train", "smoke", "extra"), 2, ["extra"]),
        (("train", "smoke", "--config"), 2, ["--config", "argument"]),
        (("train", "smoke", "--set"), 2, ["--set", "argument"]),
        (("train", "smoke", "--set", "lr"), 2, ["--set 'lr' must be section.field=value"]),
        (("train", "smoke", "--set", "task.kind=cpoy"), 2, ["task.kind='cpoy'", 'mean "copy"']),
        (("train", "smoke", "--set", "optm.lr=1"), 2, ["optm", 'mean "optim"']),
        (("train", "smoke", "--set", "optim.lrr=1"), 2, ["optim.lrr", 'mean "lr"']),
        (("train", "smoke", "--set", "optim.lr=true"), 2, ["optim.lr=True", "a number"]),
        (("train", "smoke", "--set", "optim.lr=" + "[" * 3000), 2, ["optim.lr=", "a number"]),
        (("train", "smoke", "--set", "optim.lr=" + "9" * 5000), 2, ["optim.lr=", "a number"]),
        (("train", "smoke", "--hidden", "10", "--heads", "3"), 2, ["hidden=10", "heads=3", "divisor"]),
        (("train", "smoke", "--hidden", "1" + "0" * 30), 2, ["hidden=", "must lie in"]),
        (("train", "smoke", "--probes", "1" + "0" * 12), 2, ["probes=1000000000000", "must lie in"]),
        (("train", "smoke", "--threads", "100000"), 2, ["threads=100000", "must lie in"]),
        (("train", "smoke", "--batch", "0"), 2, ["batch=0", "must lie in"]),
        (("train", "smoke", "--batch", "-3"), 2, ["--batch=-3", "must lie in"]),
        (("train", "smoke", "--probes", "0"), 2, ["probes=0", "must lie in"]),
        (("train", "smoke", "--epsilon", "0"), 2, ["epsilon=0", "must lie in"]),
        (("train", "smoke", "--epsilon", "-0.1"), 2, ["--epsilon=-0.1", "must lie in"]),
        (("train", "smoke", "--set", "gradient.micro_batch=0"), 2, ["error: micro_batch=0", "must lie in"]),
        (("train", "smoke", "--lr", "inf"), 2, ["lr=inf", "must lie in"]),
        (("train", "smoke", "--momentum", "1.5"), 2, ["momentum=1.5"]),
        (("train", "smoke", "--seed", "-1"), 2, ["seed=-1", "[0, 2**64)"]),
        (("train", "smoke", "--device", "mps" if torch.cuda.is_available() else "cuda"), 2, ["use --device=cpu"]),
        *(
            (("train", name), 2, [f"{name.replace('-', '_')} needs a GPU", "reroll train cpu_bytes", "--device cpu"])
            for name in ("fineweb-124m", "fineweb_1b5")
            if not torch.cuda.is_available()
        ),
        (("train", "fineweb-124m", "--device", "cpu"), 2, ["reroll data prepare fineweb"]),
        (
            ("data", "prepare", "fineweb", "--tokenizer", "byte"),
            2,
            ["takes no --tokenizer, only --to, --shards. For", "prepare tokens --path X.parquet --tokenizer byte"],
        ),
        (("data", "prepare", "ts", "--path", "x.ts", "--max-vocab", "9"), 2, ["ts takes no --max-vocab, only --path"]),
        (("data", "prepare", "openwebtext", "--path", "a.txt"), 2, ["prepare tokens --path a.txt --tokenizer byte"]),
        (("train", "smoke", "--config", "nope.toml"), 2, ["does not exist", "reroll show copy > nope.toml"]),
        (("train", "smoke", "--config", "nothing"), 2, ["nothing", "cannot be read"]),
        (("train", "smoke", "--config", "old.toml"), 2, ["old.toml", "format=0", "another version"]),
        (("train", "smoke", "--config", "typo.toml"), 2, ["typo.toml", "optim.lrr", 'mean "lr"']),
        (("train", "smoke", "--config", "bad.toml"), 2, ["bad.toml", "TOML"]),
        (("train", "smoke", "--config", "binary.toml"), 2, ["binary.toml", "cannot be read"]),
        (("train", "text"), 2, ["text needs --path FILE, FOLDER, GLOB, JSONL or PARQUET."]),
        (("train", "ptb"), 2, ["ptb needs --path FOLDER with ptb.train.txt and ptb.valid.txt."]),
        (("train", "arrays"), 2, ["arrays needs --path FILE.csv, .tsv, .parquet, .npy or .npz."]),
        ((*text, "nope.txt"), 2, ["path='nope.txt'", "does not exist"]),
        ((*text, "no*.txt"), 2, ["path='no*.txt'", "matches no file"]),
        ((*text, ""), 2, ["path=''", "Give"]),
        ((*text, "empty.txt"), 2, ["empty.txt", "is empty"]),
        ((*text, "nothing"), 2, ["'nothing'", "has no text"]),
        ((*text, "short.txt"), 2, ["length=64", "short.txt", "more text"]),
        ((*text, "binary.bin", *char), 2, ["binary.bin", "UTF-8", "tokenizer='byte'"]),
        ((*text, "latin.txt", *char), 2, ["latin.txt", "not UTF-8", "take --tokenizer='byte' or"]),
        ((*text, "short.txt", "--field", "body"), 2, ["--field='body' is of nothing in", "Leave it out"]),
        ((*text, "lines.jsonl"), 2, ["lines.jsonl, line 2", "field='text'", "body", "Give --field=…"]),
        ((*text, "broken.jsonl"), 2, ["broken.jsonl, line 2", "not JSON"]),
        ((*text, "a\nb"), 2, ["path='a\\nb'"]),
        ((*arrays, "nope.npy"), 2, ["nope.npy", "does not exist", "Give a table or array: .csv, "]),
        ((*arrays, "short.txt"), 2, ["short.txt", "no rows"]),
        ((*arrays, "short.npy"), 2, ["short.npy", "too short"]),
        ((*arrays, "words.npy"), 2, ["words.npy", "real numbers"]),
        ((*arrays, "cut.npy"), 2, ["cut.npy", "complete"]),
        ((*arrays, "cut.npz"), 2, ["cut.npz is no whole .npz archive", "numpy.savez"]),
        ((*arrays, "shape.npz"), 2, ["targets of shape (3,)", "expected (6,) or (6, O), or (6, 5) or (6, 5, O)"]),
        ((*arrays, "mask.npz"), 2, ["mask of shape (6, 4)", "expected (6,) or (6, 5)."]),
        ((*arrays, "ragged.csv"), 2, ["ragged.csv, line 31 has 3 cells, not 2; correct or delete it"]),
        ((*arrays, "no_inputs.npz"), 2, ["no_inputs.npz", "`inputs`"]),
        ((*arrays, "empty.csv"), 2, ["empty.csv", "is empty"]),
        ((*arrays, "header.csv"), 2, ["header.csv", "no rows"]),
        ((*arrays, "words.csv"), 2, ["words.csv, row 2", "a='x'"]),
        (("data", "prepare", "ts", "--path", "nothing/no"), 2, ["--path=nothing/no is no .ts file", "Give one, or a"]),
        (("eval", "nope"), 2, ["'nope' is not a run", "reroll runs"]),
        (("eval", ""), 2, ["'' is not a run"]),
        (("eval", folder), 2, [f"{folder} has no config.toml. Give a run folder"]),
        (("eval",), 2, ["is missing. Pass a run folder, the name of a run under runs/"]),
        (("sample", "nope"), 2, ["'nope' is not a run"]),
        (("export", "nope"), 2, ["'nope' is not a run"]),
        (("replay", "nope"), 2, ["'nope' is not a run"]),
        (("eval", "short.txt"), 1, ["short.txt", "cannot be read as a safetensors file", "Pickles"]),
        (("runs", "nope"), 2, ["nope", "does not exist"]),
        (("runs", "stop", "nope"), 2, ["'nope' is not a run"]),
        (("recipes", "copy"), 2, ["copy"]),
        (("bench", "zero"), 2, ['"zero"', 'mean "zeroth"']),
        (("bench", "zeroth", "--rounds", "0"), 2, ["rounds=0"]),
        (("bench", "zeroth", "--json", "nothing"), 2, ["--json 'nothing'", "folder"]),
        (("bench", "zeroth", "--json", "short.txt/x"), 2, ["--json", "short.txt/x"]),
        (("reproduce", "memroise", "--to", "new"), 2, ['"memroise"', 'mean "memorise"']),
        (("reproduce", "memroise", "--list"), 2, ['"memroise"', 'mean "memorise"']),
        (("reproduce", "memorise", "--to", "short.txt"), 2, ["--to short.txt cannot be written"]),
        (("demo", "--seconds", "0"), 2, ["seconds=0"]),
        (("doctor", "now"), 2, ["now"]),
    ]  # fmt: skip


def test_every_mistake_is_one_line(cli, tmp_path):
    for arguments, code, said in mistakes(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        found = cli(*arguments)
        assert found.code == code, (arguments, found)
        for words in said:
            assert words in found.error, (arguments, found.err)
        assert found.out == "", arguments
        assert sorted(tmp_path.rglob("*")) == before, f"{arguments} left something behind"


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (("eval", "RUN", "--split", "test"), 2, ['split="test"', "valid"]),
        (("eval", "RUN", "--path", "more.txt"), 2, ["--path more.txt", "drop --path"]),
        (("sample", "RUN", "--prompt", "→"), 2, ["'→'", "Known"]),
        (("sample", "RUN", "--temperature", "-1"), 2, ["temperature=-1.0"]),
        (("sample", "RUN", "--temperature", "nan"), 2, ["temperature=nan"]),
        (("sample", "RUN", "--top-k", "0"), 2, ["--top-k=0"]),
        (("sample", "RUN", "--length", "0"), 2, ["length=0"]),
        (("sample", "RUN", "--seed", "-1"), 2, ["seed=-1"]),
        (("export", "RUN", "--to", "."), 2, ["'.'", "name a file"]),
        (("export", "RUN", "--to", "m.pt"), 2, ["'m.pt'", "name it m.safetensors"]),
        (("export", "RUN", "--to", "file/x.safetensors"), 1, [f"file{os.sep}x", "cannot be written"]),
        (("replay", "RUN", "--to", "-1"), 2, ["--to=-1"]),
        (("replay", "RUN", "--to", "1000"), 2, ["--to=1000", "steps"]),
        (("replay", "RUN", "--out", "file/x.safetensors"), 1, [f"file{os.sep}x", "cannot be written"]),
        (("runs", "stop", "RUN"), 2, ["not running"]),
        (("train", "copy", "--init", "RUN", "--run-dir", "new"), 1, ["--init", "shape"]),
        (("train", "copy", "--run-dir", "file"), 2, ["--run-dir file", "folder"]),
        (("train", "copy", "--run-dir", "file", "--resume"), 2, ["--run-dir file", "folder"]),
        (("train", "copy", "--run-dir", "file/x"), 1, [f"--run-dir file{os.sep}x", "cannot be written"]),
    ],
)  # fmt: skip
def test_mistakes_with_a_run(cli, smoke, tmp_path, arguments, code, said):
    (tmp_path / "file").write_text("")
    before = contents(smoke)
    found = cli(*(smoke if argument == "RUN" else argument for argument in arguments))
    assert found.code == code
    assert all(words in found.error for words in said), found.err
    assert contents(smoke) == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_backprop_keeps_no_journal(cli, tmp_path):
    assert cli(*BACKPROP, "--run-dir", "run").code == 0
    found = cli("replay", "run", "--checksum")
    assert found.code == 2
    assert "backprop" in found.error
    assert "step-00000004" in found.error


def test_a_loss_that_is_not_finite_at_the_first_step(cli, tmp_path):
    np.save("sine.npy", np.sin(np.arange(120)).reshape(4, 15, 2))
    # Squares of what weights of 1e18 give are more than single precision holds.
    flags = ("--epsilon", "1e18", "--hidden", 64, "--length", 14)
    found = cli("train", "arrays", "--path", "sine.npy", *TINY[2:], "--run-dir", "run", *flags)
    assert found.code == 1
    assert "not finite at step 1" in found.error
    assert "Lower --epsilon" in found.error
    assert not (tmp_path / "run").exists()
