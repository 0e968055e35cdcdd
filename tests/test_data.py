# SPDX-License-Identifier: Apache-2.0
"""From files to batches: odd pictures, layouts of data sets, the order of samples, captions, broken rows."""

import csv
import functools
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
from accelerate.state import PartialState
from conftest import PICTURES, TESTS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from transformers import CLIPTokenizerFast

import modeling_efficient_net_encoder as encoding
import train_text_to_image_prior as script

ROWS = [json.loads(line) for line in (PICTURES / "metadata.jsonl").read_text().splitlines()]
OPAQUE = [row for row in ROWS if Image.open(PICTURES / row["file_name"]).mode == "RGB"]
TRAIN, TEST = OPAQUE[:8], OPAQUE[8:12]
START, END = 49406, 49407  # CLIP's <|startoftext|> and <|endoftext|>
WHITE = (255, 255, 255)


def arguments(*argv, **flags):
    """The script's own settings for these flags."""
    needed = [] if "train_data_dir" in flags or "dataset_name" in flags else ["--train_data_dir=unused"]
    return script.parse_args(["--report_to=none", *needed, *argv, *(f"--{name}={v}" for name, v in flags.items())])


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizerFast.from_pretrained(TESTS / "data" / "clip-tokenizer")


@pytest.fixture
def log(caplog):
    """What the script logs; its logger wants to know which rank it is."""
    PartialState(cpu=True)
    yield caplog
    PartialState._reset_state()


# ------------------------------------------------------------------------------------------------- pictures


def encoded(image, kind="PNG", **options):
    """A row's picture as `datasets` hands it over undecoded."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def png(width, height, depth, colour_type, pixels, *, palette=None, transparent=None):
    """A PNG made by the book: Pillow cannot write all the kinds that it can read. `pixels` are the packed rows."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    stride = len(pixels) // height
    rows = b"".join(b"\0" + pixels[y * stride : (y + 1) * stride] for y in range(height))
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    file += chunk(b"PLTE", palette) if palette else b""
    file += chunk(b"tRNS", transparent) if transparent else b""
    return {"bytes": file + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""), "path": None}


def decoded(value):
    """(height, width, 3) of what the script makes of a picture."""
    image = encoding.decode_picture(value)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def on_white(colours, alpha):
    """(..., 3) colours under (...) alpha over white, in exact arithmetic."""
    share = np.asarray(alpha)[..., None] / 255
    return np.asarray(colours) * share + 255 * (1 - share)


def noise(*shape, seed=0, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, shape)


def test_transparent_colour_is_laid_on_white():
    pixels = noise(32, 48, 4)
    pixels[:8, :, 3], pixels[8:16, :, 3] = 0, 255
    shown = decoded(encoded(Image.fromarray(pixels.astype(np.uint8), "RGBA")))
    assert np.abs(shown - on_white(pixels[..., :3], pixels[..., 3])).max() <= 1
    assert (shown[:8] == 255).all(), "the colours hidden under full transparency show"
    assert (shown[8:16] == pixels[8:16, :, :3]).all()


def test_transparent_grey_is_laid_on_white():
    pixels = noise(16, 24, 2)
    shown = decoded(encoded(Image.fromarray(pixels.astype(np.uint8), "LA")))
    assert np.abs(shown - on_white(pixels[..., :1].repeat(3, -1), pixels[..., 1])).max() <= 1


def test_palette_with_a_transparency_for_each_colour_is_laid_on_white():
    palette, alpha = noise(16, 3, seed=1), noise(16, seed=2)
    alpha[0], alpha[1] = 0, 255
    index = noise(8, 8, high=16)
    value = png(
        8,
        8,
        8,
        3,
        index.astype(np.uint8).tobytes(),
        palette=bytes(palette.ravel().tolist()),
        transparent=bytes(alpha.tolist()),
    )
    assert np.abs(decoded(value) - on_white(palette[index], alpha[index])).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_other_formats_transparency_is_laid_on_white(kind):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = 200, 0, 0, 255
    options = {"lossless": True} if kind == "WEBP" else {}
    shown = decoded(encoded(Image.fromarray(pixels, "RGBA"), kind, **options))
    assert (shown[:, :4] == (200, 0, 0)).all()
    assert (shown[:, 4:] == 255).all()


def test_the_one_transparent_colour_of_an_rgb_or_grey_png_becomes_white():
    colour = png(2, 1, 8, 2, bytes([7, 8, 9, 200, 1, 2]), transparent=struct.pack(">3H", 7, 8, 9))
    assert decoded(colour).tolist() == [[[255, 255, 255], [200, 1, 2]]]
    grey = png(2, 1, 8, 0, bytes([7, 200]), transparent=struct.pack(">H", 7))
    assert decoded(grey).tolist() == [[[255, 255, 255], [200, 200, 200]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    values = np.arange(1 << 16).reshape(256, 256)
    value = encoded(Image.fromarray(values.astype(np.uint16)), kind)
    assert Image.open(io.BytesIO(value["bytes"])).mode == "I;16"
    assert (decoded(value) == ((values + 128) // 257)[..., None]).all()  # 65535 / 255 = 257


def test_sixteen_bit_grey_with_a_transparent_value_is_scaled_and_laid_on_white():
    value = png(4, 1, 16, 0, struct.pack(">4H", 0, 1000, 1001, 65535), transparent=struct.pack(">H", 1000))
    assert decoded(value)[0, :, 0].tolist() == [0, 255, 4, 255]


def test_sixteen_bit_colour_is_scaled():
    opaque = png(2, 1, 16, 2, struct.pack(">6H", 0, 1000, 32768, 65535, 40000, 20000))
    assert np.abs(decoded(opaque) - np.array([[0, 1000, 32768], [65535, 40000, 20000]]) / 257).max() <= 1
    hidden = png(2, 1, 16, 6, struct.pack(">8H", 30000, 20000, 10000, 65535, 30000, 0, 0, 0))
    assert np.abs(decoded(hidden) - np.array([[30000 / 257, 20000 / 257, 10000 / 257], WHITE])).max() <= 1


def test_grey_and_one_bit_pictures_become_rgb():
    grey = noise(8, 8)
    assert (decoded(encoded(Image.fromarray(grey.astype(np.uint8)))) == grey[..., None]).all()
    bits = noise(8, 8, high=2)
    assert (decoded(encoded(Image.fromarray(bits.astype(bool)))) == 255 * bits[..., None]).all()


def test_cmyk_jpeg_becomes_rgb():
    cyan, magenta, yellow, black = 0, 100, 200, 10
    shown = decoded(encoded(Image.new("CMYK", (16, 16), (cyan, magenta, yellow, black)), "JPEG", quality=100))
    expected = [(255 - ink) * (255 - black) / 255 for ink in (cyan, magenta, yellow)]
    assert np.abs(shown - expected).max() <= 2


def test_a_picture_of_one_pixel_fills_the_square():
    image = encoding.crop_square(encoding.decode_picture(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))), 64)
    assert image.size == (64, 64)
    assert (np.asarray(image) == (1, 2, 3)).all()


UPRIGHT = {  # orientation tag of EXIF -> what a viewer does to the stored (height, width, 3)
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
    stored = noise(40, 56, 3).astype(np.uint8)
    with open(tmp_path / "metadata.jsonl", "w") as metadata:
        for orientation in UPRIGHT:
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.fromarray(stored).save(tmp_path / f"{orientation}.png", exif=exif)
            metadata.write(json.dumps({"file_name": f"{orientation}.png", "text": str(orientation)}) + "\n")
    args = arguments(train_data_dir=tmp_path, resolution=32)
    rows = script.load_train_dataset(args, 0)
    for row in rows:
        upright = np.ascontiguousarray(UPRIGHT[int(row["text"])](stored))
        sample = script.preprocess_train(row, random.Random(0), tokenizer, args)
        assert torch.equal(sample["effnet_pixel_values"], by_torchvision(Image.fromarray(upright), 32)), row["text"]
    assert len(rows) == 8


def by_torchvision(image, resolution):
    """The tensor that the guide's own transforms make of an RGB picture."""
    return transforms.Compose(
        [
            transforms.Resize(resolution, interpolation=transforms.InterpolationMode.BILINEAR, antialias=True),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )(image)


@pytest.mark.parametrize("resolution", [32, 75, 96])
def test_ordinary_pictures_come_out_as_from_torchvision_bit_for_bit(resolution, tokenizer):
    args = arguments(resolution=resolution)
    for size in [(64, 64), (33, 47), (47, 33), (101, 64), (32, 255), (255, 32), (75, 76), (1, 3)]:
        image = Image.fromarray(noise(*size[::-1], 3).astype(np.uint8))
        row = {"image": encoded(image), "text": ""}
        pixels = script.preprocess_train(row, random.Random(0), tokenizer, args)["effnet_pixel_values"]
        assert pixels.shape == (3, resolution, resolution)
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels, by_torchvision(image, resolution)), size


def square_within(memory, image, resolution):
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    sys.exit(encoding.crop_square(image, resolution).size != (resolution, resolution))


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
@pytest.mark.parametrize("size", [(4000, 2), (2, 4000), (60000, 1)])
def test_very_long_pictures_are_squared_in_bounded_memory(size):
    # Whole at this resolution, the first two would be 2 GB and the last one 60 GB.
    work = (200 << 20, Image.new("RGB", size), 512)
    child = multiprocessing.get_context("fork").Process(target=square_within, args=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("size", [(4000, 2), (2, 4000)])
def test_very_long_pictures_keep_their_centre(size):
    image = Image.fromarray(noise(*size[::-1], 3).astype(np.uint8))
    whole = transforms.CenterCrop(32)(transforms.Resize(32, antialias=True)(image))
    assert np.abs(np.asarray(encoding.crop_square(image, 32)).astype(int) - np.asarray(whole)).max() <= 1


# ------------------------------------------------------------------------------------- where a data set may be


def write_folder(folder, rows=TRAIN, metadata="jsonl", rename=lambda name: name):
    """A folder of pictures with their captions."""
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


def in_memory(rows=TRAIN):
    """A datasets.Dataset with an Image column that holds its files."""
    pictures = [{"bytes": (PICTURES / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    return datasets.Dataset.from_dict({"image": pictures, "text": [row["text"] for row in rows]}, features=features)


def picture_files(rows=TRAIN):
    return [(PICTURES / row["file_name"]).read_bytes() for row in rows]


def write_parquet(folder, column):
    """Parquet as other tools write it: nothing in it says that the column holds pictures."""
    folder.mkdir()
    texts = pyarrow.array([row["text"] for row in TRAIN])
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "text": texts}), folder / "rows.parquet")


def write_hub_layout(folder):
    """What a data set on the Hub mostly is."""
    (folder / "data").mkdir(parents=True)
    in_memory().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    in_memory(TEST).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Pictures\n")


def write_train_and_test(folder):
    write_folder(folder / "train")
    write_folder(folder / "test", TEST)


LAYOUTS = {  # each leaves eight rows to train on, TRAIN
    "metadata.jsonl": write_folder,
    "metadata.csv": lambda folder: write_folder(folder, metadata="csv"),
    "train and test folders": write_train_and_test,
    "pictures called train and test": lambda folder: write_folder(folder, rename=RENAMED.get),
    "parquet of the Hub": write_hub_layout,
    "parquet with bytes and path": lambda folder: write_parquet(
        folder, pyarrow.array([{"bytes": file, "path": "a picture"} for file in picture_files()])
    ),
    "parquet with binary": lambda folder: write_parquet(folder, pyarrow.array(picture_files())),
    "parquet with large binary": lambda folder: write_parquet(
        folder, pyarrow.array(picture_files(), pyarrow.large_binary())
    ),
    "saved to disk": lambda folder: in_memory().save_to_disk(folder),
    "saved to disk with splits": lambda folder: datasets.DatasetDict(
        train=in_memory(), test=in_memory(TEST)
    ).save_to_disk(folder),
}
RENAMED = {row["file_name"]: f"{index}{row['file_name'][-5:]}" for index, row in enumerate(TRAIN)}
RENAMED |= dict(zip(RENAMED, ["0.jpg", "1-test.jpg", "2_train.jpg", "3.dev.jpg"], strict=False))


def contents(rows):
    """Caption and pixels of each row, in order."""
    return [(row["text"], hashlib.sha256(encoding.decode_picture(row["image"]).tobytes()).hexdigest()) for row in rows]


def expected(rows=TRAIN):
    """The same, read past `datasets` and past the script: these pictures are RGB and upright."""
    pictures = [Image.open(PICTURES / row["file_name"]) for row in rows]
    hashes = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]
    return list(zip([row["text"] for row in rows], hashes, strict=True))


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_set_in_a_local_folder_is_read_whole_and_only_its_train_split(layout, flag, tmp_path):
    LAYOUTS[layout](tmp_path / "pictures")
    assert contents(script.load_train_dataset(arguments(**{flag: tmp_path / "pictures"}), 0)) == expected()


@pytest.mark.parametrize("write", [write_folder, write_hub_layout, lambda folder: in_memory().save_to_disk(folder)])
def test_brackets_spaces_and_stars_in_a_folders_name_are_only_a_name(write, tmp_path):
    folder = tmp_path / "my [best] pictures * of 2024?"
    write(folder)
    assert contents(script.load_train_dataset(arguments(train_data_dir=folder), 0)) == expected()


@pytest.mark.parametrize("parent", ["test", "train", "validation"])
def test_folders_above_the_data_are_not_splits(parent, tmp_path):
    write_folder(tmp_path / parent / "data")
    assert contents(script.load_train_dataset(arguments(train_data_dir=tmp_path / parent / "data"), 0)) == expected()


def test_captions_edited_since_the_last_run_are_read_anew(tmp_path):
    folder = write_folder(tmp_path / "pictures")
    args = arguments(train_data_dir=folder)
    assert script.load_train_dataset(args, 0)[0]["text"] == TRAIN[0]["text"]
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace(TRAIN[0]["text"], "another caption"))
    assert script.load_train_dataset(args, 0)[0]["text"] == "another caption"


def test_other_columns_may_hold_pictures_and_captions(tmp_path):
    in_memory().rename_columns({"image": "photo", "text": "alt text"}).to_parquet(tmp_path / "rows.parquet")
    rows = script.load_train_dataset(
        arguments(train_data_dir=tmp_path, image_column="photo", caption_column="alt text"), 0
    )
    assert contents({"image": row["photo"], "text": row["alt text"]} for row in rows) == expected()


# ---------------------------------------------------------------------------------------- which rows, in which order


def chosen(count, seed):
    args = arguments(train_data_dir=PICTURES, max_train_samples=count)
    return script.load_train_dataset(args, seed)["text"][:]


def test_max_train_samples_draws_rows_with_the_seed(log):
    first, again, other = chosen(16, 1), chosen(16, 1), chosen(16, 2)
    assert len(set(first)) == 16
    assert first == again
    assert set(first) != set(other)
    assert set(first) != {row["text"] for row in ROWS[:16]}
    assert not log.records


def test_max_train_samples_past_the_size_takes_all_rows_and_says_so(log):
    assert sorted(chosen(1000, 1)) == sorted(row["text"] for row in ROWS)
    assert "--max_train_samples=1000: all 64 rows" in log.text


def take_row(row, draw):
    """The cheapest `preprocess`."""
    return {"value": row, "drawn": draw.random()}


def stream(rows, seed, count, preprocess=take_row, skip_bad_rows=False):
    samples = encoding.TrainSamples(rows, preprocess, seed, skip_bad_rows)
    return [samples[position] for position in range(count)]


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_every_row_comes_exactly_once_an_epoch(rows):
    values = [sample["value"] for sample in stream(range(rows), 3, 5 * rows)]
    assert [sorted(values[start : start + rows]) for start in range(0, 5 * rows, rows)] == [list(range(rows))] * 5


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = [tuple(encoding.epoch_order(seed, epoch, 64).tolist()) for seed in range(4) for epoch in range(8)]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(64)) for order in orders)
    # Were they one order turned or shifted, neighbours would stay neighbours: by chance one of 63 pairs does.
    pairs = [set(itertools.pairwise(order)) for order in orders]
    assert max(len(a & b) for i, a in enumerate(pairs) for b in pairs[:i]) < 10


def test_a_sample_is_a_function_of_seed_and_position():
    first, other = stream(range(16), 5, 48), stream(range(16), 6, 48)
    samples = encoding.TrainSamples(range(16), take_row, 5, False)
    shuffled = random.Random(0).sample(range(48), 48)
    assert {position: samples[position] for position in shuffled} == dict(enumerate(first))
    assert len({sample["drawn"] for sample in first + other}) == 96


COUNT = st.integers(1, 5)


@settings(max_examples=200, deadline=None)
@given(batch=COUNT, accumulation=COUNT, ranks=COUNT, steps=st.integers(0, 6), resumed=st.integers(0, 6))
def test_ranks_share_out_all_positions_and_resuming_gives_the_tail(batch, accumulation, ranks, steps, resumed):
    plan = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "processes": ranks}
    resumed = min(resumed, steps)
    update = batch * accumulation * ranks
    positions = []
    for rank in range(ranks):
        batches = [list(positions) for positions in encoding.micro_batches(0, steps, plan, rank)]
        tail = [list(positions) for positions in encoding.micro_batches(resumed, steps, plan, rank)]
        assert len(batches) == steps * accumulation
        assert all(len(positions) == batch for positions in batches)
        assert tail == batches[resumed * accumulation :]
        for index, of_batch in enumerate(batches):  # an update has the next positions, however they are shared out
            assert {position // update for position in of_batch} == {index // accumulation}
        positions += [position for of_batch in batches for position in of_batch]
    assert sorted(positions) == list(range(steps * update))


def test_planning_a_long_run_takes_no_memory():
    plan = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "processes": 1}
    tracemalloc.start()
    try:
        batches = iter(encoding.micro_batches(0, 300_000, plan, 0))  # the default 100 epochs of 3000 pictures
        assert [list(next(batches)) for _ in range(2)] == [[0], [1]]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def loader(rows, args, tokenizer, first_step, last_step, **options):
    """The DataLoader of `main`, on one rank, with batches of four."""
    plan = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "processes": 1}
    preprocess = functools.partial(script.preprocess_train, tokenizer=tokenizer, args=args)
    return torch.utils.data.DataLoader(
        encoding.TrainSamples(rows, preprocess, 0, args.skip_bad_rows),
        batch_sampler=encoding.micro_batches(first_step, last_step, plan, 0),
        collate_fn=script.collate_fn,
        **options,
    )


def test_starting_at_a_late_step_decodes_no_earlier_picture(tokenizer, monkeypatch):
    args = arguments(train_data_dir=PICTURES, resolution=32)
    rows = script.load_train_dataset(args, 0)
    decode, opened = encoding.decode_picture, []
    monkeypatch.setattr(
        encoding, "decode_picture", lambda value, *folders: opened.append(value["path"]) or decode(value)
    )
    batch = next(iter(loader(rows, args, tokenizer, 1000, 1010)))
    order = encoding.epoch_order(0, 62, 64)[32:36].tolist()  # update 1000 begins at sample 4000 = 62 * 64 + 32
    assert batch["rows"] == order
    assert [Path(path).name for path in opened] == [ROWS[row]["file_name"] for row in order]


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_deliver_the_batches_that_one_process_does(start, workers, tokenizer):
    args = arguments(train_data_dir=PICTURES, resolution=32, caption_column="captions", caption_dropout=0.3)
    rows = script.load_train_dataset(args, 0)
    alone = list(loader(rows, args, tokenizer, 14, 20))  # over the edge of an epoch
    options = {"num_workers": workers, "multiprocessing_context": start}
    spawned = list(loader(rows, args, tokenizer, 14, 20, **options))
    assert len(spawned) == len(alone) == 6
    for ours, theirs in zip(alone, spawned, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["rows"] == theirs["rows"]
        for name in ("effnet_pixel_values", "text_input_ids", "text_mask"):
            assert torch.equal(ours[name], theirs[name])


# ------------------------------------------------------------------------------------------------- captions


def pixel():
    return encoded(Image.new("RGB", (1, 1)))


def captions_of(seed, count, tokenizer, captions, *argv):
    """The token ids, as tuples, of the first samples of a data set of one row."""
    args = arguments("--resolution=32", *argv)
    preprocess = functools.partial(script.preprocess_train, tokenizer=tokenizer, args=args)
    samples = stream([{"image": pixel(), "text": captions}], seed, count, preprocess)
    return [tuple(sample["text_input_ids"].tolist()) for sample in samples]


def test_each_of_a_rows_captions_is_drawn_by_seed_and_position(tokenizer):
    captions = ["a cat", "a dog", "a bird"]
    known = {tuple(tokenizer(text, padding="max_length", max_length=77).input_ids) for text in captions}
    first, again, other = (captions_of(seed, 300, tokenizer, captions) for seed in (1, 1, 2))
    assert set(first) == known
    assert first == again
    assert first != other
    deviation = math.sqrt(300 * (1 / 3) * (2 / 3))
    assert all(abs(first.count(ids) - 100) < 4 * deviation for ids in known)


def test_caption_lists_of_a_data_set_are_all_used(tokenizer):
    args = arguments(train_data_dir=PICTURES, caption_column="captions", resolution=32)
    rows = script.load_train_dataset(args, 0).select(range(4))
    seen = {row: set() for row in range(4)}
    preprocess = functools.partial(script.preprocess_train, tokenizer=tokenizer, args=args)
    for sample in stream(rows, 0, 4 * 24, preprocess):
        seen[sample["row"]].add(tuple(sample["text_input_ids"].tolist()))
    for row in range(4):
        texts = ROWS[row]["captions"]
        assert len(texts) == 2
        assert seen[row] == {tuple(tokenizer(text, padding="max_length", max_length=77).input_ids) for text in texts}


def test_caption_dropout_empties_its_share_and_by_default_none(tokenizer):
    count, share, empty = 1000, 0.1, (START, *[END] * 76)
    assert captions_of(0, 200, tokenizer, "a cat").count(empty) == 0
    dropped = captions_of(0, count, tokenizer, "a cat", f"--caption_dropout={share}")
    assert abs(dropped.count(empty) - share * count) < 4 * math.sqrt(count * share * (1 - share))
    assert set(dropped) == {empty, captions_of(0, 1, tokenizer, "a cat")[0]}


def test_both_tokenizer_layouts_give_clips_own_ids(models):
    new, old = models / "prior" / "tokenizer", models / "decoder" / "tokenizer"
    assert (new / "tokenizer.json").exists()
    assert not (old / "tokenizer.json").exists()
    texts = ["a photo of a cat", "", "Café – 猫 🐈!", *(row["text"] for row in ROWS)]
    ours, theirs = (
        script.tokenize_captions(texts, CLIPTokenizerFast.from_pretrained(folder)) for folder in (new, old)
    )
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    ids, mask = ours
    assert ids.shape == mask.shape == (len(texts), 77)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids[0, :7].tolist() == [START, 320, 1125, 539, 320, 2368, END]  # as in OpenAI's CLIP
    assert mask.sum(1)[:2].tolist() == [7, 2]


def test_long_captions_are_cut_and_keep_the_end_token(tokenizer):
    words = " ".join(["cat"] * 75)
    (exact, long), mask = script.tokenize_captions([words, words + " dog" * 100], tokenizer)
    assert mask.all()
    assert long.tolist() == exact.tolist() == [START, *[2368] * 75, END]


# -------------------------------------------------------------------------------------------------- bad rows


def problem_of(row, tokenizer, **flags):
    """The text of a broken row, which stands at 2 among good ones."""
    good = {"image": pixel(), "text": "a cat"}
    args = arguments(resolution=32, **flags)
    preprocess = functools.partial(script.preprocess_train, tokenizer=tokenizer, args=args)
    problems = {
        sample["problem"] for sample in stream([good, good, row, good], 0, 4, preprocess) if "problem" in sample
    }
    assert len(problems) == 1
    return problems.pop()


@pytest.mark.parametrize(
    ("name", "cause"), [("cut.jpg", "truncated"), ("empty.jpg", "cannot identify"), ("text.png", "cannot identify")]
)
def test_a_broken_picture_is_named_with_row_file_cause_and_way_out(name, cause, tmp_path, tokenizer):
    whole = (PICTURES / ROWS[0]["file_name"]).read_bytes()
    broken = {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.png": b"not a picture"}
    (tmp_path / name).write_bytes(broken[name])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "broken"}) + "\n")
    (row,) = script.load_train_dataset(arguments(train_data_dir=tmp_path), 0)
    problem = problem_of(row, tokenizer, train_data_dir=tmp_path)
    for part in ("row 2 ", str(tmp_path / name), cause, "--skip_bad_rows"):
        assert part in problem


def test_a_missing_picture_is_named_with_row_cause_and_way_out(tokenizer):
    problem = problem_of({"image": None, "text": "a cat"}, tokenizer)
    assert "row 2 " in problem
    assert "--skip_bad_rows" in problem


@pytest.mark.parametrize("caption", [None, 5, [], ["a cat", None]])
def test_a_broken_caption_is_named_with_row_file_cause_and_way_out(caption, tokenizer):
    problem = problem_of({"image": pixel() | {"path": "photos/17.png"}, "text": caption}, tokenizer)
    for part in ("row 2 ", "photos/17.png", f"caption is {caption!r}", "--skip_bad_rows"):
        assert part in problem


def test_a_row_drawn_by_max_train_samples_is_not_given_another_rows_number(tmp_path, tokenizer):
    rows = in_memory(OPAQUE[:12]).to_list()
    for number, row in enumerate(rows):
        row["text"] = None
        row["image"]["path"] = f"file-{number}.jpg"
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    args = arguments(train_data_dir=tmp_path, max_train_samples=6)
    subset = script.load_train_dataset(args, 0)
    preprocess = functools.partial(script.preprocess_train, tokenizer=tokenizer, args=args)
    for position, sample in enumerate(stream(subset, 0, 6, preprocess)):
        file = subset[int(encoding.epoch_order(0, 0, 6)[position])]["image"]["path"]
        number, problem = re.search(r"\d+", file).group(), sample["problem"]
        assert file in problem
        assert f"row {number} of the train split" in problem or "of the train split" not in problem


def fail_on_odd(row, draw):
    if row % 2:
        raise ValueError(f"{row} is odd")
    return {"value": row}


def test_bad_rows_are_replaced_by_others_the_same_way_every_time():
    first, again, other = (stream(range(64), seed, 256, fail_on_odd, skip_bad_rows=True) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert all(sample["value"] % 2 == 0 and sample["value"] == sample["row"] for sample in first)
    replaced = [sample for sample in first if sample["bad_rows"]]
    assert len(replaced) == 128, "each odd row once an epoch"
    assert len({sample["row"] for sample in replaced}) > 16, "any good row may take the place"
    for sample in replaced:
        assert all(row % 2 and f"row {row} " in text for row, text in sample["bad_rows"].items())


def test_a_batch_tells_which_rows_were_left_out(tokenizer):
    args = arguments("--skip_bad_rows", resolution=32)
    rows = [{"image": pixel(), "text": "a cat" if row % 2 else None} for row in range(8)]
    batch = next(iter(loader(rows, args, tokenizer, 0, 1)))
    left_out = [row for row in encoding.epoch_order(0, 0, 8)[:4].tolist() if row % 2 == 0]
    assert left_out
    assert set(left_out) <= set(batch["bad_rows"])
    assert len(batch["rows"]) == 4
    assert all(row % 2 for row in batch["rows"])
    assert batch["effnet_pixel_values"].shape == (4, 3, 32, 32)


def test_without_skipping_one_broken_row_is_its_batchs_problem(tokenizer):
    rows = [{"image": pixel(), "text": None if row == 5 else "a cat"} for row in range(8)]
    batches = list(loader(rows, arguments(resolution=32), tokenizer, 0, 2))
    at = encoding.epoch_order(0, 0, 8).tolist().index(5) // 4
    assert "row 5 " in batches[at]["problem"]
    assert "problem" not in batches[1 - at]
    with pytest.raises(SystemExit, match=r"row 5 .*--skip_bad_rows"):
        encoding.next_batch(iter([batches[at]]), torch.device("cpu"), set())


@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_a_data_set_of_broken_rows_only_ends_in_a_problem(rows):
    tried = []

    def fail(row, draw):
        tried.append(row)
        if len(tried) > 1000:
            pytest.fail("it tries for ever")
        raise ValueError("broken")

    (sample,) = stream(range(rows), 0, 1, fail, skip_bad_rows=True)
    assert re.search(r"rows .*cannot be read.* broken", sample["problem"])


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_a_linked_or_relative_folders_pictures_are_inside_it(flag, tmp_path, monkeypatch, tokenizer):
    write_folder(tmp_path / "pictures")
    (tmp_path / "link").symlink_to("pictures")
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "./pictures/", "link", tmp_path / "link"):
        args = arguments(resolution=32, **{flag: name})
        preprocess = functools.partial(script.preprocess_train, tokenizer=tokenizer, args=args)
        assert "problem" not in stream(script.load_train_dataset(args, 0), 0, 1, preprocess)[0], name


def test_a_picture_outside_the_data_sets_folder_is_not_read(tmp_path, tokenizer):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    (tmp_path / "data").mkdir()
    for path in (str(secret), str(tmp_path / "data" / ".." / "secret.png")):
        row = {"image": {"bytes": None, "path": path}, "text": "a cat"}
        assert "outside" in problem_of(row, tokenizer, train_data_dir=tmp_path / "data")
