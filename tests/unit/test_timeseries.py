"""Series in .ts files: read, prepared, trained on, and refused where they are wrong."""

import numpy as np
import pytest

from reroll.cli import main
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


def test_what_was_written_is_read(tmp_path, values):
    (tmp_path / "w.ts").write_text(text_of(values, "abcabca"))
    found = read_ts(tmp_path / "w.ts")
    np.testing.assert_array_equal(found.inputs, values)
    assert found.targets.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert found.labels == ("a", "b", "c")
    assert found.lengths.tolist() == [11] * 7


def test_missing_values_and_unequal_lengths(tmp_path):
    (tmp_path / "w.ts").write_text(HEADER.format(2) + "1,?,3:4,5,6:c\n\n# between\n7:8:a\n")
    found = read_ts(tmp_path / "w.ts")
    nan = np.nan
    np.testing.assert_array_equal(found.inputs, [[[1, 4], [nan, 5], [3, 6]], [[7, 8], [nan, nan], [nan, nan]]])
    assert found.lengths.tolist() == [3, 1]
    prepare(tmp_path / "w.ts", tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as arrays:
        assert arrays["mask"].tolist() == [[True, False, True], [True, False, False]]
        assert np.isfinite(arrays["inputs"]).all()


def test_a_folder_is_prepared_one_file_after_the_other(tmp_path, values):
    (tmp_path / "w_TRAIN.ts").write_text(text_of(values[:4], "abca"))
    (tmp_path / "w_TEST.ts").write_text(text_of(values[4:], "ccb"))
    assert prepare(tmp_path, tmp_path / "new" / "w.npz", every=2) == (7, 6, 3, 3)
    with np.load(tmp_path / "new" / "w.npz") as arrays:
        np.testing.assert_array_equal(arrays["inputs"], np.concatenate([values[4:], values[:4]])[:, ::2])
        assert arrays["targets"].tolist() == [2, 2, 1, 0, 1, 2, 0]
        assert "mask" not in arrays.files


def test_the_command_writes_what_training_reads(tmp_path, values, capsys):
    (tmp_path / "w.ts").write_text(text_of(values, "abcabca"))
    code = main(["data", "prepare", "eigenworms", "--path", str(tmp_path / "w.ts"), "--to", str(tmp_path / "out")])
    assert code == 0
    assert "7 series of 11 steps, 3 features, 3 classes" in capsys.readouterr().out
    series = read_series(tmp_path / "out" / "eigenworms.npz")
    np.testing.assert_array_equal(series.values.reshape(7, 11, 3), values)


@pytest.mark.slow
def test_training_on_prepared_series_begins(tmp_path, capsys):
    values = np.random.default_rng().normal(size=(7, 101, 2)).astype(np.float32)
    (tmp_path / "w.ts").write_text(text_of(values, "abcabca"))
    main(["data", "prepare", "ts", "--path", str(tmp_path), "--to", str(tmp_path)])
    arguments = capsys.readouterr().out.splitlines()[-1].split("reroll ")[1].split()
    assert main([*arguments, "--steps", "2", "--run-dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("1,2:a\n", "line 1: data before `@data`"),
        ("@classLabel true a b\n", "no line `@data`"),
        ("@classLabel false\n@data\n1,2\n", "has no classes"),
        ("@timeStamps true\n@classLabel true a\n@data\n(0,1):a\n", "time stamps"),
        (HEADER.format(1), "no series after `@data`"),
        (HEADER.format(1) + "1,2:d\n", 'line 7: the class "d" is not one of a, b, c'),
        (HEADER.format(1) + "1,x:a\n", "line 7: could not convert string to float"),
        (HEADER.format(2) + "1,2:3:a\n", r"have \[2, 1\] steps"),
        (HEADER.format(3) + "1,2:3,4:a\n", r"have \[2\] dimensions, the header says 3"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "w.ts").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_ts(tmp_path / "w.ts")


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
