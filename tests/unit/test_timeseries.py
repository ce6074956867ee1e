"""Series in .ts files: read, prepared, trained on, and refused where they are wrong."""

import numpy as np
import pytest

from reroll.cli import main
from reroll.data.arrays import Arrays
from reroll.data.series import read_series
from reroll.data.timeseries import prepare, read_ts
from reroll.errors import UsageError

HEADER = "# made for a test\n@problemName Worms\n@timestamps false\n@dimensions {}\n@classLabel true a b c\n@data\n"


def text_of(values, labels):
    lines = (":".join([*(",".join(map(repr, column.tolist())) for column in row.T), label])
             for row, label in zip(values, labels))  # fmt: skip
    return HEADER.format(values.shape[2]) + "\n".join(lines) + "\n"


@pytest.fixture
def values():
    return np.random.default_rng().normal(size=(7, 11, 3)).astype(np.float32)


def test_missing_values_and_unequal_lengths(tmp_path):
    (tmp_path / "w.ts").write_text(HEADER.format(2) + "1,?,3:4,5,6:c\n\n# between\n7:8:a\n")
    found, *classes = read_ts(tmp_path / "w.ts")
    np.testing.assert_array_equal(found[0], [[1, 4], [np.nan, 5], [3, 6]])
    np.testing.assert_array_equal(found[1], [[7, 8]])
    assert classes == [[2, 0], ("a", "b", "c")]
    prepare(tmp_path / "w.ts", tmp_path / "w.npz")
    series = read_series(tmp_path / "w.npz")
    assert series.lengths.tolist() == [3, 1]
    np.testing.assert_array_equal(series.values, np.concatenate(found))
    assert series.labels == ("a", "b", "c")


def test_the_test_file_of_a_folder_is_held_out(tmp_path, values, capsys):
    (tmp_path / "w_TRAIN.ts").write_text(text_of(values[:4], "abca"))
    (tmp_path / "w_TEST.ts").write_text(text_of(values[4:], "ccb"))
    assert main(["data", "prepare", "ts", "--path", str(tmp_path), "--to", str(tmp_path / "new"), "--every", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'new' / 'w.npz'}: 7 series of 6 steps, 3 features, 3 classes\nheld out" in said
    assert "held out: the 3 series of the test file" in said
    with np.load(tmp_path / "new" / "w.npz") as arrays:
        np.testing.assert_array_equal(arrays["inputs"], np.concatenate([values[4:], values[:4]])[:, ::2])
        assert arrays["targets"].tolist() == [2, 2, 1, 0, 1, 2, 0]
    task = Arrays(tmp_path / "new" / "w.npz")
    assert sorted(task.batch(0, "valid").targets.tolist()) == [1, 2, 2]
    assert "(a, b, c)" in task.describe()
    (tmp_path / "w_MORE.ts").write_text(text_of(values, "abcabca"))
    with pytest.raises(UsageError, match="holds 3 .ts files"):
        prepare(tmp_path, tmp_path / "w.npz")


def test_missing_values_of_prepared_series_are_counted(tmp_path, capsys):
    """What a shorter series lacks is none."""
    (tmp_path / "w_TEST.ts").write_text(HEADER.format(1) + "1,?,3:c\n?:a\n")
    assert main(["data", "prepare", "ts", "--path", str(tmp_path / "w_TEST.ts"), "--to", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path / 'w_TEST.npz'}: 2 series of 3 steps, 1 feature, 3 classes"
    assert said[1].startswith("2 missing values: ")


def test_training_on_prepared_series_begins(tmp_path, capsys):
    values = np.random.default_rng().normal(size=(7, 31, 2)).astype(np.float32)
    (tmp_path / "w.ts").write_text(text_of(values, "abcabca"))
    main(["data", "prepare", "ts", "--path", str(tmp_path), "--to", str(tmp_path)])
    arguments = capsys.readouterr().out.splitlines()[-1].split("reroll ")[1].split()
    small = ("--steps", "2", "--probes", "2", "--hidden", "8", "--run-dir", str(tmp_path / "run"))
    assert main([*arguments, *small]) == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("1,2:a\n", "line 1: data before `@data`"),
        ("@classLabel true a b\n", "no series after a line `@data`"),
        ("@classLabel false\n@data\n1,2\n", "has no classes"),
        ("@timeStamps true\n@classLabel true a\n@data\n(0,1):a\n", "time stamps"),
        (HEADER.format(1), "no series after"),
        (HEADER.format(1) + "1,2:d\n", 'line 7: the class "d" is not one of a, b, c'),
        (HEADER.format(1) + "1,x:a\n", "line 7: could not convert string to float"),
        ("", "no series after"),
        ("@dimensions\n@timestamps\n@classLabel\n@data\n1:a\n", "has no classes"),
        ("@\n@dimensions ²\n@classLabel true a\n@data\n1:a\n", "the header says ²"),
        ("@classLabel true \x1b[2J\n@data\n1:\x1bb\n", "class \"�b\" is not one of �"),
        (HEADER.format(2) + "1,2:3:a\n", r"have \[2, 1\] steps"),
        (HEADER.format(3) + "1,2:3,4:a\n", r"have \[2\] dimensions, the header says 3"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "w.ts").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_ts(tmp_path / "w.ts")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fetch", "eigenworms", "--path", "x"], 'Did you mean "prepare"|Known: prepare'),
        (["prepare", "worms", "--path", "x"], "eigenworms"),
        (["prepare", "eigenworms"], "--path is missing"),
        (["prepare", "eigenworms", "--path", "nowhere"], "no .ts file"),
    ],
)
def test_a_wrong_request_is_told_in_a_line(arguments, message, capsys):
    import re

    assert main(["data", *arguments]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert told.count("\n") == 1


def test_a_file_of_one_endless_line_is_refused(tmp_path):
    with (tmp_path / "w.ts").open("wb") as file:
        file.truncate(8 << 30)  # no space is taken
    with pytest.raises(UsageError, match="line 1: longer than"):
        read_ts(tmp_path / "w.ts")
