# SPDX-License-Identifier: Apache-2.0
"""From files to batches: unusual images, layouts of data sets, the order of samples, augmentation, captions,
unreadable rows."""

import csv
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import random
import re
import shutil
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import PICTURES, TESTS, Samples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from transformers import CLIPTokenizerFast

import train_text_to_image_prior as script

ROWS = [json.loads(line) for line in (PICTURES / "metadata.jsonl").read_text().splitlines()]
OPAQUE = [row for row in ROWS if Image.open(PICTURES / row["file_name"]).mode == "RGB"]
TRAIN, TEST = OPAQUE[:8], OPAQUE[8:12]
START, END = 49406, 49407  # CLIP's <|startoftext|> and <|endoftext|>
WHITE = (255, 255, 255)
CPU = torch.device("cpu")


def parse_args(*argv, **flags):
    """The script's settings for these flags, with the seed 0."""
    required = [] if "train_data_dir" in flags or "dataset_name" in flags else ["--train_data_dir=unused"]
    flags = [f"--{name}={value}" for name, value in flags.items()]
    return script.parse_args(["--report_to=none", "--seed=0", *required, *argv, *flags])


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizerFast.from_pretrained(TESTS / "data" / "clip-tokenizer")


@pytest.fixture
def log(caplog):
    """What the script logs."""
    return caplog


def preprocess_for(args, tokenizer, train=True):
    """The function from a row to its tensors, as `main` makes it."""
    return script.make_preprocess(args, tokenizer, None, train=train)


# ---------------------------------------------------------------------------------------------------- images


def encode_image(image, kind="PNG", **options):
    """An image as `datasets` returns it undecoded."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def encode_png(width, height, depth, color_type, pixels, *, palette=None, transparent=None):
    """A PNG written chunk by chunk, since Pillow reads more kinds than it writes. `pixels` is packed."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    stride = len(pixels) // height
    rows = b"".join(b"\0" + pixels[y * stride : (y + 1) * stride] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    file += chunk(b"PLTE", palette) if palette else b""
    file += chunk(b"tRNS", transparent) if transparent else b""
    return {"bytes": file + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""), "path": None}


def load_pixels(value):
    """The pixels of an encoded image as the script loads it, (height, width, 3)."""
    image = script.load_image(value, [])
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def composite_on_white(colors, alpha):
    """(..., 3) colors with (...) alpha on white, in exact arithmetic."""
    share = np.asarray(alpha)[..., None] / 255
    return np.asarray(colors) * share + 255 * (1 - share)


def random_integers(*shape, seed=0, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, shape)


def random_image(width, height):
    return Image.fromarray(random_integers(height, width, 3).astype(np.uint8))


def test_transparent_rgb_is_composited_on_white():
    pixels = random_integers(32, 48, 4)
    pixels[:8, :, 3], pixels[8:16, :, 3] = 0, 255
    loaded = load_pixels(encode_image(Image.fromarray(pixels.astype(np.uint8), "RGBA")))
    assert np.abs(loaded - composite_on_white(pixels[..., :3], pixels[..., 3])).max() <= 1
    assert (loaded[:8] == 255).all(), "colors of fully transparent pixels are visible"
    assert (loaded[8:16] == pixels[8:16, :, :3]).all()


def test_transparent_grayscale_is_composited_on_white():
    pixels = random_integers(16, 24, 2)
    loaded = load_pixels(encode_image(Image.fromarray(pixels.astype(np.uint8), "LA")))
    assert np.abs(loaded - composite_on_white(pixels[..., :1].repeat(3, -1), pixels[..., 1])).max() <= 1


def test_palette_with_an_alpha_for_each_color_is_composited_on_white():
    palette, alpha = random_integers(16, 3, seed=1), random_integers(16, seed=2)
    alpha[0], alpha[1] = 0, 255
    index = random_integers(8, 8, high=16)
    value = encode_png(
        8,
        8,
        8,
        3,
        index.astype(np.uint8).tobytes(),
        palette=bytes(palette.ravel().tolist()),
        transparent=bytes(alpha.tolist()),
    )
    assert np.abs(load_pixels(value) - composite_on_white(palette[index], alpha[index])).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_transparency_of_other_formats_is_composited_on_white(kind):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = 200, 0, 0, 255
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = load_pixels(encode_image(Image.fromarray(pixels, "RGBA"), kind, **options))
    assert (loaded[:, :4] == (200, 0, 0)).all()
    assert (loaded[:, 4:] == 255).all()


def test_transparent_color_of_an_rgb_or_grayscale_png_becomes_white():
    rgb = encode_png(2, 1, 8, 2, bytes([7, 8, 9, 200, 1, 2]), transparent=struct.pack(">3H", 7, 8, 9))
    assert load_pixels(rgb).tolist() == [[[255, 255, 255], [200, 1, 2]]]
    gray = encode_png(2, 1, 8, 0, bytes([7, 200]), transparent=struct.pack(">H", 7))
    assert load_pixels(gray).tolist() == [[[255, 255, 255], [200, 200, 200]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grayscale_is_scaled_not_clipped(kind):
    values = np.arange(1 << 16).reshape(256, 256)
    value = encode_image(Image.fromarray(values.astype(np.uint16)), kind)
    assert Image.open(io.BytesIO(value["bytes"])).mode in ("I", "I;16")  # depends on Pillow's version
    assert (load_pixels(value) == ((values + 128) // 257)[..., None]).all()  # 65535 / 255 = 257


def test_16_bit_grayscale_with_a_transparent_value_is_scaled_and_composited_on_white():
    pixels = struct.pack(">4H", 0, 1000, 1001, 65535)
    value = encode_png(4, 1, 16, 0, pixels, transparent=struct.pack(">H", 1000))
    assert load_pixels(value)[0, :, 0].tolist() == [0, 255, 4, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grayscale_of_unknown_range_is_refused_by_name(dtype):
    values = np.arange(64).reshape(8, 8).astype(dtype)
    value = encode_image(Image.fromarray(values), "TIFF") | {"path": "depth/17.tif"}
    with pytest.raises(ValueError, match=r"depth/17\.tif.* range of its pixel values is unknown"):
        script.load_image(value, [])


@pytest.mark.parametrize(
    ("name", "content"),
    [("eXIf", b"\0\x08 no TIFF header"), ("zTXt", b"history\0\0" + zlib.compress(bytes(2 << 20)))],
)
def test_pixels_of_a_png_with_broken_exif_or_long_text_are_read(name, content):
    pixels = random_integers(8, 8, 3)
    file = encode_image(Image.fromarray(pixels.astype(np.uint8)))["bytes"]
    chunk = struct.pack(">I", len(content)) + name.encode() + content
    chunk += struct.pack(">I", zlib.crc32(name.encode() + content))
    header = 8 + 4 + 4 + 13 + 4  # signature; length, name, content and checksum of IHDR
    assert (load_pixels({"bytes": file[:header] + chunk + file[header:], "path": None}) == pixels).all()


def test_16_bit_rgb_is_scaled():
    opaque = encode_png(2, 1, 16, 2, struct.pack(">6H", 0, 1000, 32768, 65535, 40000, 20000))
    expected = np.array([[0, 1000, 32768], [65535, 40000, 20000]]) / 257
    assert np.abs(load_pixels(opaque) - expected).max() <= 1
    transparent = encode_png(2, 1, 16, 6, struct.pack(">8H", 30000, 20000, 10000, 65535, 30000, 0, 0, 0))
    expected = np.array([[30000 / 257, 20000 / 257, 10000 / 257], WHITE])
    assert np.abs(load_pixels(transparent) - expected).max() <= 1


def test_grayscale_and_one_bit_images_become_rgb():
    gray = random_integers(8, 8)
    assert (load_pixels(encode_image(Image.fromarray(gray.astype(np.uint8)))) == gray[..., None]).all()
    bits = random_integers(8, 8, high=2)
    assert (load_pixels(encode_image(Image.fromarray(bits.astype(bool)))) == 255 * bits[..., None]).all()


def test_cmyk_jpeg_becomes_rgb():
    cyan, magenta, yellow, black = 0, 100, 200, 10
    image = Image.new("CMYK", (16, 16), (cyan, magenta, yellow, black))
    loaded = load_pixels(encode_image(image, "JPEG", quality=100))
    expected = [(255 - ink) * (255 - black) / 255 for ink in (cyan, magenta, yellow)]
    assert np.abs(loaded - expected).max() <= 2


def test_image_of_one_pixel_fills_the_square():
    image = script.load_image(encode_image(Image.new("RGB", (1, 1), (1, 2, 3))), [])
    pixels = script.make_image_transforms((64, 64))(image)
    assert pixels.shape == (3, 64, 64)
    assert (pixels == torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]).all()


def by_torchvision(image, resolution):
    """The tensor that the diffusers training guide's transforms make of an RGB image."""
    return transforms.Compose(
        [
            transforms.Resize(
                resolution, interpolation=transforms.InterpolationMode.BILINEAR, antialias=True
            ),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )(image)


UPRIGHT = {  # EXIF's orientation tag -> what a viewer does to the stored (height, width, 3)
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}


def test_exif_orientation_is_applied_exactly_once(tmp_path, tokenizer):
    stored = random_integers(40, 56, 3).astype(np.uint8)
    with open(tmp_path / "metadata.jsonl", "w") as metadata:
        for orientation in UPRIGHT:
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.fromarray(stored).save(tmp_path / f"{orientation}.png", exif=exif)
            metadata.write(json.dumps({"file_name": f"{orientation}.png", "text": str(orientation)}) + "\n")
    args = parse_args(train_data_dir=tmp_path, resolution=32)
    rows = script.load_train_dataset(args)
    preprocess = preprocess_for(args, tokenizer)
    for row in rows:
        upright = np.ascontiguousarray(UPRIGHT[int(row["text"])](stored))
        pixels = script.normalize_pixels(preprocess(row, (32, 32))["effnet_pixel_values"][None])[0]
        assert torch.equal(pixels, by_torchvision(Image.fromarray(upright), 32)), row["text"]
    assert len(rows) == 8


@pytest.mark.parametrize("resolution", [32, 75, 96])
def test_pixels_are_those_of_torchvision_bit_for_bit(resolution, tokenizer):
    preprocess = preprocess_for(parse_args(resolution=resolution), tokenizer)
    for size in [(64, 64), (33, 47), (47, 33), (101, 64), (32, 255), (255, 32), (75, 76), (1, 3)]:
        image = random_image(*size)
        row = {"image": encode_image(image), "text": ""}
        pixels = preprocess(row, (resolution, resolution))["effnet_pixel_values"]
        assert pixels.shape == (3, resolution, resolution)
        assert pixels.dtype == torch.uint8
        normalized = script.normalize_pixels(pixels[None])
        assert normalized.dtype == torch.float32
        assert torch.equal(normalized[0], by_torchvision(image, resolution)), size


def test_normalize_pixels_is_to_tensor_and_normalize_bit_for_bit():
    """For each of the 256 values in each channel."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    images = [np.stack([values, values[::-1], values.T], -1), random_integers(16, 16, 3).astype(np.uint8)]
    expected = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])
    assert pixels.dtype == torch.uint8
    normalized = script.normalize_pixels(pixels)
    assert normalized.dtype == torch.float32
    assert torch.equal(normalized, torch.stack([expected(Image.fromarray(image)) for image in images]))


def square_within(memory, value, resolution):
    """In a process of its own: squares an image with this much more memory than the process has already."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    pixels = script.make_image_transforms((resolution, resolution))(script.load_image(value, []))
    sys.exit(pixels.shape != (3, resolution, resolution))


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
@pytest.mark.parametrize("size", [(4000, 2), (2, 4000), (60000, 1)])
def test_very_long_images_are_squared_in_bounded_memory(size):
    # Resized uncropped to this resolution, the first two would be 2 GB and the last one 60 GB.
    work = (200 << 20, encode_image(Image.new("RGB", size)), 512)
    child = multiprocessing.get_context("fork").Process(target=square_within, args=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("size", [(4000, 2), (2, 4000)])
def test_very_long_images_keep_their_center(size):
    image = random_image(*size)
    expected = transforms.CenterCrop(32)(transforms.Resize(32, antialias=True)(image))
    pixels = script.make_image_transforms((32, 32))(script.load_image(encode_image(image), []))
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


# ----------------------------------------------------------------------------------------- data set layouts


def write_folder(folder, rows=TRAIN, metadata="jsonl", rename=lambda name: name):
    """A folder of images with their captions."""
    folder.mkdir(parents=True)
    listed = []
    for row in rows:
        shutil.copy(PICTURES / row["file_name"], folder / rename(row["file_name"]))
        listed.append({**row, "file_name": rename(row["file_name"])})
    if metadata == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    else:
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["file_name", "text"], *([row["file_name"], row["text"]] for row in listed)])
    return folder


def make_dataset(rows=TRAIN):
    """A datasets.Dataset with an Image column that holds its files."""
    images = [{"bytes": (PICTURES / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    columns = {"image": images, "text": [row["text"] for row in rows]}
    return datasets.Dataset.from_dict(columns, features=features)


def read_files(rows=TRAIN):
    return [(PICTURES / row["file_name"]).read_bytes() for row in rows]


def write_parquet(folder, column):
    """Parquet as other tools write it, without metadata that says that the column holds images."""
    folder.mkdir()
    texts = pyarrow.array([row["text"] for row in TRAIN])
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "text": texts}), folder / "rows.parquet")


def write_hub_layout(folder):
    """The most common layout of data sets on the Hub."""
    (folder / "data").mkdir(parents=True)
    make_dataset().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    make_dataset(TEST).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Images\n")


def write_train_and_test(folder):
    write_folder(folder / "train")
    write_folder(folder / "test", TEST)


LAYOUTS = {  # each has eight rows to train on, TRAIN
    "metadata.jsonl": write_folder,
    "metadata.csv": lambda folder: write_folder(folder, metadata="csv"),
    "train and test folders": write_train_and_test,
    "images named train and test": lambda folder: write_folder(folder, rename=RENAMED.get),
    "parquet of the Hub": write_hub_layout,
    "parquet with bytes and path": lambda folder: write_parquet(
        folder, pyarrow.array([{"bytes": file, "path": "an image"} for file in read_files()])
    ),
    "parquet with binary": lambda folder: write_parquet(folder, pyarrow.array(read_files())),
    "parquet with large binary": lambda folder: write_parquet(
        folder, pyarrow.array(read_files(), pyarrow.large_binary())
    ),
    "saved to disk": lambda folder: make_dataset().save_to_disk(folder),
    "saved to disk with splits": lambda folder: datasets.DatasetDict(
        train=make_dataset(), test=make_dataset(TEST)
    ).save_to_disk(folder),
}
RENAMED = {row["file_name"]: f"{index}{row['file_name'][-5:]}" for index, row in enumerate(TRAIN)}
RENAMED |= dict(zip(RENAMED, ["0.jpg", "1-test.jpg", "2_train.jpg", "3.dev.jpg"], strict=False))


def hash_rows(rows, folders=()):
    """Caption and hash of the pixels of each row, in order."""
    hashes = []
    for row in rows:
        image = script.load_image(row["image"], list(folders))
        hashes.append((row["text"], hashlib.sha256(image.tobytes()).hexdigest()))
    return hashes


def load_and_hash(**flags):
    """`hash_rows` of the rows that these flags load."""
    args = parse_args(**flags)
    return hash_rows(script.load_train_dataset(args), script.image_folders(args))


def expected_rows(rows=TRAIN):
    """The same without `datasets` and the script: these images are RGB and upright."""
    images = [Image.open(PICTURES / row["file_name"]) for row in rows]
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    return list(zip([row["text"] for row in rows], hashes, strict=True))


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_rows_of_the_train_split_in_a_local_folder_are_loaded(layout, flag, tmp_path):
    LAYOUTS[layout](tmp_path / "images")
    assert load_and_hash(**{flag: tmp_path / "images"}) == expected_rows()


@pytest.mark.parametrize(
    "write", [write_folder, write_hub_layout, lambda folder: make_dataset().save_to_disk(folder)]
)
def test_folder_names_may_contain_brackets_spaces_and_stars(write, tmp_path):
    folder = tmp_path / "my [best] images * of 2024?"
    write(folder)
    assert load_and_hash(train_data_dir=folder) == expected_rows()


@pytest.mark.parametrize("parent", ["test", "train", "validation"])
def test_parent_folders_of_the_data_set_are_not_taken_for_splits(parent, tmp_path):
    write_folder(tmp_path / parent / "data")
    assert load_and_hash(train_data_dir=tmp_path / parent / "data") == expected_rows()


def test_captions_edited_since_the_last_run_are_loaded_again(tmp_path):
    folder = write_folder(tmp_path / "images")
    args = parse_args(train_data_dir=folder)
    assert script.load_train_dataset(args)[0]["text"] == TRAIN[0]["text"]
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace(TRAIN[0]["text"], "another caption"))
    assert script.load_train_dataset(args)[0]["text"] == "another caption"


def test_images_and_captions_may_be_in_columns_of_any_name(tmp_path):
    dataset = make_dataset().rename_columns({"image": "photo", "text": "alt text"})
    dataset.to_parquet(tmp_path / "rows.parquet")
    args = parse_args(train_data_dir=tmp_path, image_column="photo", caption_column="alt text")
    rows = script.load_train_dataset(args)
    assert rows.column_names == ["photo", "alt text"]
    assert hash_rows({"image": row["photo"], "text": row["alt text"]} for row in rows) == expected_rows()


# -------------------------------------------------------------------------------------- the order of samples


def selected_captions(count, seed):
    """The captions of the rows that --max_train_samples selects."""
    args = parse_args(train_data_dir=PICTURES, max_train_samples=count, seed=seed)
    return script.load_train_dataset(args)["text"][:]


def test_max_train_samples_selects_rows_with_the_seed(log):
    first, again, other = selected_captions(16, 1), selected_captions(16, 1), selected_captions(16, 2)
    assert len(set(first)) == 16
    assert first == again
    assert set(first) != set(other)
    assert set(first) != {row["text"] for row in ROWS[:16]}
    assert not [record for record in log.records if record.levelname != "INFO"]


def test_max_train_samples_above_the_number_of_rows_uses_all_rows_with_a_warning(log):
    assert sorted(selected_captions(1000, 1)) == sorted(row["text"] for row in ROWS)
    assert "--max_train_samples=1000: there are 64 rows" in log.text


def return_row(row, size):
    """The cheapest `preprocess`: the row itself and a number of each default generator."""
    return {"value": row, "random": (random.random(), torch.rand(()).item(), np.random.rand())}


def read_samples(rows, seed, count, preprocess=return_row, skip_bad_rows=False):
    """The samples at the first positions."""
    samples = Samples(rows, preprocess, seed, skip_bad_rows)
    return [samples[position] for position in range(count)]


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_every_row_occurs_exactly_once_per_epoch(rows):
    values = [sample["value"] for sample in read_samples(range(rows), 3, 5 * rows)]
    epochs = [sorted(values[start : start + rows]) for start in range(0, 5 * rows, rows)]
    assert epochs == [list(range(rows))] * 5


def test_each_epoch_and_each_seed_has_its_own_order():
    keys = itertools.product(range(4), range(8))
    orders = [tuple(script.epoch_permutation(seed, epoch, 64).tolist()) for seed, epoch in keys]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(64)) for order in orders)
    # If they were one order reversed or shifted, neighbors would stay neighbors. By chance one of 63 does.
    pairs = [set(itertools.pairwise(order)) for order in orders]
    assert max(len(a & b) for i, a in enumerate(pairs) for b in pairs[:i]) < 10


def test_sample_is_a_function_of_seed_and_position():
    first, other = read_samples(range(16), 5, 48), read_samples(range(16), 6, 48)
    samples = Samples(range(16), return_row, 5, False)
    shuffled = random.Random(0).sample(range(48), 48)
    assert {position: samples[position] for position in shuffled} == dict(enumerate(first))
    for generator in range(3):
        assert len({sample["random"][generator] for sample in first + other}) == 96


def make_plan(batch_size=4, accumulation=1, ranks=1):
    return script.SamplePlan(
        seed=0,
        num_rows=64,
        rows_hash="",
        num_processes=ranks,
        train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )


COUNT = st.integers(1, 5)


@settings(max_examples=200, deadline=None)
@given(batch_size=COUNT, accumulation=COUNT, ranks=COUNT, steps=st.integers(0, 6), resumed=st.integers(0, 6))
def test_ranks_share_all_positions_and_a_resumed_run_gets_the_rest(
    batch_size, accumulation, ranks, steps, resumed
):
    plan = make_plan(batch_size, accumulation, ranks)
    resumed = min(resumed, steps)
    samples_per_step = batch_size * accumulation * ranks
    assert plan.samples_per_step == samples_per_step
    positions = []
    for rank in range(ranks):
        batches = [list(batch) for batch in plan.train_batches(rank, 0, steps)]
        rest = [list(batch) for batch in plan.train_batches(rank, resumed, steps)]
        assert len(batches) == steps * accumulation
        assert all(len(batch) == batch_size for batch in batches)
        assert rest == batches[resumed * accumulation :]
        for index, batch in enumerate(batches):  # a step has the next positions, on whatever ranks
            assert {position // samples_per_step for position in batch} == {index // accumulation}
        positions += [position for batch in batches for position in batch]
    assert sorted(positions) == list(range(steps * samples_per_step))


@settings(max_examples=200, deadline=None)
@given(batch_size=COUNT, ranks=COUNT, num_rows=st.integers(0, 60))
def test_ranks_share_all_held_out_rows(batch_size, ranks, num_rows):
    plan = make_plan(batch_size, accumulation=2, ranks=ranks)
    buckets = np.arange(num_rows) % 3  # in batches of one size
    rows = script.SizedRows(None, [(32, 64), (64, 32), (32, 32)], buckets)
    shares = [plan.held_out_batches(rank, rows) for rank in range(ranks)]
    batches = [batch for share in shares for batch in share]
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert sorted(sample for batch in batches for sample in batch) == [(row, row) for row in range(num_rows)]
    assert all(len({buckets[row] for _, row in batch}) == 1 for batch in batches)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1, "one rank does another's work"


def test_planning_a_long_run_needs_no_memory():
    tracemalloc.start()
    try:
        batches = make_plan(batch_size=1).train_batches(0, 0, 300_000)  # 100 epochs of 3000 images
        assert [list(next(batches)) for _ in range(2)] == [[0], [1]]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def make_loader(rows, args, tokenizer, first_step, last_step, start_method=None):
    """The DataLoader of `main`, on one rank, with batches of four."""
    rows = script.choose_sizes(rows, args, rows_hash="")
    batches = script.SampleOrder(rows, make_plan()).train_batches(0, first_step, last_step)
    dataloader = script.make_dataloader(rows, preprocess_for(args, tokenizer), batches, args, CPU)
    if start_method is not None:
        dataloader.multiprocessing_context = start_method
    return dataloader


def read_batches(dataloader):
    return list(script.iterate_batches(dataloader, CPU, skipped_rows=set(), signals=[]))


def assert_same_batches(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert batch["rows"] == other["rows"]
        for name in ("effnet_pixel_values", "text_input_ids", "text_mask"):
            assert torch.equal(batch[name], other[name]), name


def test_starting_at_a_late_step_decodes_no_earlier_image(tokenizer, monkeypatch):
    args = parse_args(train_data_dir=PICTURES, resolution=32)
    rows = script.load_train_dataset(args)
    load_image, opened = script.load_image, []
    monkeypatch.setattr(
        script,
        "load_image",
        lambda value, folders: opened.append(value["path"]) or load_image(value, folders),
    )
    batch = next(iter(make_loader(rows, args, tokenizer, 1000, 1010)))
    order = script.epoch_permutation(0, 62, 64)[32:36].tolist()  # sample 4 * 1000 = 62 * 64 + 32
    assert batch["rows"] == order
    assert [Path(path).name for path in opened] == [ROWS[row]["file_name"] for row in order]


@pytest.mark.parametrize(
    ("start_method", "workers"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)]
)
def test_workers_return_the_same_batches_as_one_process(start_method, workers, tokenizer):
    flags = {"train_data_dir": PICTURES, "resolution": 32, "caption_column": "captions"}
    flags |= {"caption_dropout": 0.3}
    args, args_workers = parse_args(**flags), parse_args(**flags, dataloader_num_workers=workers)
    rows = script.load_train_dataset(args)
    expected = read_batches(make_loader(rows, args, tokenizer, 14, 20))  # over the end of an epoch
    assert len(expected) == 6
    batches = read_batches(make_loader(rows, args_workers, tokenizer, 14, 20, start_method))
    assert_same_batches(batches, expected)


# ---------------------------------------------------------------------------------------------- augmentation


def replace_by_noise(image):
    """An augmentation with all three default generators: torch's makes the red pixels, Python's the green
    ones, numpy's the blue ones."""
    size = (image.height, image.width)
    red = torch.randint(256, size, dtype=torch.uint8).numpy()
    green = np.frombuffer(random.randbytes(image.height * image.width), np.uint8).reshape(size)
    blue = np.random.randint(256, size=size, dtype=np.uint8)
    return Image.fromarray(np.stack([red, green, blue], -1))


@pytest.fixture
def noise_augmentation(monkeypatch):
    """A user's edit of `make_augmentations`."""
    monkeypatch.setattr(script, "make_augmentations", lambda args, size: [replace_by_noise])


def generator_states():
    """The states of torch's, Python's and numpy's default generators, comparable by ==."""
    name, keys, *more = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (name, keys.tolist(), *more)


def test_augmentations_are_a_function_of_seed_and_position_with_any_number_of_workers(
    noise_augmentation, tokenizer
):
    flags = {"train_data_dir": PICTURES, "resolution": 32}
    args, args_workers = parse_args(**flags), parse_args(**flags, dataloader_num_workers=2)
    rows = script.load_train_dataset(args)
    states = generator_states()
    one_process = read_batches(make_loader(rows, args, tokenizer, 0, 32))  # two epochs
    workers = read_batches(make_loader(rows, args_workers, tokenizer, 0, 32))
    assert generator_states() == states
    assert len(one_process) == 32
    assert_same_batches(workers, one_process)
    resumed = read_batches(make_loader(rows, args, tokenizer, 20, 32))
    assert_same_batches(resumed, one_process[20:])
    pixels = torch.cat([batch["effnet_pixel_values"] for batch in one_process])
    for channel in range(3):
        assert len({sample[channel].numpy().tobytes() for sample in pixels}) == 128, "new numbers each time"
    other_args = parse_args(**flags, seed=1)
    other_seed = read_batches(make_loader(rows, other_args, tokenizer, 0, 1))[0]["effnet_pixel_values"]
    for channel in range(3):
        assert not torch.equal(other_seed[:, channel], pixels[:4, channel])


def test_held_out_rows_are_neither_augmented_nor_lose_their_captions(noise_augmentation, tokenizer):
    args = parse_args(train_data_dir=PICTURES, resolution=32, caption_dropout=0.99)
    rows = script.load_train_dataset(args)
    plain = script.make_image_transforms((32, 32))
    held_out = Samples(rows, preprocess_for(args, tokenizer, train=False), 0, False, resolution=32)
    train = Samples(rows, preprocess_for(args, tokenizer, train=True), 0, False, resolution=32)
    for position in range(len(rows)):
        sample = held_out[position]
        row = rows[sample["row"]]
        expected = plain(script.load_image(row["image"], [PICTURES]))
        assert torch.equal(sample["effnet_pixel_values"], expected)
        assert not torch.equal(train[position]["effnet_pixel_values"], expected)
        tokens = script.tokenize_captions([row["text"]], tokenizer)
        assert torch.equal(sample["text_input_ids"], tokens["text_input_ids"][0])


@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_reading_a_sample_leaves_the_default_generators_as_they_are(
    skip_bad_rows, noise_augmentation, tokenizer
):
    good = {"image": encode_pixel(), "text": "a cat"}
    rows = [good if row % 2 else good | {"text": None} for row in range(8)]
    preprocess = preprocess_for(parse_args(resolution=32), tokenizer)
    dataset = Samples(rows, preprocess, 0, skip_bad_rows)
    states = generator_states()
    samples = [dataset[position] for position in range(8)]
    assert generator_states() == states
    num_errors = sum("error" in sample for sample in samples)
    num_replaced = sum(bool(sample.get("bad_rows")) for sample in samples)
    assert (num_errors, num_replaced) == ((0, 4) if skip_bad_rows else (4, 0))
    preprocess(good, (32, 32))
    after = generator_states()
    changed = [state != before for state, before in zip(after, states, strict=True)]
    assert changed == [True] * 3, "the augmentation does not use the generators, so this test shows nothing"


def read_pixels(tokenizer, epoch=0, **flags):
    """The pixels of an epoch's samples, by row."""
    argv = [f"--{name}" for name, value in flags.items() if value]
    args = parse_args(*argv, train_data_dir=PICTURES, resolution=64)
    rows = script.load_train_dataset(args)
    dataset = Samples(rows, preprocess_for(args, tokenizer), args.seed, False)
    samples = [dataset[position] for position in range(64 * epoch, 64 * epoch + 64)]
    return {sample["row"]: sample["effnet_pixel_values"] for sample in samples}


def test_random_flip_mirrors_half_of_the_images_and_changes_nothing_else(tokenizer):
    plain = read_pixels(tokenizer)
    epochs = [read_pixels(tokenizer, epoch, random_flip=True) for epoch in range(4)]
    num_mirrored = 0
    for epoch in epochs:
        assert epoch.keys() == plain.keys()
        for row, pixels in epoch.items():
            same, mirrored = torch.equal(pixels, plain[row]), torch.equal(pixels, plain[row].flip(-1))
            assert same or mirrored
            num_mirrored += not same
    assert 256 / 2 - 4 * 8 < num_mirrored < 256 / 2 + 4 * 8, "four deviations of a fair coin"
    again = read_pixels(tokenizer, random_flip=True)
    assert all(torch.equal(again[row], epochs[0][row]) for row in again), "a function of seed and position"


@pytest.mark.parametrize("axis", [1, 2])
def test_random_crops_are_uniform_over_the_whole_resized_image(axis, tokenizer):
    """In an image whose colors tell the position, along its height (1) or its width (2)."""
    count, side, length = 1500, 64, 192
    ramp = np.arange(length, dtype=np.uint8)[:, None].repeat(side, 1)
    ramp = ramp if axis == 1 else ramp.T
    rows = [{"image": encode_image(Image.fromarray(np.stack([ramp] * 3, -1))), "text": ""}]
    args = parse_args("--random_crop", resolution=side)
    starts = []
    for sample in read_samples(rows, 0, count, preprocess_for(args, tokenizer)):
        pixels = sample["effnet_pixel_values"]
        assert pixels.shape == (3, side, side)
        start = int(pixels[0, 0, 0])
        expected = torch.from_numpy(ramp).narrow(axis - 1, start, side)
        assert (pixels == expected).all()
        starts.append(start)
    assert (min(starts), max(starts)) == (0, length - side)
    num_starts = length - side + 1
    deviation = num_starts / 12**0.5
    assert np.mean(starts) == pytest.approx((length - side) / 2, abs=4 * deviation / count**0.5)
    thirds = np.histogram(starts, bins=[0, 43, 86, 129])[0]
    assert np.abs(thirds - count / 3).max() < 4 * (count * (1 / 3) * (2 / 3)) ** 0.5
    plain = preprocess_for(parse_args(resolution=side), tokenizer)(rows[0], (side, side))[
        "effnet_pixel_values"
    ]
    center = torch.from_numpy(ramp).narrow(axis - 1, (length - side) // 2, side)
    assert (plain == center).all()


def test_without_augmentation_every_epoch_has_the_same_pixels(tokenizer):
    plain, later = read_pixels(tokenizer), read_pixels(tokenizer, epoch=2)
    assert later.keys() == plain.keys()
    assert all(torch.equal(later[row], plain[row]) for row in plain)


# -------------------------------------------------------------------------------------------------- captions


def encode_pixel():
    return encode_image(Image.new("RGB", (1, 1)))


def sample_caption_ids(seed, count, tokenizer, captions, *argv):
    """The token ids, as tuples, of the first samples of a data set of one row."""
    preprocess = preprocess_for(parse_args("--resolution=32", *argv), tokenizer)
    samples = read_samples([{"image": encode_pixel(), "text": captions}], seed, count, preprocess)
    return [tuple(sample["text_input_ids"].tolist()) for sample in samples]


def pad_ids(text, tokenizer):
    return tuple(tokenizer(text, padding="max_length", max_length=77).input_ids)


def test_a_rows_captions_are_sampled_uniformly_by_seed_and_position(tokenizer):
    captions = ["a cat", "a dog", "a bird"]
    known = {pad_ids(text, tokenizer) for text in captions}
    first, again, other = (sample_caption_ids(seed, 300, tokenizer, captions) for seed in (1, 1, 2))
    assert set(first) == known
    assert first == again
    assert first != other
    deviation = math.sqrt(300 * (1 / 3) * (2 / 3))
    assert all(abs(first.count(ids) - 100) < 4 * deviation for ids in known)


def test_all_captions_of_a_caption_list_are_used(tokenizer):
    args = parse_args(train_data_dir=PICTURES, caption_column="captions", resolution=32)
    rows = script.load_train_dataset(args).select(range(4))
    seen = {row: set() for row in range(4)}
    for sample in read_samples(rows, 0, 4 * 24, preprocess_for(args, tokenizer)):
        seen[sample["row"]].add(tuple(sample["text_input_ids"].tolist()))
    for row in range(4):
        texts = ROWS[row]["captions"]
        assert len(texts) == 2
        assert seen[row] == {pad_ids(text, tokenizer) for text in texts}


def test_caption_dropout_drops_its_fraction_and_by_default_none(tokenizer):
    count, fraction, empty = 1000, 0.1, (START, *[END] * 76)
    assert sample_caption_ids(0, 200, tokenizer, "a cat").count(empty) == 0
    sampled = sample_caption_ids(0, count, tokenizer, "a cat", f"--caption_dropout={fraction}")
    deviation = math.sqrt(count * fraction * (1 - fraction))
    assert abs(sampled.count(empty) - fraction * count) < 4 * deviation
    assert set(sampled) == {empty, sample_caption_ids(0, 1, tokenizer, "a cat")[0]}


def test_both_tokenizer_formats_give_clips_ids(models):
    new, old = models / "prior" / "tokenizer", models / "decoder" / "tokenizer"
    assert (new / "tokenizer.json").exists()
    assert not (old / "tokenizer.json").exists()
    texts = ["a photo of a cat", "", "Café – 猫 🐈!", *(row["text"] for row in ROWS)]
    tokens, tokens_old = (
        script.tokenize_captions(texts, CLIPTokenizerFast.from_pretrained(folder)) for folder in (new, old)
    )
    assert tokens.keys() == tokens_old.keys() == {"text_input_ids", "text_mask"}
    ids, mask = tokens["text_input_ids"], tokens["text_mask"]
    assert torch.equal(ids, tokens_old["text_input_ids"])
    assert torch.equal(mask, tokens_old["text_mask"])
    assert ids.shape == mask.shape == (len(texts), 77)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids[0, :7].tolist() == [START, 320, 1125, 539, 320, 2368, END]  # as in OpenAI's CLIP
    assert mask.sum(1)[:2].tolist() == [7, 2]


def test_cut_captions_are_counted_in_all_parts_of_a_large_data_set(tokenizer, log):
    long = {0: "apple " * 90, 999: "pear " * 76, 1000: "plum " * 77, 2002: "fig " * 80}
    rows = {
        "image": [{"bytes": b"not read", "path": None}] * 2003,
        "text": [long.get(row, "a moon") for row in range(2003)],
    }
    features = datasets.Features(image=datasets.Image(decode=False), text=datasets.Value("string"))
    dataset = datasets.Dataset.from_dict(rows, features=features)
    script.check_rows(dataset, parse_args(), tokenizer)
    (message,) = (record.getMessage() for record in log.records)
    assert "4 of 2003 captions are longer" in message and "apple apple" in message


def test_long_captions_are_truncated_and_keep_the_end_token(tokenizer):
    words = " ".join(["cat"] * 75)
    tokens = script.tokenize_captions([words, words + " dog" * 100], tokenizer)
    exact, long = tokens["text_input_ids"]
    assert tokens["text_mask"].all()
    assert long.tolist() == exact.tolist() == [START, *[2368] * 75, END]


# ------------------------------------------------------------------------------------------- unreadable rows


def read_error(row, tokenizer, **flags):
    """The error of an unreadable row, which is row 2 of four."""
    good = {"image": encode_pixel(), "text": "a cat"}
    preprocess = preprocess_for(parse_args(resolution=32, **flags), tokenizer)
    samples = read_samples([good, good, row, good], 0, 4, preprocess)
    (error,) = (sample["error"] for sample in samples if "error" in sample)
    return error


@pytest.mark.parametrize(
    ("name", "cause"),
    [("cut.jpg", "truncated"), ("empty.jpg", "cannot identify"), ("text.png", "cannot identify")],
)
def test_error_of_an_unreadable_image_has_row_file_cause_and_remedy(name, cause, tmp_path, tokenizer):
    file = (PICTURES / ROWS[0]["file_name"]).read_bytes()
    broken = {"cut.jpg": file[: len(file) // 2], "empty.jpg": b"", "text.png": b"not an image"}
    (tmp_path / name).write_bytes(broken[name])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "broken"}) + "\n")
    (row,) = script.load_train_dataset(parse_args(train_data_dir=tmp_path))
    error = read_error(row, tokenizer, train_data_dir=tmp_path)
    for text in ("row 2 ", str(tmp_path / name), cause, "--skip_bad_rows"):
        assert text in error


def test_error_of_a_missing_image_has_row_and_remedy(tokenizer):
    error = read_error({"image": None, "text": "a cat"}, tokenizer)
    assert "row 2 " in error
    assert "--skip_bad_rows" in error


@pytest.mark.parametrize("caption", [None, 5, [], ["a cat", None]])
def test_error_of_an_invalid_caption_has_row_file_cause_and_remedy(caption, tokenizer):
    error = read_error({"image": encode_pixel() | {"path": "photos/17.png"}, "text": caption}, tokenizer)
    for text in ("row 2 ", "photos/17.png", f"caption is {caption!r}", "--skip_bad_rows"):
        assert text in error


def test_error_of_a_row_selected_by_max_train_samples_says_of_which_rows_it_is_the_number(
    tmp_path, tokenizer
):
    rows = make_dataset(OPAQUE[:12]).to_list()
    for number, row in enumerate(rows):
        row["text"] = None
        row["image"]["path"] = f"file-{number}.jpg"
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    args = parse_args(train_data_dir=tmp_path, max_train_samples=6)
    subset = script.load_train_dataset(args)
    order = script.epoch_permutation(0, 0, 6).tolist()
    files = [row["image"]["path"] for row in subset]
    assert files != [f"file-{number}.jpg" for number in range(6)]
    for position, sample in enumerate(read_samples(subset, 0, 6, preprocess_for(args, tokenizer))):
        assert f"row {order[position]} of the 6 used" in sample["error"]
        assert files[order[position]] in sample["error"]


def fail_on_odd(row, size):
    if row % 2:
        raise ValueError(f"{row} is odd")
    return {"value": row}


def test_bad_rows_are_replaced_by_the_same_other_rows_every_time():
    first, again, other = (
        read_samples(range(64), seed, 256, fail_on_odd, skip_bad_rows=True) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert all(sample["value"] % 2 == 0 and sample["value"] == sample["row"] for sample in first)
    replaced = [sample for sample in first if sample["bad_rows"]]
    assert len(replaced) == 128, "each odd row once per epoch"
    assert len({sample["row"] for sample in replaced}) > 16, "any good row may replace it"
    for sample in replaced:
        assert all(row % 2 and f"row {row} " in text for row, text in sample["bad_rows"].items())


def test_batch_lists_the_bad_rows_that_were_replaced(tokenizer):
    args = parse_args("--skip_bad_rows", resolution=32)
    rows = [{"image": encode_pixel(), "text": "a cat" if row % 2 else None} for row in range(8)]
    batch = next(iter(make_loader(rows, args, tokenizer, 0, 1)))
    bad_rows = [row for row in script.epoch_permutation(0, 0, 8)[:4].tolist() if row % 2 == 0]
    assert bad_rows
    assert set(bad_rows) <= set(batch["bad_rows"])
    assert len(batch["rows"]) == 4
    assert all(row % 2 for row in batch["rows"])
    assert batch["effnet_pixel_values"].shape == (4, 3, 32, 32)


def test_each_skipped_row_is_logged_once_and_counted(log, tokenizer):
    args = parse_args("--skip_bad_rows", resolution=32)
    good = {"image": encode_pixel(), "text": "a cat"}
    rows = [good | {"text": None} if row in (3, 6) else good for row in range(8)]
    assert len(read_batches(make_loader(rows, args, tokenizer, 0, 6))) == 6  # three epochs
    messages = re.findall(r"Skipped row (\d) of the 8 used: .* \((\d) so far\)\n", log.text)
    assert log.text.count("Skipped") == 2
    assert {row for row, _ in messages} == {"3", "6"}
    assert [count for _, count in messages] == ["1", "2"]


def test_without_skipping_an_unreadable_row_is_an_error_of_its_batch(tokenizer):
    rows = [{"image": encode_pixel(), "text": None if row == 5 else "a cat"} for row in range(8)]
    batches = list(make_loader(rows, parse_args(resolution=32), tokenizer, 0, 2))
    index = script.epoch_permutation(0, 0, 8).tolist().index(5) // 4
    assert "row 5 " in batches[index]["error"]
    assert "error" not in batches[1 - index]
    with pytest.raises(SystemExit, match=r"row 5 .*--skip_bad_rows"):
        read_batches([batches[index]])


@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_data_set_of_unreadable_rows_only_is_an_error(rows):
    attempts = []

    def fail(row, size):
        attempts.append(row)
        if len(attempts) > 1000:
            pytest.fail("it tries forever")
        raise ValueError("broken")

    (sample,) = read_samples(range(rows), 0, 1, fail, skip_bad_rows=True)
    assert re.search(r"rows .*cannot be read.* broken", sample["error"])


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_images_in_a_linked_or_relative_folder_are_read(flag, tmp_path, monkeypatch, tokenizer):
    write_folder(tmp_path / "images")
    (tmp_path / "link").symlink_to("images")
    monkeypatch.chdir(tmp_path)
    for name in ("images", "./images/", "link", tmp_path / "link"):
        args = parse_args(resolution=32, **{flag: name})
        (sample,) = read_samples(script.load_train_dataset(args), 0, 1, preprocess_for(args, tokenizer))
        assert "error" not in sample, name


def test_image_outside_the_data_sets_folder_is_not_read(tmp_path, tokenizer):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    (tmp_path / "data").mkdir()
    for path in (str(secret), str(tmp_path / "data" / ".." / "secret.png")):
        row = {"image": {"bytes": None, "path": path}, "text": "a cat"}
        assert "outside" in read_error(row, tokenizer, train_data_dir=tmp_path / "data")
