# SPDX-License-Identifier: Apache-2.0
"""Folders as people have them: which images and captions are found, in which order, and what is said."""

import csv
import io
import json
import os
import re
import tarfile
import unicodedata
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import IMAGES

import train_text_to_image_prior as script

ROWS = [json.loads(line) for line in (IMAGES / "metadata.jsonl").read_text().splitlines()]
FILES = [(IMAGES / row["file_name"]).read_bytes() for row in ROWS]
TEXTS = [row["text"] for row in ROWS]


def load(folder, *argv, flag="train_data_dir", **flags):
    """Captions and file of each row that is trained on, in order."""
    flags = {flag: folder, "report_to": "none", "seed": 0} | flags
    args = script.parse_args([*argv, *(f"--{name}={value}" for name, value in flags.items())])
    dataset, _, _ = script.check_rows(script.load_train_dataset(args), args)
    assert dataset.column_names == [args.image_column, args.caption_column]
    assert dataset.features[args.image_column] == datasets.Image(decode=False)
    loaded = []
    for row in dataset:
        image = row[args.image_column]
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        loaded.append((script.list_captions(row, args), content))
    return loaded


def expected(*indices, captions=None):
    captions = captions or [[TEXTS[index]] for index in indices]
    return [(texts, FILES[index]) for texts, index in zip(captions, indices, strict=True)]


def error_of(folder, *argv, **flags):
    """The one line in which loading ends."""
    with pytest.raises(SystemExit) as ended:
        load(folder, *argv, **flags)
    assert ended.value.code.isprintable()
    return ended.value.code


def write(folder, files):
    """Writes files of these names: an image by its index, text, bytes, a list as lines of JSON, a table as
    Parquet or Arrow, a dict of bytes as a tar."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            with tarfile.open(path, "w") as archive:
                for entry, data in content.items():
                    entry = tarfile.TarInfo(entry)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        elif isinstance(content, pyarrow.Table) and path.suffix == ".parquet":
            pyarrow.parquet.write_table(content, path)
        elif isinstance(content, pyarrow.Table):
            with pyarrow.ipc.new_stream(str(path), content.schema) as file:
                file.write_table(content)
        else:
            if isinstance(content, list):
                content = "".join(json.dumps(row) + "\n" for row in content)
            content = FILES[content] if isinstance(content, int) else content
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def named(*names, first=0, **columns):
    """Rows of a metadata file that names the images from `first` on."""
    return [{"file_name": name, "text": TEXTS[first + i]} | columns for i, name in enumerate(names)]


def table(*indices, image=lambda index: {"bytes": FILES[index], "path": f"{index}.jpg"}, **columns):
    """Rows of embedded images, with other columns of one value."""
    columns = {name: [value] * len(indices) for name, value in columns.items()}
    columns = {"image": list(map(image, indices)), "text": [TEXTS[index] for index in indices]} | columns
    return pyarrow.table(columns)


# --------------------------------------------------------------------------------------------------- layouts


def in_csv(end="\n", separator=",", start="", **columns):
    """The first two images, named in metadata.csv."""
    file = io.StringIO(newline="")
    rows = [row | columns for row in named("0.jpg", "1.jpg")]
    writer = csv.DictWriter(file, rows[0], delimiter=separator, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return {"0.jpg": 0, "1.jpg": 1, "metadata.csv": start + file.getvalue()}


def saved(format_type=None, **settings):
    """Writes what `save_to_disk` does for rows with a format."""

    def save(folder):
        captions = [ROWS[index]["captions"] for index in range(2)]
        dataset = datasets.Dataset(table(0, 1).append_column("captions", [captions]))
        dataset = dataset.cast_column("image", datasets.Image())
        dataset.with_format(format_type, **settings).save_to_disk(folder)

    return save


def save_splits(folder):
    splits = {"train": datasets.Dataset(table(0, 1)), "test": datasets.Dataset(table(2))}
    datasets.DatasetDict(splits).save_to_disk(folder)


def link_images(folder):
    """Linked folders, one of them twice and in a circle, and a linked file."""
    elsewhere = folder.with_name("elsewhere")
    write(elsewhere, {"more/0.jpg": 0, "more/0.txt": TEXTS[0], "1.jpg": 1})
    write(folder, {"b.txt": TEXTS[1]})
    (folder / "a").symlink_to(elsewhere / "more")
    (folder / "b.jpg").symlink_to(elsewhere / "1.jpg")
    (elsewhere / "more" / "loop").symlink_to(folder)


def img2dataset(output_format):
    """What img2dataset writes with this --output_format; all but Parquet lists a failed download."""
    keys = [f"{index:09d}" for index in range(2 if output_format == "parquet" else 3)]
    columns = {"key": keys, "caption": [*TEXTS[:2], None][: len(keys)], "status": ["success"] * len(keys)}
    columns |= {"jpg": FILES[:2]} if output_format == "parquet" else {}
    written = {"00000.parquet": pyarrow.table(columns), "00000_stats.json": "{}"}
    files = {f"{key}.jpg": content for key, content in zip(keys, FILES[:2], strict=False)}
    files |= {f"{key}.txt": text.encode() for key, text in zip(keys, TEXTS[:2], strict=False)}
    files |= {f"{key}.json": json.dumps({"key": key}).encode() for key in keys[:2]}
    tar = {name: files[name] for name in sorted(files)}
    loose = {f"00000/{name}": content for name, content in files.items()}
    return written | {"parquet": {}, "webdataset": {"00000.tar": tar}, "files": loose}[output_format]


NFC, NFD = (unicodedata.normalize(form, "Übung é.jpg") for form in ("NFC", "NFD"))
T0, T1 = TEXTS[:2]
BOTH_FILES = {"0.jpg": 0, "1.jpg": 1}
BOTH = BOTH_FILES | {"metadata.jsonl": named("0.jpg", "1.jpg")}
ODD_ROWS = [named("0.jpg", size={"width": 1}, tags=["a", 5], note="half \ud83d")[0]]
ODD_ROWS += named("1.jpg", first=1, size=10**30, image="x")
STRAY = ("tags.parquet", "raw/old.tar", "a.arrow", ".cache/b.parquet", ".c.jpg", "__MACOSX/._0.jpg", "d.json")
LAYOUTS = {  # each has the first two images to train on: files or a function that writes them, and flags
    "metadata.jsonl": BOTH,
    "metadata.csv": in_csv(),
    "CSV of Excel": in_csv("\r\n", ";", "\ufeff"),
    "CSV with CR": in_csv("\r"),
    "CSV with tabs": in_csv(separator="\t"),
    "CSV with a long field": in_csv(other="x" * 200_000),
    "metadata.parquet": BOTH_FILES
    | {"metadata.parquet": pyarrow.Table.from_pylist(named("0.jpg", "1.jpg", n=5))},
    "order of the file": {"b.jpg": 0, "a.jpg": 1, "metadata.jsonl": named("b.jpg", "a.jpg")},
    "order of several files": {"b.jpg": 1, "b.csv/metadata.csv": f"file_name,text\n../b.jpg,{TEXTS[1]}\n"}
    | {"a/c/0.jpg": 0, "a/metadata.jsonl": named("c/0.jpg")},
    "a root's file and others": {"train/0.jpg": 0, "train/x/1.jpg": 1, "metadata.jsonl": named("train/0.jpg")}
    | {"train/x/metadata.jsonl": named("1.jpg", first=1)},
    "text files": {"0.b.jpg": 0, "0.b.txt": f"  {T0}\r\n", "c/1.JPG": 1}
    | {"c/1.txt": "\ufeff" + T1.replace(" ", "\n")},
    "text files, a column": (BOTH_FILES | {"0.txt": T0, "1.txt": T1}, "prompt"),
    "metadata before text files": BOTH | {"0.txt": "not this one"},
    "other columns": BOTH_FILES | {"metadata.jsonl": ODD_ROWS},
    "backslashes": {"a/0.jpg": 0, "a/b/1.jpg": 1, "metadata.jsonl": named("a\\0.jpg", "a\\b\\1.jpg")},
    "composed names": {f"a/{NFD}": 0, f"b/{NFD}": 1, "metadata.jsonl": named(f"a/{NFC}", f"b\\{NFC}")},
    "decomposed names": {f"a/{NFC}": 0, f"b/{NFC}": 1, "metadata.jsonl": named(f"a/{NFD}", f"b\\{NFD}")},
    "split folders": {"train/0.jpg": 0, "train/test/1.jpg": 1, "test/2.jpg": 2, "images/3.jpg": 3}
    | {"metadata.jsonl": named("train/0.jpg", "train/test/1.jpg", "test/2.jpg", "images/3.jpg")},
    "all but test": {"0/0.jpg": 0, "1.jpg": 1, "test/2.jpg": 2, "validation/2.jpg": 2}
    | {"0/0.txt": T0, "1.txt": T1, "test/2.txt": "a", "validation/2.txt": "a"},
    "images beside data files": BOTH | dict.fromkeys(STRAY, "anything"),
    "links": link_images,
    "Parquet": {"a.parquet": table(0), "b.parquet": table(1)},
    "Parquet of bytes": {"a.parquet": table(0, 1, image=FILES.__getitem__)},
    "Parquet without paths": {"a.parquet": table(0, 1, image=lambda index: {"bytes": FILES[index]})},
    "Parquet, one more column": {"a.parquet": table(0), "b.parquet": table(1, note="x")},
    "Parquet, one column less": {"a.parquet": table(0, note="x"), "b.parquet": table(1)},
    "Parquet, null and text": {"a.parquet": table(0, note=None), "b.parquet": table(1, note="x")},
    "Parquet, numbers and text": {"a.parquet": table(0, note=5), "b.parquet": table(1, note="x")},
    "Parquet of the Hub": {"README.md": "---\nlicense: mit\n---\n"}
    | {"data/train-00000-of-00001.parquet": table(0, 1), "data/test-00000-of-00001.parquet": table(2)},
    "Arrow": {"data-00000-of-00002.arrow": table(0), "data-00001-of-00002.arrow": table(1)},
    "saved": saved(),
    "saved with splits": save_splits,
    "saved with NumPy's format": (saved("numpy"), "captions"),
    "saved with pandas's format": (saved("pandas"), "captions"),
    "saved with torch's format": saved("torch"),
    "saved with a format of columns": saved(columns=["text"]),
    "img2dataset, files": img2dataset("files"),
    "img2dataset, Parquet": (img2dataset("parquet"), "caption", "jpg"),
    "img2dataset, tar": (img2dataset("webdataset"), "txt", "jpg"),
}


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_each_layout_are_loaded_in_order(layout, flag, tmp_path, caplog):
    content, *columns = LAYOUTS[layout] if isinstance(LAYOUTS[layout], tuple) else (LAYOUTS[layout],)
    folder = tmp_path / "set"
    content(folder) if callable(content) else write(folder, content)
    flags = dict(zip(("caption_column", "image_column"), columns, strict=False))
    captions = [row["captions"] for row in ROWS[:2]] if columns == ["captions"] else None
    assert load(folder, flag=flag, **flags) == expected(0, 1, captions=captions)
    assert not [record for record in caplog.records if record.levelname != "INFO"]


# ---------------------------------------------------------------------------------------------------- names


def test_a_folder_is_found_by_any_of_its_names(tmp_path, monkeypatch):
    write(tmp_path / "set", BOTH)
    (tmp_path / "link").symlink_to("set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("set", "./set/", "link", tmp_path / "link", "~/set", "~/link/../set"):
        assert load(name) == load(name, flag="dataset_name") == expected(0, 1), name


LETTERS = ["a::b", "[x] y", "100% #1?", "*", "train", "test tubes", "validation-1", "été 猫", "a'b\"", "10_x"]


@pytest.mark.parametrize("parent", ["set :: [1] *", "test", "train", "validation"])
def test_names_are_names(parent, tmp_path):
    """Neither patterns, URLs nor splits, of images, of Parquet files, and of entries in tars."""
    names = [f"{name.replace('train', 'trains')}/{name}.jpg" for name in LETTERS]
    files = {name: i for i, name in enumerate(names)} | {"metadata.jsonl": named(*names)}
    write(tmp_path / parent / "set", files)
    assert load(tmp_path / parent / "set") == expected(*range(len(names)))
    names = sorted(name.replace("::", ":").replace("train", "train_stations") for name in LETTERS)
    parent = parent.replace("::", ":")
    write(tmp_path / parent / "table", {f"{name}.parquet": table(i) for i, name in enumerate(names)})
    assert load(tmp_path / parent / "table") == expected(*range(len(names)))
    entries = [(f"a/{name}.{kind}", name, kind) for name in ("b::c [1]", "test") for kind in ("jpg", "txt")]
    entries = {entry: FILES[0] if kind == "jpg" else name.encode() for entry, name, kind in entries}
    write(tmp_path / parent / "tar", {"test [1]: *.tar": entries})
    loaded = load(tmp_path / parent / "tar", image_column="jpg", caption_column="txt")
    assert loaded == expected(0, 0, captions=[["b::c [1]"], ["test"]])


def test_a_name_that_is_not_utf8_is_a_row_that_cannot_be_used(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path, {f"{name}.jpg": 0, f"{name}.txt": "a cup", **BOTH})
    assert re.search(r"1 of 3 rows cannot be used, the first: row 2 \(.*/caf\?\.jpg\): ", error_of(tmp_path))
    assert load(tmp_path, "--skip_bad_rows") == expected(0, 1)


# ------------------------------------------------------------------------------------------------- captions


def test_captions_in_csv_are_text_as_written(tmp_path):
    captions = ["NA", "None", "null", "nan", "1984", "", " a, b ", 'the "best"\nof two lines', "été"]
    names, file = [f"{number}.jpg" for number in range(len(captions))], io.StringIO(newline="")
    csv.writer(file).writerows([["file_name", "text"], *zip(names, captions, strict=True)])
    write(tmp_path, {name: i for i, name in enumerate(names)} | {"metadata.csv": "\ufeff" + file.getvalue()})
    assert load(tmp_path) == expected(*range(len(names)), captions=[[text] for text in captions])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4646\n"
UNUSABLE = {  # a row of metadata or the content of a .txt file, and the cause that is named
    "half an emoji": ({"text": "thumbs up \ud83d"}, "the caption is None"),
    "half an emoji of several": ({"text": ["a cat", "thumbs up \ud83d"]}, "the caption is None"),
    "half an emoji in the name": ({"file_name": "\ud83d.jpg", "text": "a cat"}, "No such file"),
    "null character": ({"file_name": "a\0.jpg", "text": "a cat"}, "null"),
    "outside": ({"file_name": "../secret.jpg", "text": "a cat"}, "outside the data set's folder"),
    "sibling": ({"file_name": "../set-2.jpg", "text": "a cat"}, "outside the data set's folder"),
    "missing image": ({"file_name": "nowhere.jpg", "text": "a cat"}, "No such file"),
    "empty image": ({"file_name": "empty.jpg", "text": "a cat"}, "the image is missing or empty"),
    "a number": ({"text": 5}, "the caption is None"),
    "null": ({"text": None}, "the caption is None"),
    "no caption": ({}, "the caption is None"),
    "no captions": ({"text": []}, r"the caption is \[\]"),
    "a list with a number": ({"text": ["a cat", 5]}, "the caption is None"),
    "empty text file": (b" \n", "the caption is None"),
    "Latin-1 text file": (b"caf\xe9", "the caption is None"),
    "Latin-1 metadata": ({"text": b"caf\xe9".decode(errors="surrogateescape")}, "the caption is None"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_row_that_cannot_be_used_is_named_and_can_be_skipped(case, tmp_path, caplog):
    (row, cause), folder = UNUSABLE[case], tmp_path / "set"
    write(folder, BOTH | {"2.jpg": 2, "empty.jpg": b"", "../secret.jpg": 3, "../set-2.jpg": 4})
    rows = [{"file_name": "2.jpg"} | row] if isinstance(row, dict) else []
    write(folder, {"2.txt": row} if not rows else {"metadata.jsonl": BOTH["metadata.jsonl"] + rows})
    message = rf"1 of 3 rows cannot be used, the first: row 2 \(.*jpg\): .*{cause}"
    assert re.search(f"^{message}.*--skip_bad_rows$", error_of(folder))
    assert load(folder, "--skip_bad_rows") == expected(0, 1)
    assert re.search(message, [r.getMessage() for r in caplog.records if r.levelname == "WARNING"][-1])
    write(folder, {"metadata.jsonl": rows})
    if rows and "text" in rows[0]:
        assert "1 of 1 rows cannot be used" in error_of(folder, "--skip_bad_rows")


@pytest.mark.parametrize(
    "image", [None, {"path": "http://127.0.0.1:9/a.jpg"}, {"path": "zip://a.jpg::a.zip"}]
)
def test_a_row_of_parquet_without_an_image_or_with_a_url_is_skipped(image, tmp_path):
    tables = {"a.parquet": table(0), "b.parquet": table(1, image=lambda _: image), "c.parquet": table(1)}
    write(tmp_path, tables)
    cause = "outside the data set's folder" if image else "missing or empty"
    assert re.search(rf"^1 of 3 rows .*: row 1 \(.*\): .*{cause}.*--skip_bad_rows$", error_of(tmp_path))
    assert load(tmp_path, "--skip_bad_rows") == expected(0, 1)


def test_captions_of_different_types_are_lists(tmp_path):
    rows = [{"file_name": "0.jpg", "text": "a cat"}, {"file_name": "1.jpg", "text": ["a dog", "a hound"]}]
    write(tmp_path, BOTH | {"metadata.jsonl": rows})
    assert load(tmp_path) == expected(0, 1, captions=[["a cat"], ["a dog", "a hound"]])


def test_what_is_not_used_is_counted(tmp_path, caplog):
    write(tmp_path / "images", LAYOUTS["split folders"] | {"train/4.jpg": 4, "train/5.jpg": 5})
    load(tmp_path / "images")
    assert f"2 images without captions are not used: {tmp_path}/images/train/4.jpg" in caplog.text


# ---------------------------------------------------------------------------------------------------- splits


SPLITS = {"train-00000-of-00002": "test-00000-of-00001", "train": "extra", "0": "test", "train/0": "0"}
SPLITS |= {"data/train-00000-of-00002": "data/validation-00000-of-00001", "default/train/0": "default/test/0"}


@pytest.mark.parametrize("train", SPLITS)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_of_data_files_only_those_of_the_split_train_are_used(kind, train, tmp_path):
    write(tmp_path, {f"{train}.{kind}": table(0), f"{SPLITS[train]}.{kind}": table(1)})
    assert load(tmp_path) == expected(0)


# --------------------------------------------------------------------------------------------------- errors

ROW, HEAD = '{"file_name": "0.jpg", "text": "a"}\n', "file_name,text\n"
JSON, CSV = "metadata.jsonl", "metadata.csv"
REFUSED = [  # a file beside 0.jpg, and what is said of it
    (JSON, ROW + '\n{"file_name": "1.jpg"\n', "metadata.jsonl, line 3: "),
    (JSON, ROW + '["1.jpg"]\n', "metadata.jsonl, line 2: "),
    (JSON, ROW + '{"text": "a"}\n', "metadata.jsonl, line 2: .*file_name"),
    (JSON, '{"file_name": 5, "text": "a"}\n', "metadata.jsonl, line 1: "),
    (JSON, ROW.replace("text", "caption"), "no column text, only file_name, caption"),
    (CSV, HEAD.replace("text", "caption") + "0.jpg,a\n", "no column text, only file_name, caption"),
    (CSV, HEAD + '0.jpg,a\n1.jpg,"a\n2.jpg,b\n', "metadata.csv, line 3: "),
    (CSV, HEAD + '0.jpg,"a\nb"\n1.jpg,a, b\n', "metadata.csv, line 4: .*quote"),
    ("1.jpg", 0, "no captioned images.*metadata.jsonl, a line .*cat.txt"),
    ("test-00000-of-00001.parquet", table(0), "no rows in a split named train, only in test"),
    ("0.tar", b"no tar" * 1000, "tar|header|ReadError"),
    ("0.parquet", b"no Parquet" * 1000, "Parquet magic"),
    ("0.parquet", POINTER, "0.parquet is a Git LFS pointer: run `git lfs pull`"),
    ("0.parquet", table(0).rename_columns(["photo", "caption"]), "'image'.*: .*photo.*caption"),
    ("0.parquet", table(0).rename_columns(["image", "caption"]), "'text'.*: .*image.*caption"),
]


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize(("name", "content", "cause"), REFUSED)
def test_what_cannot_be_loaded_is_one_line_that_names_the_cause(name, content, cause, flag, tmp_path):
    write(tmp_path, {"0.jpg": 0, name: content})
    assert re.search(f"^--{flag}={tmp_path}: .*{cause}", error_of(tmp_path, flag=flag))


def test_other_folders_that_cannot_be_loaded_are_one_line(tmp_path):
    assert re.search("^--train_data_dir=.*/a: .*No such file", error_of(tmp_path / "a"))
    write(tmp_path / "b", {"test/0.jpg": 0, "test/0.txt": "a"})
    assert "no rows in a split named train, only in test" in error_of(tmp_path / "b")
    write(tmp_path / "c", {"a/0.jpg": 0, "a/metadata.jsonl": ROW, "metadata.csv": HEAD + "a/0.jpg,a\n"})
    assert re.search("a/metadata.jsonl and .*/metadata.csv both name .*/a/0.jpg", error_of(tmp_path / "c"))


NO_IMAGES = "--image_column=image: |outside the data set's folder"
COLUMNS = [  # rows, flags, and what is said of the column
    (saved(), {"image_column": "photo"}, "^--image_column=photo: .*photo.*image.*text.*captions"),
    (saved(), {"caption_column": "photo"}, "^--caption_column=photo: .*photo.*image.*text.*captions"),
    (BOTH, {"image_column": "img"}, "^--image_column=img: .*image.*text"),
    (BOTH, {"image_column": "text"}, "^--image_column=text: .*string.*, not images"),
    (5, {}, NO_IMAGES),
    ("0.jpg", {}, NO_IMAGES),
    (["a"], {}, NO_IMAGES),
    ({"data": b"no image", "label": 1}, {}, "^--image_column=image: .*label.*, not images"),
]


@pytest.mark.parametrize(("content", "flags", "cause"), COLUMNS)
def test_a_column_that_is_not_there_or_holds_no_images_is_one_line(content, flags, cause, tmp_path):
    if callable(content):
        content(tmp_path / "set")
    else:
        write(
            tmp_path / "set", content if content is BOTH else {"a.parquet": table(0, image=lambda _: content)}
        )
    assert re.search(cause, error_of(tmp_path / "set", **flags))


def test_paths_in_parquet_are_read_inside_the_folder_and_refused_outside(tmp_path):
    """As `to_parquet` stores the rows of an imagefolder."""
    path = str(tmp_path / "images" / "{}.jpg")
    paths = table(0, 1, image=lambda i: {"path": path.format(i)})
    write(tmp_path / "images", BOTH_FILES | {"a.parquet": paths})
    assert load(tmp_path / "images") == expected(0, 1)
    write(tmp_path / "paths", {"a.parquet": paths})
    assert re.search(r"2 of 2 rows .*0\.jpg\): .*outside .* embed", error_of(tmp_path / "paths"))


def test_nothing_is_written_for_images_which_are_read_anew_each_time(tmp_path):
    def fingerprint():
        flags = [f"--train_data_dir={tmp_path / 'set'}", f"--cache_dir={tmp_path / 'cache'}"]
        args = script.parse_args(flags)
        return script.load_train_dataset(args)._fingerprint

    write(tmp_path / "set", BOTH)
    first = fingerprint()
    assert fingerprint() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    assert {path.name for path in (tmp_path / "set").iterdir()} == BOTH.keys()
    os.utime(tmp_path / "set" / "1.jpg", (1, 1))
    assert fingerprint() != first
    write(tmp_path / "set", {"metadata.jsonl": named("0.jpg", "1.jpg", first=5)})
    assert load(tmp_path / "set") == expected(0, 1, captions=[[TEXTS[5]], [TEXTS[6]]])
