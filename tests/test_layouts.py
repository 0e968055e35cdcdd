# SPDX-License-Identifier: Apache-2.0
"""Layouts of data sets: which images and captions are found in a folder, in which order, and what is said."""

import csv
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import PICTURES, SCRIPT, TESTS
from transformers import CLIPTokenizerFast

import train_text_to_image_prior as script

ROWS = [json.loads(line) for line in (PICTURES / "metadata.jsonl").read_text().splitlines()]
FILES = [(PICTURES / row["file_name"]).read_bytes() for row in ROWS]


def parse_args(folder, **flags):
    flags = {"train_data_dir": folder, "report_to": "none", "seed": 0} | flags
    return script.parse_args([f"--{name}" if v is True else f"--{name}={v}" for name, v in flags.items()])


def load(folder, **flags):
    """Caption and file of each row, in order."""
    args = parse_args(folder, **flags)
    rows = script.load_train_dataset(args)
    assert rows.column_names == [args.image_column, args.caption_column]
    assert rows.features[args.image_column] == datasets.Image(decode=False)
    loaded = []
    for row in rows:
        image = row[args.image_column]
        content = (
            image["bytes"] or script.find_image_file(image["path"], script.image_folders(args)).read_bytes()
        )
        loaded.append((row[args.caption_column], content))
    return loaded


def expected(*indices, captions=None):
    captions = captions or [ROWS[index]["text"] for index in indices]
    return [(caption, FILES[index]) for caption, index in zip(captions, indices, strict=True)]


def error_of(folder, **flags):
    """The one line in which loading ends."""
    with pytest.raises(SystemExit) as ended:
        load(folder, **flags)
    assert "\n" not in ended.value.code
    return ended.value.code


def write_images(folder, names):
    """Copies images to these names, in their order."""
    for name, content in zip(names, FILES, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_metadata(file, names, first=0, **columns):
    """A metadata file, by its suffix, that names files and captions them as the images from `first` on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"file_name": name, "text": row["text"]} | columns
        for name, row in zip(names, ROWS[first:], strict=False)
    ]
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with open(file, "w", newline="") as target:
            writer = csv.DictWriter(target, ["file_name", "text", *columns])
            writer.writeheader()
            writer.writerows(rows)


NAMES = [f"{number}.jpg" for number in (2, 0, 3, 1)]  # in no order


# ------------------------------------------------------------------------------------------- metadata files


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("folder", ["", "train/", "some/where/"])
def test_a_metadata_file_at_the_root_names_files_below_it_and_gives_their_order(
    kind, folder, tmp_path, caplog
):
    names = [folder + name for name in NAMES]
    write_images(tmp_path, names)
    write_metadata(tmp_path / f"metadata.{kind}", names, number=5)
    assert load(tmp_path) == expected(0, 1, 2, 3)
    assert f"Found 4 images in {tmp_path}: 4 captions in metadata.{kind}" in caplog.text
    assert "not used" not in caplog.text


def test_several_metadata_files_of_all_kinds_are_read_in_the_order_of_their_images(tmp_path, caplog):
    folders = {"b": "csv", "a": "jsonl", "c/d": "parquet"}
    write_images(tmp_path, [f"{folder}/{number}.jpg" for folder in folders for number in (1, 0)])
    for index, (folder, kind) in enumerate(folders.items()):
        write_metadata(tmp_path / folder / f"metadata.{kind}", ["1.jpg", "0.jpg"], first=2 * index)
    assert load(tmp_path) == expected(3, 2, 1, 0, 5, 4)
    assert "6 captions in 3 metadata files" in caplog.text


def test_an_image_that_two_metadata_files_name_is_an_error(tmp_path):
    write_images(tmp_path, ["a/0.jpg"])
    write_metadata(tmp_path / "metadata.csv", ["a/0.jpg"])
    write_metadata(tmp_path / "a" / "metadata.jsonl", ["0.jpg"])
    error = error_of(tmp_path)
    for file in ("a/metadata.jsonl", "metadata.csv", "a/0.jpg"):
        assert str(tmp_path / file) in error


def test_captions_in_csv_are_text_as_written(tmp_path):
    captions = ["NA", "None", "null", "nan", "1984", "", " a, b ", 'the "best"\nof two lines', "été"]
    names = [f"{number}.jpg" for number in range(len(captions))]
    write_images(tmp_path, names)
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:  # as Excel does
        csv.writer(file).writerows([["file_name", "text"], *zip(names, captions, strict=True)])
    assert load(tmp_path) == expected(*range(len(captions)), captions=captions)


BROKEN = {
    "no JSON": ("jsonl", b'{"file_name": "0.jpg", "text": "a"}\n\n{"file_name": "1.jpg"\n', 3),
    "no object": ("jsonl", b'{"file_name": "0.jpg", "text": "a"}\n["1.jpg"]\n', 2),
    "no file_name": ("jsonl", b'{"file_name": "0.jpg", "text": "a"}\n{"file": "1.jpg"}\n', 2),
    "Latin-1": ("jsonl", '{"file_name": "0.jpg", "text": "été"}\n'.encode("latin-1"), 1),
    "unquoted comma": ("csv", b'file_name,text\n0.jpg,"a\nb"\n1.jpg,a, b\n', 4),
    "open quote": ("csv", b'file_name,text\n0.jpg,a\n1.jpg,"a\n2.jpg,b\n', 3),
    "semicolons": ("csv", b"file_name;text\n0.jpg;a\n", 2),
    "Latin-1 CSV": ("csv", "file_name,text\n0.jpg,a\n1.jpg,été\n".encode("latin-1"), 3),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_an_error_with_file_and_number(case, tmp_path):
    kind, content, line = BROKEN[case]
    write_images(tmp_path, ["0.jpg", "1.jpg", "2.jpg"])
    (tmp_path / f"metadata.{kind}").write_bytes(content)
    assert f"--train_data_dir={tmp_path}: {tmp_path}/metadata.{kind}, line {line}: " in error_of(tmp_path)


def test_captions_of_different_types_are_lists_and_what_is_no_text_is_missing(tmp_path):
    write_images(tmp_path, ["0.jpg", "1.jpg", "2.jpg", "3.jpg"])
    captions = ["a cat", ["a dog", "a hound"], 5, None]
    rows = [{"file_name": f"{i}.jpg", "text": caption} for i, caption in enumerate(captions)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = [caption for caption, _ in load(tmp_path)]
    assert loaded == [["a cat"], ["a dog", "a hound"], None, None]


def test_other_columns_may_hold_anything(tmp_path):
    write_images(tmp_path, ["0.jpg", "1.jpg"])
    others = [
        {"size": {"width": 1}, "tags": ["a", 5], "empty": {}},
        {"size": 10**30, "tags": None, "image": "x"},
    ]
    rows = [{"file_name": f"{i}.jpg", "text": ROWS[i]["text"]} | other for i, other in enumerate(others)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load(tmp_path) == expected(0, 1)


def test_separators_of_windows_in_metadata_are_understood(tmp_path):
    write_images(tmp_path, ["train/0.jpg"])
    write_metadata(tmp_path / "metadata.jsonl", ["train\\0.jpg"])
    assert load(tmp_path) == expected(0)


# ---------------------------------------------------------------------------------------------- .txt files


def test_text_files_caption_the_images_beside_them_that_no_metadata_names(tmp_path, caplog):
    write_images(tmp_path, ["b/0.jpg", "a.b.JPG", "c.jpg", "d.jpg", "e.jpg"])
    (tmp_path / "b" / "0.txt").write_text("\ufeffa cat\r\n on a sofa \n", encoding="utf-8")
    (tmp_path / "a.b.txt").write_text("  été  ", encoding="utf-8")
    (tmp_path / "c.txt").write_text("not this one")
    (tmp_path / "README.txt").write_text("nothing")
    write_metadata(tmp_path / "metadata.jsonl", ["c.jpg"], first=2)
    assert load(tmp_path) == expected(2, 1, 0, captions=[ROWS[2]["text"], "été", "a cat  on a sofa"])
    assert (
        f"Found 5 images in {tmp_path}: 1 captions in metadata.jsonl, 2 captions in .txt files" in caplog.text
    )
    (warning,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert re.search(r" 2 of 5 images in .* are not used: .*: d\.jpg and others$", warning)


def test_text_files_fill_the_caption_column(tmp_path):
    write_images(tmp_path, ["0.jpg"])
    (tmp_path / "0.txt").write_text("a cat")
    assert load(tmp_path, caption_column="prompt") == expected(0, captions=["a cat"])


@pytest.fixture
def tokenizer():
    return CLIPTokenizerFast.from_pretrained(TESTS / "data" / "clip-tokenizer")


def test_empty_text_files_are_named_and_cannot_be_used(tmp_path, caplog, tokenizer):
    write_images(tmp_path, ["0.jpg", "1.jpg", "2.jpg"])
    for number, content in enumerate([b"a cat", b" \n", b"caf\xe9"]):
        (tmp_path / f"{number}.txt").write_bytes(content)
    args = parse_args(tmp_path)
    rows = script.load_train_dataset(args)
    assert rows["text"][:] == ["a cat", None, None]
    assert "2 of 3 .txt files are empty or not UTF-8: 1.txt and others" in caplog.text
    with pytest.raises(
        SystemExit, match=r"2 of 3 rows cannot be used, the first: row 1: .*1\.jpg.*--skip_bad_rows"
    ):
        script.check_rows(rows, args, tokenizer)
    script.check_rows(rows, parse_args(tmp_path, skip_bad_rows=True), tokenizer)


def test_numbers_in_kohyas_folder_names_are_said_to_repeat_nothing(tmp_path, caplog):
    write_images(tmp_path, ["10_cat/0.jpg", "3_dog/1.jpg"])
    for name in ("10_cat/0", "3_dog/1"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert load(tmp_path) == expected(0, 1, captions=["10_cat/0", "3_dog/1"])
    assert "Numbers in folders' names, as in 10_cat, are not read as repeats" in caplog.text
    caplog.clear()
    write_images(tmp_path, ["more/0.jpg"])
    (tmp_path / "more" / "0.txt").write_text("another")
    assert len(load(tmp_path)) == 3
    assert "repeats" not in caplog.text


# --------------------------------------------------------------------------------------------------- names

LETTERS = [
    "a::b",
    "[x] y",
    "100% #1?",
    "*",
    "test",
    "train",
    "validation-1",
    "été 猫",
    "zip:",
    "a'b\"",
    "10_x",
]


def test_names_of_images_are_names(tmp_path):
    names = [f"{name}/{name}.jpg" for name in LETTERS if name not in ("test", "train")]
    names += ["test.jpg", "train.jpg"]
    write_images(tmp_path / "set :: [1]", names)
    write_metadata(tmp_path / "set :: [1]" / "metadata.jsonl", names)
    assert load(tmp_path / "set :: [1]") == expected(*range(len(names)))


def write_parquet(file, *indices, image="image"):
    """A Parquet file of embedded images."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {image: {"bytes": FILES[index], "path": f"{index}.jpg"}, "text": ROWS[index]["text"]}
        for index in indices
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def test_names_of_parquet_files_are_names(tmp_path, caplog):
    folder = tmp_path / "set [1]"
    names = sorted(
        [
            "portraits",
            "train_stations",
            "test tubes",
            "my-validation",
            "[x]",
            "100%?*",
            "a:b",
            "data-00000-of-00002",
        ]
    )
    for index, name in enumerate(names):
        write_parquet(folder / f"{name}.parquet", index)
    assert load(folder) == expected(*range(len(names)))
    assert f"Found {len(names)} rows in {len(names)} .parquet files in {folder}" in caplog.text
    assert "not used" not in caplog.text


def test_a_name_that_datasets_takes_for_a_url_is_an_error(tmp_path):
    write_parquet(tmp_path / "a::b.parquet", 0)
    assert re.search(r"--train_data_dir=.*a::b\.parquet.*rename it", error_of(tmp_path))


def test_a_name_that_is_not_utf8_is_an_error_that_shows_it(tmp_path):
    write_images(tmp_path, [os.fsdecode(b"caf\xe9.jpg")])
    Path(tmp_path, os.fsdecode(b"caf\xe9.txt")).write_text("a cup")
    assert re.search(r"not UTF-8: .*caf\\udce9\.jpg$", error_of(tmp_path))


def test_linked_folders_are_followed_once(tmp_path):
    write_images(tmp_path / "elsewhere", ["0.jpg"])
    (tmp_path / "elsewhere" / "0.txt").write_text("a cat")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "set")
    assert load(tmp_path / "set") == expected(0, captions=["a cat"])


# -------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("root", [True, False])
def test_of_folders_named_as_splits_only_train_is_used_and_the_rest_is_counted(root, tmp_path, caplog):
    write_images(tmp_path, ["train/0.jpg", "train/test/1.jpg", "test/2.jpg", "images/3.jpg"])
    names = ["train/0.jpg", "train/test/1.jpg", "test/2.jpg", "images/3.jpg"]
    if root:
        write_metadata(tmp_path / "metadata.jsonl", names)
    else:
        for index, name in enumerate(names):
            (tmp_path / name).with_suffix(".txt").write_text(ROWS[index]["text"])
    assert load(tmp_path) == expected(0, 1)
    assert f"Found 2 images in {tmp_path}: 2 captions" in caplog.text
    assert "2 images are not in the split train and are not used: images/3.jpg and others" in caplog.text


def test_without_a_train_folder_all_but_test_and_validation_is_used(tmp_path, caplog):
    write_images(tmp_path, ["cats/0.jpg", "1.jpg", "test/2.jpg", "validation/3.jpg"])
    write_metadata(tmp_path / "metadata.jsonl", ["cats/0.jpg", "1.jpg", "test/2.jpg", "validation/3.jpg"])
    assert load(tmp_path) == expected(0, 1)
    assert "2 images are not in the split train and are not used: test/2.jpg and others" in caplog.text


def test_a_row_of_metadata_whose_image_is_missing_is_kept_for_the_check(tmp_path, tokenizer):
    write_images(tmp_path, ["0.jpg"])
    write_metadata(tmp_path / "metadata.jsonl", ["0.jpg", "nowhere.jpg"])
    args = parse_args(tmp_path)
    with pytest.raises(SystemExit, match=r"1 of 2 rows .*row 1: .*nowhere\.jpg\) is missing"):
        script.check_rows(script.load_train_dataset(args), args, tokenizer)


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("train-00000-of-00002", "test-00000-of-00001"),
        ("data/train-00000-of-00002", "data/validation-00000-of-00001"),
        ("train", "extra"),
        ("train/0", "test/0"),
        ("default/train/0", "default/test/0"),
        ("train/0", "0"),
        ("0", "test"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_of_data_files_only_those_of_the_split_train_are_used(kind, train, other, tmp_path, caplog):
    for name, index in ((train, 0), (other, 1)):
        file = tmp_path / f"{name}.{kind}"
        write_parquet(file, index)
        if kind == "arrow":
            table = pyarrow.parquet.read_table(file)
            with (
                pyarrow.OSFile(str(file), "wb") as sink,
                pyarrow.ipc.new_stream(sink, table.schema) as writer,
            ):
                writer.write_table(table)
    assert load(tmp_path) == expected(0)
    assert re.search(
        rf"1 other data files \(.*\) there are not used: {other}\.{kind}$", caplog.text, re.MULTILINE
    )


def test_parquet_of_other_splits_alone_is_refused(tmp_path):
    write_parquet(tmp_path / "test-00000-of-00001.parquet", 0)
    assert "there are no rows in a split named train, only test" in error_of(tmp_path)


# --------------------------------------------------------------------------------- Parquet, img2dataset, tars


@pytest.mark.parametrize("stray", [".cache/tags.parquet", "statistics.parquet", "raw/old.tar", "a.arrow"])
def test_data_files_beside_captioned_images_are_not_read(stray, tmp_path, caplog):
    write_images(tmp_path, ["0.jpg", "1.jpg"])
    write_metadata(tmp_path / "metadata.jsonl", ["0.jpg", "1.jpg"])
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).write_bytes(b"anything")
    assert load(tmp_path) == expected(0, 1)
    assert ("1 data files there are not used" in caplog.text) == (not stray.startswith("."))


def img2dataset_record(index):
    """What img2dataset writes about an image, with an additional column that is null at first."""
    record = {
        "url": f"https://example.org/{index}.jpg",
        "caption": ROWS[index]["text"],
        "key": f"{index:09d}",
    }
    record |= {"status": "success", "error_message": None, "width": 256, "height": 256}
    return record | {"exif": "{}", "sha256": "0" * 64, "similarity": None if index < 6 else 0.3}


def write_img2dataset(folder, output_format, shards=(range(8), range(8, 12))):
    """The files that img2dataset writes with this --output_format, with one download that failed."""
    folder.mkdir()
    schema = pyarrow.schema(
        [(name, pyarrow.string()) for name in ("url", "caption", "key", "status", "error_message")]
        + [("width", pyarrow.int32()), ("height", pyarrow.int32()), ("exif", pyarrow.string())]
        + [("sha256", pyarrow.string()), ("similarity", pyarrow.float64())]
    )
    if output_format == "parquet":
        schema = schema.append(pyarrow.field("jpg", pyarrow.binary()))
    for shard, indices in enumerate(shards):
        records = [img2dataset_record(index) for index in indices]
        table = [record | {"jpg": FILES[index]} for record, index in zip(records, indices, strict=True)]
        failed = {
            "url": "https://example.org/gone.jpg",
            "status": "failed_to_download",
            "key": "9",
            "jpg": None,
        }
        if output_format != "parquet":
            table.append(failed)
        columns = {name: [row.get(name) for row in table] for name in schema.names}
        pyarrow.parquet.write_table(pyarrow.table(columns, schema), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        files = {}
        for record, index in zip(records, indices, strict=True):
            files[f"{record['key']}.jpg"] = FILES[index]
            files[f"{record['key']}.txt"] = record["caption"].encode()
            files[f"{record['key']}.json"] = json.dumps(record, indent=4).encode()
        if output_format == "files":
            (folder / f"{shard:05d}").mkdir()
            for name, content in files.items():
                (folder / f"{shard:05d}" / name).write_bytes(content)
        if output_format == "webdataset":
            write_tar(folder / f"{shard:05d}.tar", files)


def write_tar(file, files):
    with tarfile.open(file, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


IMG2DATASET = {
    "files": {},
    "parquet": {"image_column": "jpg", "caption_column": "caption"},
    "webdataset": {"image_column": "jpg", "caption_column": "txt"},
}


@pytest.mark.parametrize("output_format", IMG2DATASET)
def test_outputs_of_img2dataset_are_read(output_format, tmp_path, caplog):
    write_img2dataset(tmp_path / "out", output_format)
    flags = IMG2DATASET[output_format]
    assert load(tmp_path / "out", **flags) == expected(*range(12))
    if output_format != "parquet":
        assert re.search(r"2 .*data files .*there are not used.*: 00000\.parquet and others", caplog.text)
    if flags:
        error = error_of(tmp_path / "out")
        assert "--image_column=image: there is no such column, only " in error
        assert error.endswith("; use " + " ".join(f"--{name}={column}" for name, column in flags.items()))


def test_names_in_and_of_tars_are_names(tmp_path):
    files = {
        f"some/a::b [{index}].{kind}": content
        for index in range(2)
        for kind, content in (("jpg", FILES[index]), ("txt", b"a cat"))
    }
    write_tar(tmp_path / "test [1]: *.tar", files)
    assert load(tmp_path, image_column="jpg", caption_column="txt") == expected(0, 1, captions=["a cat"] * 2)


def test_a_file_that_is_no_tar_is_an_error(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"no tar" * 1000)
    assert error_of(tmp_path).startswith(f"--train_data_dir={tmp_path}: ")


def test_only_the_missing_column_is_suggested(tmp_path):
    write_parquet(tmp_path / "rows.parquet", 0, image="my photo")
    assert error_of(tmp_path).endswith("only my photo, text; use '--image_column=my photo'")


def test_paths_outside_the_folder_are_refused_at_the_start_and_the_readmes_lines_embed_them(
    tmp_path, monkeypatch, tokenizer
):
    """As `to_parquet` stores the rows of an imagefolder."""
    readme = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "embed" in code)
    write_images(tmp_path / "images", ["0.jpg", "1.jpg"])
    write_metadata(tmp_path / "images" / "metadata.jsonl", ["0.jpg", "1.jpg"])
    (tmp_path / "paths").mkdir()
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="train")
    paths = [{"bytes": None, "path": str(tmp_path / "images" / f"{number}.jpg")} for number in range(2)]
    table = pyarrow.table({"image": paths, "text": loaded["text"][:]})
    pyarrow.parquet.write_table(table, tmp_path / "paths" / "rows.parquet")
    args = parse_args(tmp_path / "paths")
    with pytest.raises(SystemExit, match=r"2 of 2 rows .*0\.jpg\) lies outside .* embed the images \(README"):
        script.check_rows(script.load_train_dataset(args), args, tokenizer)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    exec(code, {})
    shutil.rmtree(tmp_path / "images")
    assert load(tmp_path / "embedded") == expected(0, 1)


def test_paths_in_parquet_to_images_in_the_folder_are_read(tmp_path, tokenizer):
    write_images(tmp_path, ["images/0.jpg"])
    paths = [{"bytes": None, "path": str(tmp_path / "images" / "0.jpg")}]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": paths, "text": [ROWS[0]["text"]]}), tmp_path / "a.parquet"
    )
    assert load(tmp_path) == expected(0)
    args = parse_args(tmp_path)
    script.check_rows(script.load_train_dataset(args), args, tokenizer)


def test_nothing_is_written_for_a_folder_of_images_and_its_fingerprint_follows_the_files(tmp_path):
    write_images(tmp_path / "set", ["0.jpg", "1.jpg"])
    write_metadata(tmp_path / "set" / "metadata.jsonl", ["0.jpg", "1.jpg"])

    def fingerprint():
        args = parse_args(tmp_path / "set", cache_dir=tmp_path / "cache")
        return script.load_train_dataset(args)._fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert not (tmp_path / "cache").exists()
    os.utime(tmp_path / "set" / "1.jpg", (1, 1))
    assert fingerprint() != first
