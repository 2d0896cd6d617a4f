"""Labels from CSV files and class folders: what is read, and what is told of bad rows."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchgd_jax.config import ColumnsConfig
from patchgd_jax.data.images.regions import SLIDE_SUFFIXES
from patchgd_jax.data.tables.class_folders import read_class_folders
from patchgd_jax.data.tables.csv_table import read_csv
from patchgd_jax.data.tables.labels import natural_key, parse_labels
from patchgd_jax.errors import ConfigError, DataError

COLUMNS = ColumnsConfig()
ALL_COLUMNS = ColumnsConfig(group="patient", split="split", weight="weight")


@pytest.fixture
def root(tmp_path):
    """A folder of empty image files a0.png .. a9.png; tables look at no content."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"a{number}.png").write_bytes(b"x" * number)
    return folder


def table(root, text, columns=COLUMNS, task="single-label", **options):
    path = root.parent / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_csv(path, root, columns, task, **options)


def refused(root, text, *reasons, **options):
    with pytest.raises(DataError) as caught:
        table(root, text, **options)
    for reason in reasons:
        assert reason in str(caught.value)
    assert "\x1b" not in str(caught.value)
    return str(caught.value)


def test_every_column_is_read_and_the_lines_are_known(root):
    text = (
        "path,label,patient,split,weight,remark\n"
        'a0.png,tumour,p1,train,1,"two\nlines"\n'
        "\n"
        "a1.png,normal,p2,Validation,0.5,\n"
        ",,,,,\n"
        "./a2.png , tumour,p1,train,0,=HYPERLINK(1)\n"
    )
    got = table(root, text, ALL_COLUMNS)
    assert [path.name for path in got.paths] == ["a0.png", "a1.png", "a2.png"]
    assert all(path.is_file() for path in got.paths)
    assert got.class_names == ("normal", "tumour")
    assert got.labels.dtype == np.int64
    assert got.labels.tolist() == [1, 0, 1]
    assert got.groups == ("p1", "p2", "p1")
    assert got.splits == ("train", "validation", "train")
    assert got.weights.dtype == np.float32
    assert got.weights.tolist() == [1, 0.5, 0]
    assert got.rows == (2, 5, 7)
    plain = table(root, "path,label\na0.png,x\na1.png,y\n")
    assert (plain.groups, plain.splits, plain.weights) == (None, None, None)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_delimiters_and_a_byte_order_mark(root, delimiter, newline):
    rows = [["file", "klass, with ; in it", "x"], ["a0.png", "blå", "1"], ["a1.png", "ß;ß", "2"]]
    text = newline.join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    columns = ColumnsConfig(path="file", label="klass, with ; in it")
    for coding in ("utf-8", "utf-8-sig"):
        got = table(root, text.encode(coding), columns)
        assert got.class_names == ("blå", "ß;ß")


def test_the_root_is_the_csvs_folder_unless_told(root):
    (root / "labels.csv").write_text("path,label\na0.png,x\na1.png,y\n")
    got = read_csv(root / "labels.csv", None, COLUMNS, "single-label")
    assert got.paths[0] == root / "a0.png"


def test_paths_must_stay_inside_the_root(root):
    outside = root.parent / "secret.png"
    outside.write_bytes(b"")
    (root / "link.png").symlink_to(outside)
    (root / "inner").mkdir()
    (root / "inner" / "b.png").write_bytes(b"")
    (root / "folder").symlink_to(root.parent)
    (root / "loop").symlink_to(root / "loop")
    cases = {
        "../secret.png": "has .. in it",
        "inner/../a1.png": "has .. in it",
        "link.png": "is a link that leads outside",
        "folder/secret.png": "is a link that leads outside",
        "folder/images/../secret.png": "has .. in it",
        str(outside): "is outside of",
        "/etc/passwd": "is outside of",
        "inner": "is not a file",
        "loop/a.png": "loop/a.png",
        "a" * 300: "cannot be opened",
        "inner\\b.png": "write / between folders",
        "a\x1b[31m.png": "control characters",
        "": "the path is empty",
    }
    for path, reason in cases.items():
        refused(root, f"path,label\na0.png,x\n{path},y\n", "line 3: ", reason)
    inside = table(root, f"path,label\n{root / 'a0.png'},x\ninner/b.png,y\n")
    assert inside.paths == (root / "a0.png", root / "inner" / "b.png")
    # A link that leads out and back in again is where it seems to be.
    assert len(table(root, "path,label\na0.png,x\nfolder/images/a1.png,y\n")) == 2


def test_up_to_ten_problems_are_told_with_their_lines(root):
    bad = [
        "a0.png,x,p,train,1",
        ",x,p,train,1",
        "a2.png,,p,train,1",
        "a3.png,x,,train,1",
        "a4.png,x,p,valid,1",
        "a5.png,x,p,train,-1",
        "a6.png,x,p,train,nan",
        "a0.png,x,p,train,1",
        "./a0.png,y,p,train,1",
        "none.png,x,p,train,1",
        "a7.png,x,p,train",
        "a8.png,\x07bell,p,train,inf",
        "a9.png,y,p,train,1_0",
    ]
    text = "path,label,patient,split,weight\n" + "\n".join(bad) + "\n"
    message = refused(root, text, columns=ALL_COLUMNS)
    wanted = [
        "line 3: the path is empty",
        "line 4: the label is empty",
        "line 5: the group is empty",
        "line 6: the split 'valid' is none of train, validation, test",
        "line 7: the weight '-1' is no number of at least 0",
        "line 8: the weight 'nan' is no number",
        "line 9: 'a0.png' is the image of line 2 again, with the same label",
        "line 10: './a0.png' is the image of line 2 again, with another label",
        "line 11: there is no file 'none.png'",
        "line 12: it has 4 cells, but the header has 5",
        "and 3 more",
    ]
    lines = message.splitlines()
    assert len(lines) == 12
    assert "labels.csv" in lines[0]
    for line, start in zip(lines[1:], wanted, strict=True):
        assert line.strip().startswith(start)
    rest = "path,label,patient,split,weight\n" + "\n".join(bad[:1] + bad[11:]) + "\n"
    refused(
        root,
        rest,
        "line 3: the label '?bell' has control characters",
        "line 3: the weight 'inf'",
        "line 4: the weight '1_0'",
        columns=ALL_COLUMNS,
    )


def test_a_row_tells_all_its_faults_at_once(root):
    rows = ["a0.png,0,train", "a1.png,1,train", "none.png,,train", "a2.png,x,valid", "a3.png,1"]
    for task, kind in (("single-label", "is no integer"), ("ordinal", "is no grade")):
        refused(
            root,
            "path,label,split\n" + "\n".join(rows) + "\n",
            "line 4: there is no file 'none.png'",
            "line 4: the label is empty",
            "line 5: the split 'valid' is none of",
            f"line 5: the label 'x' {kind}",
            "line 6: it has 2 cells",
            task=task,
            columns=ColumnsConfig(split="split"),
        )


def test_files_that_are_no_table_are_told(root):
    refused(root, "", "is empty")
    refused(root, "path,label\n", "no rows below its header")
    refused(root, "path,label\n,\n", "no rows below its header")
    refused(root, "path,lable\na0.png,x\n", "no column 'label'; did you mean 'lable'?")
    refused(root, "image;class\na0.png;x\n", "no column 'path'", "data.columns.path", "class")
    refused(root, "path,label,label\na0.png,x,y\n", "several columns 'label'")
    refused(root, "path,label\nä.png,x\n".encode("latin-1"), "not UTF-8 text (at byte 11)")
    refused(root, "path,label\na0.png,x\n".encode("utf-16-le"), "NUL")
    refused(root, "path,label\na0.png,x\0y\n", "NUL")
    refused(root, 'path,label\na0.png,x\n"a1.png"b,y\n', "damaged at line 3")
    refused(root, "path,label\nb0.png,x\nb1.png,y\n", "none of its images exists; is data.root")
    refused(root, "path,label,w\na0.png,x,0\na1.png,y,0\n", "all weights are 0",
            columns=ColumnsConfig(weight="w"))  # fmt: skip
    with pytest.raises(DataError, match="cannot read"):
        read_csv(root / "none.csv", root, COLUMNS, "single-label")
    with pytest.raises(DataError, match="cannot read"):
        read_csv(root, root, COLUMNS, "single-label")


def test_a_csv_is_data_and_never_computed(root):
    """Cells that would run in a spreadsheet or in Python are names like any other."""
    cells = ["=1+1", "__import__('os').abort()", "{path}", "%s", "a0.png"]
    text = "path,label\n" + "\n".join(f'a{i}.png,"{cell}"' for i, cell in enumerate(cells))
    assert set(table(root, text).class_names) == set(cells)


def labels(texts, task="single-label", **options):
    parsed = parse_labels(texts, task, **options)
    assert not parsed.problems, parsed.problems
    return parsed.labels.tolist(), parsed.class_names


def problem(texts, task="single-label", **options):
    (first, *_) = parse_labels(texts, task, **options).problems
    return first


def test_class_names_are_sorted_with_their_numbers():
    assert labels(["b", "a10", "a2", "b"]) == ([2, 1, 0, 2], ("a2", "a10", "b"))
    assert labels(["07", "7", "10"]) == ([0, 1, 2], ("07", "7", "10"))
    assert labels(["-1", "x"])[1] == ("-1", "x")


def test_integers_are_class_indices():
    assert labels(["10", *map(str, range(10)), "2.0"])[0] == [10, *range(10), 2]
    assert labels(["1", "0"]) == ([1, 0], ("0", "1"))
    where, reason = problem(["1", "2", "5"])
    assert where is None
    assert "integers up to 5, but no image has 0, 3, 4; number" in reason
    assert "no image has 0, 1, 2, ...;" in problem(["10", "9", "999999999999999999"])[1]
    where, reason = problem(["0", "1", "?", "1"])
    assert where == 2
    assert "'?' is no integer, but others are, such as '0'" in reason


def test_grades_are_integers_with_gaps():
    assert labels(["3", "0", "03"], "ordinal") == ([3, 0, 3], ("0", "1", "2", "3"))
    assert problem(["0", "high"], "ordinal") == (
        1,
        "the label 'high' is no grade; write grades as integers from 0",
    )
    assert problem(["0", "-1"], "ordinal")[0] == 1
    assert problem(["0", "4711"], "ordinal")[0] == 1


def test_several_labels_and_none():
    got = parse_labels(["b; a", ";", "b", "b;b"], "multi-label")
    assert not got.problems
    assert got.class_names == ("a", "b")
    assert got.labels.dtype == np.float32
    assert got.labels.tolist() == [[1, 1], [0, 0], [0, 1], [0, 1]]
    assert labels(["0;2", "1"], "multi-label")[0] == [[1, 0, 1], [0, 1, 0]]
    assert problem(["a", ""], "multi-label")[0] == 1
    assert "write ; if none" in problem(["a", "a;;b"], "multi-label")[1]
    assert "nothing to learn" in problem(["a;b", "b;a"], "multi-label")[1]


def test_numbers_for_regression():
    got = parse_labels(["1.5", "-2", "+3e2", ".5"], "regression")
    assert not got.problems
    assert got.labels.dtype == np.float32
    assert got.labels.tolist() == [1.5, -2, 300, 0.5]
    assert got.class_names == ()
    for text in ("nan", "inf", "1e39", "1_000", "1,5", "0x10", "one", "", "\u0661"):
        assert problem(["1", text], "regression")[0] == 1, text
    assert "every label is '2.0'" in problem(["2.0", "2"], "regression")[1]


def test_labels_that_are_all_equal_teach_nothing():
    assert problem(["x", "x"]) == (None, "every label is 'x': there is nothing to learn")
    assert problem(["0", "0"], "ordinal")[0] is None


def test_the_classes_of_a_trained_model_hold():
    names = ("cat", "dog", "7")
    assert labels(["7", "dog"], class_names=names) == ([2, 1], names)
    assert labels(["dog", "dog"], class_names=names)[0] == [1, 1]
    assert labels(["2.0", "1"], class_names=("0", "1", "2"))[0] == [2, 1]
    assert labels(["low", "high"], "ordinal", class_names=("low", "mid", "high"))[0] == [0, 2]
    where, reason = problem(["cat", "dgo"], class_names=names)
    assert where == 1
    assert "none of the 3 classes; did you mean 'dog'?" in reason


def test_a_task_without_text_labels_is_told():
    with pytest.raises(ConfigError, match="'segmentation' cannot be read"):
        parse_labels(["1"], "segmentation")


NAMES = st.lists(st.text("a10 9²", min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1)


@given(NAMES, st.randoms())
def test_natural_order_is_a_total_order(texts, rng):
    ordered = sorted(texts, key=natural_key)
    rng.shuffle(texts)
    assert sorted(texts, key=natural_key) == ordered
    assert sorted(["x10", "x9", "x09", "x", "x9a"], key=natural_key) == [
        "x", "x09", "x9", "x9a", "x10"
    ]  # fmt: skip


@given(NAMES)
def test_labels_name_their_classes(texts):
    names = [f"n{text}" for text in (*texts, "x")]
    got = parse_labels(names, "single-label")
    assert not got.problems
    assert [got.class_names[index] for index in got.labels] == names
    assert sorted(set(names), key=natural_key) == list(got.class_names)
    sets = [";".join(names[i:]) for i in range(len(names))] + [";"]
    several = parse_labels(sets, "multi-label")
    assert not several.problems
    for text, row in zip(sets, several.labels, strict=True):
        chosen = {name for name, on in zip(several.class_names, row, strict=True) if on}
        assert chosen == set(text.split(";")) - {""}


def test_the_fingerprint_sees_every_change_and_no_move(root):
    text = "path,label,patient,split,weight\n" + "".join(
        f"a{i}.png,{'xy'[i % 2]},p{i},{'train' if i < 4 else 'test'},{i + 1}\n" for i in range(6)
    )
    before = table(root, text, ALL_COLUMNS)
    assert table(root, text, ALL_COLUMNS).fingerprint == before.fingerprint
    lines = text.splitlines()
    changed = [
        text.replace("a5.png", "a6.png"),
        text.replace("a3.png,y", "a3.png,x"),
        text.replace("p3", "p2"),
        text.replace("p3,train", "p3,validation"),
        text.replace("train,4", "train,4.5"),
        "\n".join([lines[0], lines[2], lines[1], *lines[3:]]),
        text.replace("x", "z"),
    ]
    prints = {table(root, other, ALL_COLUMNS).fingerprint for other in changed}
    assert len(prints | {before.fingerprint}) == len(changed) + 1
    stat = (root / "a0.png").stat()
    os.utime(root / "a0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    touched = table(root, text, ALL_COLUMNS).fingerprint
    assert touched != before.fingerprint
    (root / "a0.png").write_bytes(b"longer")
    os.utime(root / "a0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert table(root, text, ALL_COLUMNS).fingerprint not in (touched, before.fingerprint)
    (root / "a0.png").write_bytes(b"")
    os.utime(root / "a0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    moved = root.rename(root.parent / "elsewhere")
    assert table(moved, text, ALL_COLUMNS).fingerprint == before.fingerprint


def make_folders(root, files):
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def test_class_folders_in_natural_order(tmp_path):
    files = ["c10/a.png", "c2/x10.JPG", "c2/x9.tiff", "c2/deep/er/y.svs", "c2/notes.txt",
             "c2/.hidden.png", ".git/a.png", "read.me", "c10/z.zarr/zarr.json",
             "c10/z.zarr/inner.png"]  # fmt: skip
    root = make_folders(tmp_path / "data", files)
    got = read_class_folders(root)
    names = [path.relative_to(root).as_posix() for path in got.paths]
    assert names == ["c2/deep/er/y.svs", "c2/x9.tiff", "c2/x10.JPG", "c10/a.png", "c10/z.zarr"]
    assert got.class_names == ("c2", "c10")
    assert got.labels.dtype == np.int64
    assert got.labels.tolist() == [0, 0, 0, 1, 1]
    assert got.rows == (0,) * 5
    assert got.fingerprint == read_class_folders(root).fingerprint


def test_class_folders_take_what_the_readers_read(tmp_path):
    names = [f"x{suffix}" for suffix in (".npy", ".tif", ".png", *SLIDE_SUFFIXES)]
    root = make_folders(tmp_path / "data", [f"a/{name}" for name in names] + ["b/1.npy"])
    got = read_class_folders(root)
    assert sorted(path.name for path in got.paths) == sorted([*names, "1.npy"])


def test_bad_class_folders_are_told(tmp_path):
    root = make_folders(tmp_path / "data", ["a/1.png", "b/1.gif", "top.png", "c\n/1.png"])
    (root / "empty").mkdir()
    (root / "a" / "twin.png").symlink_to(root / "a" / "1.png")
    (root / "a" / "up").symlink_to(root / "a")
    (root / "a" / "out").symlink_to(tmp_path)
    with pytest.raises(DataError) as caught:
        read_class_folders(root)
    for reason in (
        "'top.png' is in no class folder",
        "'b/1.gif' has an unsupported format",
        "the class folder 'b' holds no image",
        "the class folder 'empty' holds no image",
        "'a/twin.png' is a link to the image 'a/1.png'",
        "'a/up' is a link to a folder above it",
        "'a/out' is a link that leads outside",
        "the name 'c?' has control characters",
    ):
        assert reason in str(caught.value)
    with pytest.raises(DataError, match="there is no folder"):
        read_class_folders(tmp_path / "none")
    with pytest.raises(DataError, match="it holds 1 class folders"):
        read_class_folders(make_folders(tmp_path / "one", ["a/1.png"]))


def test_links_out_of_the_root_are_refused(tmp_path):
    make_folders(tmp_path / "disk", ["b/1.png"])
    root = make_folders(tmp_path / "data", ["a/1.png"])
    (root / "b").symlink_to(tmp_path / "disk" / "b")
    with pytest.raises(DataError, match="outside"):
        read_class_folders(root)
