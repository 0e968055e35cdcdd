# SPDX-License-Identifier: Apache-2.0
"""From rows to batches: odd images, samples, augmentation, captions, unreadable rows."""

import functools
import io
import itertools
import json
import multiprocessing
import random
import re
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import IMAGES, TESTS
from PIL import Image
from tiny_models import ALL_MERGES, copy_tokenizer, make_tokenizer
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import CLIPTokenizerFast

import train_text_to_image_prior as script

ROWS = [json.loads(line) for line in (IMAGES / "metadata.jsonl").read_text().splitlines()]
START, END = 49406, 49407  # CLIP's <|startoftext|> and <|endoftext|>


def parse_args(*argv, **flags):
    """The script's settings for these flags, by default of the 64 images at 32 pixels with the seed 0."""
    flags = {"train_data_dir": IMAGES, "resolution": 32, "seed": 0, "report_to": "none"} | flags
    return script.parse_args([*argv, *(f"--{name}={value}" for name, value in flags.items())])


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizerFast.from_pretrained(TESTS / "data" / "clip-tokenizer")


def encode_image(image, kind="PNG", **options):
    """An image as `datasets` returns it undecoded."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


PIXEL = encode_image(Image.new("RGB", (1, 1)))


def random_integers(*shape, seed=0, high=256):
    return np.random.default_rng(seed).integers(0, high, shape)


def random_image(width, height):
    return Image.fromarray(random_integers(height, width, 3).astype(np.uint8))


# --------------------------------------------------------------------------------------------------- images


def png_chunk(name, content):
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def encode_png(width, depth, color_type, pixels, **chunks):
    """A PNG of one row, chunk by chunk, since Pillow reads more kinds than it writes. `pixels` is packed."""
    header = struct.pack(">IIBBBBB", width, 1, depth, color_type, 0, 0, 0)
    chunks = {"IHDR": header, **chunks, "IDAT": zlib.compress(b"\0" + bytes(pixels)), "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name.encode(), chunks[name]) for name in chunks)


def on_white(colors, alpha):
    """(..., 3) colors with (...) alpha on white, in exact arithmetic."""
    share = np.asarray(alpha)[..., None] / 255
    return np.asarray(colors) * share + 255 * (1 - share)


def gray(values):
    return np.asarray(values)[..., None].repeat(3, -1)


def odd_images():
    """Encoded images, the pixels to which they are decoded, and how far they may be off."""
    rgba, la, bits = (random_integers(16, 24, *shape) for shape in ((4,), (2,), ()))
    rgba[:4, :, 3], rgba[4:8, :, 3] = 0, 255  # colors of fully transparent pixels must not show
    exact = np.where(np.isin(rgba[..., 3:], (0, 255)), 0, 1)
    palette, alpha = random_integers(16, 3, seed=1), random_integers(16, seed=2)
    index, wide = random_integers(8, high=16), np.arange(1 << 16).reshape(256, 256)
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, :4] = 200, 0, 0, 255
    halves = on_white(half[..., :3], half[..., 3])
    colors = random_integers(8, 3)
    cmyk = (0, 100, 200, 10)
    rgb_of_ink = [(255 - ink) * (255 - cmyk[3]) / 255 for ink in cmyk[:3]]

    def saved(array, kind="PNG", mode=None, **options):
        array = np.asarray(array)
        array = array if array.dtype in (np.uint16, bool) else array.astype(np.uint8)
        return encode_image(Image.fromarray(array, mode), kind, **options)["bytes"]

    yield "RGBA", saved(rgba), on_white(rgba[..., :3], rgba[..., 3]), exact
    yield "LA", saved(la, mode="LA"), on_white(gray(la[..., 0]), la[..., 1]), 1
    yield "GIF", saved(half, "GIF"), halves, 0
    yield "WebP", saved(half, "WEBP", lossless=True), halves, 0
    chunks = {"PLTE": bytes(palette.ravel().tolist()), "tRNS": bytes(alpha.tolist())}
    palette_image = encode_png(8, 8, 3, index.tolist(), **chunks)
    yield "alpha of a palette", palette_image, [on_white(palette[index], alpha[index])], 1
    rgb = encode_png(2, 8, 2, [7, 8, 9, 200, 1, 2], tRNS=struct.pack(">3H", 7, 8, 9))
    yield "transparent color", rgb, [[[255, 255, 255], [200, 1, 2]]], 0
    transparent = encode_png(2, 8, 0, [7, 200], tRNS=struct.pack(">H", 7))
    yield "transparent gray", transparent, [gray([255, 200])], 0
    for kind in ("PNG", "TIFF"):  # scaled, not clipped: 65535 / 255 = 257
        yield f"16-bit gray {kind}", saved(wide.astype(np.uint16), kind), gray((wide + 128) // 257), 0
    values = np.array([[0, 1000, 32768], [65535, 40000, 20000]])
    yield "16-bit RGB", encode_png(2, 16, 2, struct.pack(">6H", *values.ravel())), [values / 257], 1
    values = struct.pack(">8H", 30000, 20000, 10000, 65535, 30000, 0, 0, 0)
    expected = [[np.array([30000, 20000, 10000]) / 257, [255, 255, 255]]]
    yield "16-bit RGBA", encode_png(2, 16, 6, values), expected, 1
    yield "gray", saved(bits), gray(bits), 0
    yield "one bit", saved(bits > 127), gray(255 * (bits > 127)), 0
    image = Image.new("CMYK", (16, 16), cmyk)
    yield "CMYK", encode_image(image, "JPEG", quality=100)["bytes"], np.full((16, 16, 3), rgb_of_ink), 2
    broken = encode_png(8, 8, 2, colors.ravel().tolist(), eXIf=b"\0\x08 no TIFF header")
    yield "broken EXIF", broken, [colors], 0
    long_text = encode_png(8, 8, 2, colors.ravel().tolist(), zTXt=b"a\0\0" + zlib.compress(bytes(2 << 20)))
    yield "long text", long_text, [colors], 0


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"), [pytest.param(*case, id=name) for name, *case in odd_images()]
)
def test_odd_images_become_8_bit_rgb_on_white(content, expected, tolerance):
    image = script.load_image({"bytes": content, "path": None})
    assert image.mode == "RGB"
    loaded = np.asarray(image).astype(int)
    assert loaded.shape == np.shape(expected)
    assert (np.abs(loaded - expected) <= tolerance).all()


PHOTO = (IMAGES / ROWS[0]["file_name"]).read_bytes()
REFUSED = {
    "cut": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "no image": (b"no image" * 99, "cannot identify"),
    "PostScript": (encode_image(Image.new("RGB", (8, 8)), "EPS")["bytes"], "cannot identify"),
    "196 million pixels": (encode_image(Image.new("1", (14_000, 14_000)))["bytes"], "196000000 pixels"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run `git lfs pull`"),
}
for dtype in (np.int32, np.float32):
    image = Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8))
    REFUSED[f"{dtype.__name__} TIFF"] = (encode_image(image, "TIFF")["bytes"], "range .* is unknown")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_an_image_that_cannot_be_read_is_named_with_the_cause(case, tmp_path, monkeypatch):
    content, cause = REFUSED[case]
    file = tmp_path / "a\x1b[2J\n.png"
    file.write_bytes(content)
    if "pixels" in cause:
        monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it is decoded"))
    for value in ({"bytes": None, "path": str(file)}, {"bytes": content, "path": str(file)}):
        with pytest.raises(ValueError, match=cause) as caught:
            script.load_image(value)
        assert str(caught.value).startswith(f"the image ({tmp_path}/a\\x1b[2J\\n.png) cannot be read: ")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1100


def by_torchvision(image, resolution):
    """The tensor that the diffusers training guide's transforms make of an RGB image."""
    resize = transforms.Resize(resolution, transforms.InterpolationMode.BILINEAR, antialias=True)
    normalize = transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    steps = [resize, transforms.CenterCrop(resolution), transforms.ToTensor(), normalize]
    return transforms.Compose(steps)(image)


def normalized(value, resolution, tokenizer):
    """The pixels that the image encoder gets of a held-out row."""
    args = parse_args(resolution=resolution)
    row = {"image": value, "text": ""}
    pixels = script.preprocess_train(row, (resolution, resolution), False, args, tokenizer)
    assert pixels["effnet_pixel_values"].shape == (3, resolution, resolution)
    assert pixels["effnet_pixel_values"].dtype == torch.uint8
    return script.normalize_pixels(pixels["effnet_pixel_values"][None])[0]


@pytest.mark.parametrize("resolution", [32, 75, 96])
def test_pixels_are_those_of_torchvision_bit_for_bit(resolution, tokenizer):
    sizes = [(64, 64), (33, 47), (47, 33), (101, 64), (32, 255), (255, 32), (75, 76), (1, 3), (1, 1)]
    for image in (random_image(*size) for size in sizes):
        pixels = normalized(encode_image(image), resolution, tokenizer)
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels, by_torchvision(image, resolution)), image.size


UPRIGHT = {  # EXIF's orientation: whether a viewer swaps the axes after flipping (-1) rows and columns
    **{1: (0, 1, 1), 2: (0, 1, -1), 3: (0, -1, -1), 4: (0, -1, 1)},
    **{5: (1, 1, 1), 6: (1, -1, 1), 7: (1, -1, -1), 8: (1, 1, -1)},
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_exactly_once(orientation, tmp_path, tokenizer):
    stored, exif = random_integers(40, 56, 3).astype(np.uint8), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    (row,) = script.load_train_dataset(parse_args(train_data_dir=tmp_path))
    swap, rows, columns = UPRIGHT[orientation]
    upright = stored[::rows, ::columns]
    upright = Image.fromarray(np.ascontiguousarray(upright.swapaxes(0, 1) if swap else upright))
    assert torch.equal(normalized(row["image"], 32, tokenizer), by_torchvision(upright, 32))


def square_within(memory, value, resolution):
    """In a process of its own: squares an image with this much more memory than the process has already."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    pixels = script.make_image_transforms((resolution, resolution))(script.load_image(value))
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
    pixels = script.make_image_transforms((32, 32))(script.load_image(encode_image(image)))
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


# -------------------------------------------------------------------------------------------------- samples


def read_samples(dataset, args, count, preprocess, first=0):
    """The samples at these positions."""
    rows, sizes = np.arange(len(dataset)), np.full((len(dataset), 2), args.resolution)
    samples = script.SampleDataset(dataset, sizes, rows, preprocess, args)
    positions = itertools.islice(enumerate(script.order_rows(rows, sizes, args)), first, first + count)
    return [samples[position] for position in positions]


def read_batches(dataset, args, tokenizer, first_step, last_step, preprocess=script.preprocess_train):
    """The batches of a run on one rank."""
    rows, sizes = np.arange(len(dataset)), np.full((len(dataset), 2), args.resolution)
    place = SimpleNamespace(num_processes=1, process_index=0)
    batches = script.order_batches(rows, sizes, args, place, first_step)
    batches = itertools.islice(batches, last_step - first_step)
    preprocess = functools.partial(preprocess, args=args, tokenizer=tokenizer)
    load = functools.partial(script.load_batches, args, torch.device("cpu"), [], dataset, sizes, preprocess)
    return list(load(rows, batches, train=True))


VARIED = {"caption_column": "captions", "caption_dropout": 0.3, "train_batch_size": 4}


def assert_same_batches(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert batch["row"] == other["row"] and batch["position"] == other["position"]
        for name in ("effnet_pixel_values", "text_input_ids", "text_mask"):
            assert torch.equal(batch[name], other[name]), name


@pytest.mark.slow
def test_spawned_workers_return_the_same_batches_as_one_process(tokenizer, monkeypatch):
    args, args_workers = parse_args(**VARIED), parse_args(**VARIED, dataloader_num_workers=2)
    rows = script.load_train_dataset(args)
    batches = read_batches(rows, args, tokenizer, 14, 20)  # over the end of an epoch
    monkeypatch.setattr(script, "DataLoader", functools.partial(DataLoader, multiprocessing_context="spawn"))
    assert_same_batches(read_batches(rows, args_workers, tokenizer, 14, 20), batches)


def test_max_train_samples_selects_rows_with_the_seed():
    captions = [[row["text"]] for row in ROWS]

    def selected(count, seed):
        return script.load_train_dataset(parse_args(max_train_samples=count, seed=seed))["text"][:]

    first, other = selected(16, 1), selected(16, 2)
    assert first == selected(16, 1) and sorted(first) != sorted(other)
    for subset in (first, other):
        assert len(subset) == 16 and sorted(subset) != sorted(captions[:16])
        assert all(captions.count(text) == subset.count(text) == 1 for text in subset)
    assert sorted(selected(1000, 1)) == sorted(captions)


# --------------------------------------------------------------------------------------------- augmentation


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


def test_augmentations_follow_from_seed_and_position_with_any_number_of_workers(
    noise_augmentation, tokenizer
):
    flags = ({}, {"dataloader_num_workers": 2}, {"seed": 1})
    args, args_workers, other_args = (parse_args(**VARIED | more) for more in flags)
    rows = script.load_train_dataset(args)
    batches = read_batches(rows, args, tokenizer, 0, 32)  # two epochs
    assert len(batches) == 32
    assert_same_batches(read_batches(rows, args_workers, tokenizer, 0, 32), batches)
    assert_same_batches(read_batches(rows, args, tokenizer, 20, 32), batches[20:])
    pixels = torch.cat([batch["effnet_pixel_values"] for batch in batches])
    (other,) = read_batches(rows, other_args, tokenizer, 0, 1)
    for channel in range(3):
        assert len({sample[channel].numpy().tobytes() for sample in pixels}) == 128, "new numbers each time"
        assert not torch.equal(other["effnet_pixel_values"][:, channel], pixels[:4, channel])


def test_held_out_rows_are_neither_augmented_nor_lose_their_captions(noise_augmentation, tokenizer):
    args = parse_args(caption_dropout=0.99)
    for row in script.load_train_dataset(args).select(range(16)):
        held_out = script.preprocess_train(row, (32, 32), False, args, tokenizer)
        expected = script.make_image_transforms((32, 32))(script.load_image(row["image"]))
        assert torch.equal(held_out["effnet_pixel_values"], expected)
        assert held_out["text_input_ids"].tolist() == list(pad_ids(row["text"][0], tokenizer))


def read_pixels(tokenizer, *argv, epoch=0):
    """The pixels of an epoch's samples, by row."""
    args = parse_args(*argv, resolution=64)
    preprocess = functools.partial(script.preprocess_train, train=True, args=args, tokenizer=tokenizer)
    samples = read_samples(script.load_train_dataset(args), args, 64, preprocess, 64 * epoch)
    return {sample["row"]: sample["effnet_pixel_values"] for sample in samples}


def test_random_flip_mirrors_half_of_the_images_and_changes_nothing_else(tokenizer):
    plain = read_pixels(tokenizer)
    later = read_pixels(tokenizer, epoch=2)
    assert all(torch.equal(later[row], plain[row]) for row in plain), "without it nothing changes"
    num_mirrored = 0
    for epoch in range(4):
        flipped = read_pixels(tokenizer, "--random_flip", epoch=epoch)
        assert flipped.keys() == plain.keys()
        for row, pixels in flipped.items():
            same, mirrored = torch.equal(pixels, plain[row]), torch.equal(pixels, plain[row].flip(-1))
            assert same or mirrored
            num_mirrored += not same
    assert 256 / 2 - 4 * 8 < num_mirrored < 256 / 2 + 4 * 8, "four deviations of a fair coin"


@pytest.mark.parametrize("axis", [1, 2])
def test_random_crops_are_uniform_over_the_whole_resized_image(axis, tokenizer):
    """In an image whose colors tell the position, along its height (1) or its width (2)."""
    count, side, length = 1000, 32, 96
    ramp = np.arange(length, dtype=np.uint8)[:, None].repeat(side, 1)
    ramp = ramp if axis == 1 else ramp.T
    row = {"image": encode_image(Image.fromarray(np.stack([ramp] * 3, -1))), "text": ""}
    args, starts = parse_args("--random_crop", resolution=side), []
    preprocess = functools.partial(script.preprocess_train, args=args, tokenizer=tokenizer)
    for sample in read_samples([row], args, count, functools.partial(preprocess, train=True)):
        starts.append(int(sample["effnet_pixel_values"][0, 0, 0]))
        expected = torch.from_numpy(ramp).narrow(axis - 1, starts[-1], side)
        assert torch.equal(sample["effnet_pixel_values"], expected.expand(3, -1, -1))
    assert (min(starts), max(starts)) == (0, length - side)
    num_starts = length - side + 1
    deviation = num_starts / 12**0.5
    assert np.mean(starts) == pytest.approx((length - side) / 2, abs=4 * deviation / count**0.5)
    fifths = np.histogram(starts, bins=[0, 13, 26, 39, 52, 65])[0]
    assert np.abs(fifths - count / 5).max() < 4 * (count * (1 / 5) * (4 / 5)) ** 0.5
    center = preprocess(row, (side, side), train=False)["effnet_pixel_values"]
    assert (center == torch.from_numpy(ramp).narrow(axis - 1, (length - side) // 2, side)).all()


# ------------------------------------------------------------------------------------------------- captions


def pad_ids(text, tokenizer):
    return tuple(tokenizer(text, padding="max_length", max_length=77).input_ids)


def test_a_rows_captions_are_sampled_uniformly_and_their_fraction_is_dropped(tokenizer):
    """By seed and position. By default none is dropped."""
    captions, count = ["a cat", "a dog", "a bird"], 1000
    ids_of = {text: pad_ids(text, tokenizer) for text in captions} | {"": (START, *[END] * 76)}

    def sample(seed, **flags):
        args = parse_args(seed=seed, **flags)
        preprocess = functools.partial(script.preprocess_train, train=True, args=args, tokenizer=tokenizer)
        samples = read_samples([{"image": PIXEL, "text": captions}], args, count, preprocess)
        return [tuple(sample["text_input_ids"].tolist()) for sample in samples]

    assert set(sample(0)) == {ids_of[text] for text in captions}
    first, again, other = (sample(seed, caption_dropout=0.1) for seed in (1, 1, 2))
    assert first == again != other
    for text, share in {"": 0.1, "a cat": 0.3, "a dog": 0.3, "a bird": 0.3}.items():
        deviation = (count * share * (1 - share)) ** 0.5
        assert abs(first.count(ids_of[text]) - share * count) < 4 * deviation, text


def test_both_tokenizer_formats_give_clips_ids(tmp_path):
    new, old = tmp_path / "new", copy_tokenizer(tmp_path / "old", ALL_MERGES)
    make_tokenizer(ALL_MERGES).save_pretrained(new)
    assert (new / "tokenizer.json").exists() and not (old / "tokenizer.json").exists()
    texts = ["a photo of a cat", "", "Café – 猫 🐈!", *(row["text"] for row in ROWS)]
    tokens, tokens_old = (
        script.tokenize_captions(texts, CLIPTokenizerFast.from_pretrained(folder)) for folder in (new, old)
    )
    assert tokens.keys() == tokens_old.keys() == {"text_input_ids", "text_mask"}
    ids, mask = tokens["text_input_ids"], tokens["text_mask"]
    assert torch.equal(ids, tokens_old["text_input_ids"]) and torch.equal(mask, tokens_old["text_mask"])
    assert ids.shape == mask.shape == (len(texts), 77)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids[0, :7].tolist() == [START, 320, 1125, 539, 320, 2368, END]  # as in OpenAI's CLIP
    assert mask.sum(1)[:2].tolist() == [7, 2]


def test_long_captions_are_truncated_keep_the_end_token_and_are_counted(tokenizer, caplog):
    words = " ".join(["cat"] * 75)
    tokens = script.tokenize_captions([words, words + " dog" * 100], tokenizer)
    assert tokens["text_mask"].all()
    assert tokens["text_input_ids"].tolist() == 2 * [[START, *[2368] * 75, END]]
    captions = ["a moon"] * 2003  # in all parts of a large data set
    captions[:3] = ["apple " * 90, words, ""]
    captions[999], captions[1000], captions[2002] = "pear " * 76, "plum " * 77, "fig " * 80
    script.report_captions(captions, tokenizer)
    (record,) = caplog.records
    assert "Of 2003 captions and prompts 4 are cut to 77 tokens, 1 empty" in record.getMessage()
    script.report_captions(["a moon", words], tokenizer)
    assert len(caplog.records) == 1


# ----------------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize("caption", [5, {"text": "a cat"}, [["a cat"]]])
def test_a_caption_that_is_no_text_is_an_error_with_its_value(caption):
    with pytest.raises(ValueError, match=re.escape(f"the caption is {caption!r}, not a string or a list of")):
        script.list_captions({"text": caption}, parse_args())


def fail_on_odd(row, size):
    if row % 2:
        raise ValueError(f"{row} is odd")
    return {"value": row}


def test_bad_rows_are_replaced_by_the_same_other_rows_every_time():
    args, args_other = parse_args("--skip_bad_rows", seed=1), parse_args("--skip_bad_rows", seed=2)
    first, again, other = (read_samples(range(64), a, 256, fail_on_odd) for a in (args, args, args_other))
    assert first == again != other
    assert all(sample["value"] % 2 == 0 and sample["value"] == sample["row"] for sample in first)
    replaced = [sample for sample in first if sample["skipped"]]
    assert len(replaced) == 128, "each odd row once per epoch"
    assert len({sample["row"] for sample in replaced}) > 16, "any good row may replace it"
    for message in itertools.chain.from_iterable(sample["skipped"] for sample in replaced):
        assert re.fullmatch(r"row (\d+): \1 is odd", message)


def fail_on(row, size, train, args, tokenizer, bad=(3, 6)):
    if row in bad:
        raise ValueError(f"it is bad, as is {bad}")
    return {"effnet_pixel_values": torch.full((3, 32, 32), row, dtype=torch.uint8)}


@pytest.mark.parametrize("workers", [0, 2])
def test_each_skipped_row_is_logged_once_and_without_skipping_the_first_one_ends_the_run(workers, caplog):
    flags = {"train_batch_size": 4, "dataloader_num_workers": workers}
    preprocess = functools.partial(fail_on, bad=(3, 6, workers + 100))  # a message of its own
    skipping = parse_args("--skip_bad_rows", **flags)
    batches = read_batches(range(8), skipping, None, 0, 6, preprocess)  # three epochs
    assert [len(batch["row"]) for batch in batches] == [4] * 6
    assert all(batch["effnet_pixel_values"][:, 0, 0, 0].tolist() == batch["row"] for batch in batches)
    assert not {3, 6} & {row for batch in batches for row in batch["row"]}
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(re.search(r"Skipped row (\d): it is bad", message)[1] for message in messages) == ["3", "6"]
    args = parse_args(**flags)
    order = script.order_rows(np.arange(8), np.full((8, 2), 32), args)
    first = next(row for row in order if row in (3, 6))
    message = rf"^row {first}: it is bad.*; fix it, or skip such rows with --skip_bad_rows$"
    with pytest.raises(SystemExit, match=message):
        read_batches(range(8), args, None, 0, 6, preprocess)


@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_data_set_of_unreadable_rows_only_is_an_error(rows):
    attempts = []

    def fail(row, size):
        attempts.append(row)
        if len(attempts) > 1000:
            pytest.fail("it tries forever")
        raise ValueError("broken")

    (sample,) = read_samples(range(rows), parse_args("--skip_bad_rows"), 1, fail)
    assert re.search(r"rows .*cannot be read.* broken", sample["error"])
