"""Tables in the dialects people have: the right values, one sentence each, and refusals that name the remedy."""

import bz2
import gzip
import lzma

import numpy as np
import pytest

from reroll.data.arrays import Arrays
from reroll.data.series import read_series
from reroll.data.tables import Reading
from reroll.errors import UsageError

RANDOM = np.random.default_rng(3)
VALUES = np.round(RANDOM.normal(0, 4000, (40, 2)), 2)


def text(*lines, sep=","):
    return "".join(sep.join(line) + "\n" for line in lines).encode()


def rows(write=str, before=lambda n: (), values=VALUES):
    return [(*before(n), *map(write, row)) for n, row in enumerate(values.tolist())]


def german(value):
    return f"{value:,.2f}".replace(",", "x").replace(".", ",").replace("x", ".")


def read(folder, name, content, **reading):
    (folder / name).write_bytes(content)
    return read_series(folder / name, Reading(**reading))


THOUSANDS = "without the marks between thousands, as in {}"
HEADER = ("größe", "h")
PLAIN = text(HEADER, *rows())
DIALECTS = {
    "semicolons": ("a.csv", text(HEADER, *rows(german), sep=";"),
                   f"semicolons between cells; decimal commas; {THOUSANDS.format(german(VALUES[0, 0]))}"),
    "points and semicolons": ("a.csv", text(HEADER, *rows(), sep=";"), "semicolons between cells; decimal points"),
    "quoted": ("a.csv", text(HEADER, *rows(lambda value: f'"{value:,.2f}"')), THOUSANDS.format(f"{VALUES[0, 0]:,.2f}")),
    "decimal commas in quotes": ("a.csv", text(HEADER, *rows(lambda v: f'"{v}"'.replace(".", ","))), "decimal commas"),
    "tabs": ("a.txt", text(HEADER, *rows(), sep="\t"), "tabs between cells"),
    "spaces": ("a.dat", text(HEADER, *rows(lambda v: f"{v:10.2f}"), sep=" "), "spaces between cells"),
    "gzip": ("a.csv.gz", gzip.compress(PLAIN), ""),
    "bzip2": ("a.csv.bz2", bz2.compress(PLAIN), ""),
    "xz": ("a.txt.xz", lzma.compress(PLAIN), ""),
    "no header": ("a.csv", text(*rows()), "no header line, columns are named 1, 2, …"),
    "comments": ("a.csv",
                 b"# from a meter\n" + PLAIN.replace(b"\n", b"\n# between\n", 1), "comments after #"),
    "Latin-1": ("a.csv", PLAIN.decode().encode("latin-1"), "cp1252"),
    "Excel's first line": ("a.csv", b"sep=;\n" + text(HEADER, *rows(), sep=";"),
                           "semicolons between cells; decimal points"),
    "minus of typesetters": ("a.csv", text(HEADER, *rows(lambda v: str(v).replace("-", "\u2212"))), ""),
    "UTF-16": ("a.csv", PLAIN.decode().encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": ("a.csv", PLAIN.decode().encode("utf-16-be"), "UTF-16-BE"),
    "mark of UTF-8": ("a.csv", PLAIN.decode().encode("utf-8-sig"), ""),
    "carriage returns": ("a.csv", PLAIN.replace(b"\n", b"\r\n"), ""),
    "unnamed index": ("a.csv", text(("", *HEADER), *rows(before=lambda n: (str(n),))),
                      "without the unnamed column 1 (only counts the rows)"),
    "names of rows": ("a.csv", text(HEADER, *rows(before=lambda n: (f"r{n}",))),
                      "without the first cell of every row, its name"),
    "epoch": ("a.csv", text(("time", *HEADER), *rows(before=lambda n: (str(1500000000 + 60 * n),))),
              "without time (only counts the rows)"),
    "dates": ("a.csv", text(("when", *HEADER), *rows(before=lambda n: (f"{n % 28 + 1:02}/{n // 28 + 1:02}/2020",))),
              "when tells the time, from 2020-01-01 to 2020-02-12"),
    "words": ("a.csv", text(("who", *HEADER), *rows(before=lambda n: ("ab"[n % 2],))), "without who: 'a' (no numbers)"),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_is_read_right_and_said_in_a_line(tmp_path, dialect):
    name, content, note = DIALECTS[dialect]
    table = read(tmp_path, name, content)
    np.testing.assert_array_equal(table.values, VALUES)
    assert table.features == (("1", "2") if dialect == "no header" else HEADER)
    assert table.note == note
    said = Arrays(tmp_path / name, length=5).describe()
    assert note in said
    assert "\n" not in said


def test_parquet(tmp_path):
    pandas = pytest.importorskip("pandas", reason="tables are read by pandas")
    pytest.importorskip("pyarrow", reason="Parquet needs the extra `data`")
    frame = pandas.DataFrame(VALUES, columns=HEADER, index=pandas.date_range("2020-01-01", periods=40))
    frame.assign(who="a").to_parquet(tmp_path / "a.parquet")
    table = read_series(tmp_path / "a.parquet")
    np.testing.assert_array_equal(table.values, VALUES)
    assert table.note == "index tells the time, from 2020-01-01 to 2020-02-09; without who: 'a' (no numbers)"
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(UsageError, match="cannot be read"):
        Arrays(tmp_path / "b.parquet")


@pytest.mark.parametrize("mark", ["", "?", "NA", "-", "n/a", "NaN", " NA ", "NULL", "none"])
def test_what_marks_a_missing_value(tmp_path, mark):
    cells = [str(value) if n % 5 else mark for n, value in enumerate(VALUES[:, 0])]
    table = read(tmp_path, "a.csv", text(("x", "y"), *zip(cells, map(str, VALUES[:, 1]))))
    np.testing.assert_array_equal(table.values[:, 0], np.where(np.arange(40) % 5, VALUES[:, 0], np.nan))


def test_what_is_asked_for_is_done(tmp_path):
    content = text(("t", "x", "y"), *((str(9 - n), f"{n}.500", str(-200 if n == 2 else n * n)) for n in range(9)))
    assert read(tmp_path, "a.csv", content).features == ("y",)
    assert read(tmp_path, "a.csv", content, columns="x, t").values[3].tolist() == [3.5, 6]
    assert read(tmp_path, "a.csv", content, columns="3,1").features == ("y", "t")
    backwards = read(tmp_path, "a.csv", content, time="t", columns="y", missing="-200,-300")
    np.testing.assert_array_equal(backwards.values[:, 0], [64, 49, 36, 25, 16, 9, np.nan, 1, 0])
    assert "from 1 to 9, by which the rows are sorted" in backwards.note
    assert read(tmp_path, "a.csv", content, columns="x", decimal=",").values[3].tolist() == [5500]  # t falls
    assert read(tmp_path, "a.csv", b"a!b\n1!5\n2!3\n4!2\n", sep="!").values.shape == (3, 2)
    assert read(tmp_path, "a.csv", b"a\tb\n1\t5\n2\t3\n4\t2\n", sep="tab").values.shape == (3, 2)


def test_rows_that_come_newest_first_are_turned_round(tmp_path):
    lines = [("Date", "Close"), *((f"Jan {30 - n}, 2020", str(n * n)) for n in range(20))]
    table = read(tmp_path, "a.csv", text(*lines, sep=";"))
    assert table.values[:, 0].tolist() == [n * n for n in range(19, -1, -1)]


TOLD = "tells the time, from "
SORTED = ", by which the rows are sorted"
STAY = "rows stay in the order of the file"
ORDERS = {
    "what counts comes first": ("t,v,born\n0,1,2001-05-03\n1,5,1999-05-01\n2,2,2000-05-02\n", [1, 5, 2],
                                "without born: "),
    "a date among others": ("v,born\n1,2001-05-03\n5,1999-05-01\n2,2000-05-02\n", [1, 5, 2],
                            f"{STAY}, not in that of born; time=… sorts by one"),
    "dates out of order": ("date,v\n2001-05-03,1\n1999-05-01,5\n2000-05-02,2\n", [5, 2, 1], SORTED),
    "beside a counter": ("n,date,v\n1,2001-05-03,1\n2,1999-05-01,5\n3,2000-05-02,2\n", [1, 5, 2],
                         f"n counts the rows), {STAY}"),
    "beside an index": (",Date,v\n0,2001-05-03,1\n1,2000-05-02,5\n2,1999-05-01,2\n",
        [2, 5, 1], f"Date {TOLD}1999-05-01"),
    "day and hour": ("Date,Time,v\n17/12/2006,01:00,4\n17/12/2006,00:30,3\n16/12/2006,23:00,2\n", [2, 3, 4],
                     "Date tells the time with Time, from 2006-12-16 23:00:00 to 2006-12-17 01:00:00"),
    "hours with points": ("Date;Time;v\n17/12/2006;18.00.00;4\n17/12/2006;17.00.00;3\n16/12/2006;18.00.00;2\n",
        [2, 3, 4],
                          "from 2006-12-16 18:00:00 to 2006-12-17 18:00:00"),
    "epoch": ("timestamp,v\n1700000180,4\n1700000110,9\n1700000060,2\n", [2, 9, 4], f"timestamp {TOLD}1700000060"),
    "year": ("Year,v\n2003,4\n2002,9\n2001,3\n", [3, 9, 4], f"Year {TOLD}2001 to 2003{SORTED}"),
    "index": (",v\n4,4\n3,9\n2,2\n", [2, 9, 4], f"the unnamed column 1 {TOLD}2 to 4{SORTED}"),
    "a temperature": ("T,v\n4.5,4\n3,9\n2,2\n", [4.5, 4, 3, 9, 2, 2], ""),
    "an unsorted epoch": ("timestamp,v\n17,4\n25,9\n12,2\n", [17, 4, 25, 9, 12, 2], f"{STAY}, not in that of time"),
    "a countdown": ("time_to_failure,v\n4.5,4\n3,9\n2,2\n", [4.5, 4, 3, 9, 2, 2], ""),
    "one without a date": ("when,v\n2024-01-03,3\n,9\n2024-01-02,2\n2024-01-01,1\n", [1, 2, 9, 3],
                           f"(missing in 1 row){SORTED}"),
    "two without a date": ("when,v\n2024-01-03,3\n,9\n2024-01-05,2\n,1\n2024-01-01,1\n", [3, 9, 2, 1, 1],
                           f"(missing in 2 rows), {STAY}"),
    "halves of a day": ("when,v\n1/13/2024 1:00:00 PM,13\n1/13/2024 2:00:00 AM,2\n1/13/2024 11:00:00 PM,23\n",
        [2, 13, 23],
                        SORTED),
    "short years": ("when,v\n14.02.24,1\n06.02.24,2\n05.02.24,5\n", [5, 2, 1], f"{TOLD}2024-02-05 to 2024-02-14"),
    "months": ("month,v\nMar 2024,1\nFeb 2024,5\nJan 2024,2\n", [2, 5, 1], f"{TOLD}2024-01-01 to 2024-03-01"),
    "either way": ("when,v\n12/02/2024,12\n11/02/2024,11\n10/02/2024,9\n",
        [9, 11, 12], "day and month cannot be told apart"),
    "neither way": ("when,v\n05/02/2024,5\n03/04/2024,34\n04/03/2024,43\n06/01/2024,61\n", [5, 34, 43, 61],
                    f"(day and month cannot be told apart), {STAY}"),
}  # fmt: skip


@pytest.mark.parametrize("case", ORDERS)
def test_one_column_tells_the_time_and_what_it_does_is_said(tmp_path, case):
    content, values, note = ORDERS[case]
    data = read(tmp_path, "a.csv", content.encode())
    assert data.values.ravel().tolist() == values
    assert note in data.note
    assert (STAY in data.note) == (STAY in note)


def test_the_time_that_is_named_sorts_or_says_why_not(tmp_path):
    assert read(tmp_path, "a.csv", ORDERS["a date among others"][0].encode(), time="born").values.ravel().tolist() == [
        5,
        2,
        1,
    ]
    for case, message in (
        ("neither way", "day and month cannot be told apart"),
        ("two without a date", "missing in 2 rows"),
    ):
        with pytest.raises(UsageError, match=f"time='when' cannot sort the rows: {message}; write 2024-12-31"):
            read(tmp_path, "a.csv", ORDERS[case][0].encode(), time="when")


def test_what_is_left_out_is_said_with_a_cell(tmp_path):
    for cell in ("10%", "$1.50", "1.5D+02", "1,23,456"):
        data = read(tmp_path, "a.csv", text(("a", "b"), *((f'"{cell}"', str(n * n)) for n in range(4))))
        assert data.note == f"without a: {cell!r} (no numbers)"
    french = read(tmp_path, "a.csv", "a;b\n1\u202f234,50;2\n2\u202f345,60;5\n3\u202f456,10;1\n".encode())
    assert french.values[:, 0].tolist() == [1234.5, 2345.6, 3456.1]
    assert read(tmp_path, "a.csv", "Preis €;b\n1;2\n5;7\n3;5\n".encode("cp1252")).features == ("Preis €", "b")


@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_several_series_need_not_be_together(tmp_path, sep):
    lines = [(str(t), f"s{n}", str(n * 100 + t * t)) for n in range(4) for t in range(5 + n)]
    order = RANDOM.permutation(len(lines))
    content = text(("t", "series", "value"), *(lines[place] for place in order), sep=sep)
    table = read(tmp_path, "a.csv", content, time="t")
    assert table.features == ("value",)
    begun = {int(table.values[begin, 0]) // 100 for begin in np.cumsum(table.lengths) - table.lengths}
    assert begun == {0, 1, 2, 3}
    for begin, length in zip(np.cumsum(table.lengths) - table.lengths, table.lengths):
        number = length - 5
        assert table.values[begin : begin + length, 0].tolist() == [number * 100 + t * t for t in range(length)]
    assert read(tmp_path, "b.csv", text(("id", "v"), ("1", "3"), ("2", "9"), ("3", "1"))).lengths.tolist() == [3]


@pytest.mark.parametrize(
    "content, reading, message",
    [
        (b"", {}, "is empty"),
        (b"# nothing\n", {}, "is empty"),
        (b"a,b\n", {}, "a header and no rows"),
        (b"these are words", {}, "a header and no rows"),
        (b"a,b\nx,y\nz,w\n", {}, "no column of numbers; its columns are a, b"),
        (b"a,b\n1,2\n3,x\n4,5\n", {}, "row 2: b='x' is no number.*missing='x'"),
        (b"a,b\n1,2\nND,3\n4,5\n", {}, "row 2: a='ND' is no number.*missing='ND'"),
        (b"a,b\nND,2\n3,3\n4,5\n", {}, "row 1: a='ND' is no number.*missing='ND'"),
        (b"a,b\nm,s\n3,3\n4,5\n", {}, "row 1: a='m' is no number.*If the line holds units, .* delete it"),
        (b"Station: X\nUnits;C\n\na;b\n1;2\n", {}, "its columns are Station: X. Delete what is above the header"),
        (b"% of mine\n% 2024\na,b\n1,2\n", {}, "line 3 has 2 cells, not 1; correct or delete it, or what is above it"),
        (b"a,b\n1,2\n3,4,5\n", {}, "line 3 has 3 cells, not 2; correct or delete it"),
        (b'a,b\n1,"2\n3,4\n', {}, "cannot be read"),
        (b"\x89PNG\r\n\x00\x1a\n" + bytes(range(1, 200)) * 9, {}, "NUL bytes"),
        (b"x" * (1 << 17), {}, "a header and no rows"),
        (b"x" * (1 << 26), {}, "no whole line in its first 32 MB"),
        (b"a\x1b[2J,b\nx,y\nz,w\n", {}, "its columns are a�"),
        (b"a,b\n1,2\n3,3\n", {"columns": "c"}, "columns='c' is no column"),
        (b"a,b\n1,2\n3,3\n", {"time": "c"}, "time='c' is no column"),
        (b"a,b\nx,2\ny,3\n", {"time": "a"}, "time='a' holds neither dates nor numbers"),
        (b"a,b\n1,2\n3,3\n", {"decimal": ";"}, "decimal=';' is no decimal mark"),
        (b"a,b\n1,2\n3,3\n", {"sep": "ab"}, "sep='ab' cannot separate"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused_in_a_line(tmp_path, content, reading, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        Arrays(tmp_path / "a.csv", **reading)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("comments", [False, True])
def test_a_header_may_be_long(tmp_path, comments):
    names = [f"a column with a long name and the number {n}" for n in range(4000)]
    before = b"# a long story\n" * 10_000 if comments else b""
    data = read(tmp_path, "a.csv", before + text(names, *(map(str, RANDOM.random(4000)) for _ in range(3))))
    assert data.values.shape == (3, 4000)
    assert data.features == tuple(names)


BIG = 1 << 60
LARGE = {
    "a feature": (("v", "key"), [("1.5", BIG), ("2", BIG + 1), ("7", BIG + 7)], "", {}),
    "an index": (("v", "n"), [("1.5", BIG), ("2", BIG + 1), ("7", BIG + 2)], "without n (only counts the rows)", {}),
    "unsigned": (("v", "n"), [("1.5", 2**64 - 1), ("2", 2**64 - 2), ("7", 2**64 - 3)], "without n (only counts", {}),
    "beyond 64 bits": (("v", "key"), [("1.5", BIG**3), ("2", 5), ("7", 6)], "", {}),
    "with gaps": (("v", "key"), [("1.5", BIG + 1), ("2", ""), ("7", 6)], "", {}),
    "with thousands": (("v", "key"), [("1.5", f'"{BIG + 1:,}"'), ("2", '"1,000"'), ("7", 6)], "", {}),
    "an order": (("v", "n"), [("1.5", BIG + 2), ("2", BIG), ("7", BIG + 1)], "n tells the time", {"time": "n"}),
    "floats": (("v", "n"), [("1.5", "1e20"), ("2", "1e22"), ("7", "")], "", {}),
    "exact": (("v", "n"), [("1.5", 2**53), ("2", -(2**53)), ("7", "3")], "", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_whole_numbers_that_floats_round_are_refused_or_stay_exact(tmp_path, case):
    names, rows, note, reading = LARGE[case]
    content = text(names, *((v, str(n)) for v, n in rows))
    if names[1] == "key":
        with pytest.raises(UsageError, match="key=.*is beyond 2⁵³, where floats round whole numbers") as caught:
            read(tmp_path, "a.csv", content, **reading)
        assert str(caught.value).isprintable()
        assert read(tmp_path, "a.csv", content, columns="v").values.ravel().tolist() == [1.5, 2, 7]
        return
    data = read(tmp_path, "a.csv", content, **reading)
    assert note in data.note
    assert data.values[:, 0].tolist() == ([2, 7, 1.5] if "time" in reading else [1.5, 2, 7])
    if not note:
        assert data.values[:2, 1].tolist() == [float(n) for _, n in rows[:2]]


def test_large_names_of_series_tell_them_apart(tmp_path):
    rows = [(str(BIG + n), str(v)) for v, n in ((1, 0), (2, 1), (3, 0), (4, 1))]
    assert read(tmp_path, "a.csv", text(("id", "v"), *rows)).lengths.tolist() == [2, 2]
    assert read(tmp_path, "a.csv", text(("id", "v"), *rows, ("", "5"))).lengths.tolist() == [1, 2, 2]


def test_large_whole_numbers_beside_nulls_in_parquet_are_as_in_csv(tmp_path):
    table = pytest.importorskip("pyarrow", reason="Parquet needs the extra `data`").table
    write = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the extra `data`").write_table
    path = tmp_path / "a.parquet"
    for key in ([BIG + 1, None, 6, 9], [None, BIG + 1, 6, 9]):
        write(table({"v": [1.5, 2, 7, 8], "key": key}), path)
        with pytest.raises(UsageError, match=f"key={BIG + 1} is beyond 2⁵³, where floats round whole numbers"):
            read_series(path)
    write(table({"v": [1.5, 2, 7, 8], "key": [1e20, None, 1e22, 2.5]}), path)
    assert read_series(path).values[:, 1].tolist() == pytest.approx([1e20, np.nan, 1e22, 2.5], nan_ok=True)
    write(table({"id": [BIG + 1, BIG + 2, BIG + 1, BIG + 2, None], "v": [0.0, 1, 2, 3, 4]}), path)
    assert read_series(path).lengths.tolist() == [1, 2, 2]


def test_large_whole_numbers_without_a_header_are_refused_by_the_number_of_their_column(tmp_path):
    with pytest.raises(UsageError, match=f"2={BIG + 1} is beyond 2⁵³, where floats round whole numbers"):
        read(tmp_path, "a.csv", f"1.5,{BIG + 1}\n2,\n7,6\n".encode())


def test_large_whole_numbers_in_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(40).reshape(20, 2) + BIG)
    with pytest.raises(UsageError, match="step 0, feature 0 is .* whole number beyond 2⁵³"):
        Arrays(tmp_path / "a.npy", length=4)
    np.savez(tmp_path / "a.npz", inputs=np.ones((9, 5, 2)), targets=np.full((9, 5, 1), BIG + 1))
    with pytest.raises(UsageError, match="45 targets are .* whole number beyond 2⁵³"):
        Arrays(tmp_path / "a.npz", readout="every")


LONE = {
    "plain": ("kW\n1,5\n2,5\n4,25\n12\n", {}, [1.5, 2.5, 4.25, 12]),
    "thousands": ("kW\n2.345,67\n1.100,50\n999,1\n", {}, [2345.67, 1100.5, 999.1]),
    "said": ("kW\n1,10\n2,20\n3,30\n", {"decimal": ","}, [1.1, 2.2, 3.3]),
    "counted rows": ("kW\n1,10\n2,20\n3,30\n", {}, [10, 20, 30]),
    "commas said": ("kW\n1,5\n2,5\n4,25\n", {"sep": ","}, [5, 5, 25]),
}


@pytest.mark.parametrize("case", LONE)
def test_one_column_of_decimal_commas_is_not_cut_at_them(tmp_path, case):
    content, reading, expected = LONE[case]
    data = read(tmp_path, "a.csv", content.encode(), **reading)
    assert data.values.ravel().tolist() == expected
    assert "between cells" not in data.note
    assert ("its name; decimal=',' reads one column" in data.note) == (expected[0] in (10, 5))
