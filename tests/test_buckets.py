# SPDX-License-Identifier: Apache-2.0
"""--aspect_ratio_buckets: images of all shapes, each resized and cropped to the nearest of a few sizes, in
micro-batches of one size."""

import collections
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import PICTURES, assert_continues_as, resumed, same_weights, tiny_args
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

import train_text_to_image_prior as script

# Width and height of six shapes, and the sizes nearest to them at --resolution=128.
SHAPES = {
    (60, 60): (128, 128),
    (62, 58): (128, 128),
    (64, 40): (160, 96),
    (40, 64): (96, 160),
    (64, 30): (192, 96),
    (28, 64): (96, 192),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of 36 emoji, six of each shape, in the order of SHAPES."""
    folder = tmp_path_factory.mktemp("shapes")
    lines = [json.loads(line) for line in (PICTURES / "metadata.jsonl").read_text().splitlines()]
    rows = []
    for index, row in enumerate(lines[:36]):
        width, height = list(SHAPES)[index // 6]
        with Image.open(PICTURES / row["file_name"]) as image:
            image = image.convert("RGB").resize((64, 64)).crop((0, 0, width, height))
        image.save(folder / f"{index:02d}.png")
        rows.append({"file_name": f"{index:02d}.png", "text": row["text"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def parse_args(folder, *argv, **flags):
    flags = {"train_data_dir": folder, "resolution": 128, "report_to": "none", "seed": 0} | flags
    flags = [f"--{name}={value}" for name, value in flags.items()]
    return script.parse_args(["--aspect_ratio_buckets", *flags, *argv])


def load_rows(args):
    dataset = script.load_train_dataset(args)
    return script.choose_sizes(dataset, args, script.hash_rows(dataset, args))


# ----------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("resolution", [96, 128, 512, 750, 768, 1024])
def test_sizes_have_about_as_many_latents_as_the_square(resolution):
    side = math.ceil(resolution / 32)
    sizes = script.bucket_sizes(resolution)
    assert sizes[0] == (32 * side, 32 * side), "the square comes first"
    assert len(set(sizes)) == len(sizes)
    assert set(sizes) == {(width, height) for height, width in sizes}, "upright and lying ones"
    assert all(height % 32 == width % 32 == 0 for height, width in sizes)
    latents = [height * width / 32**2 for height, width in sizes]
    assert all(abs(number / side**2 - 1) <= (0.05 if side >= 16 else 0.25) for number in latents)


def test_sizes_at_768_are_eleven():
    sizes = script.bucket_sizes(768)
    latents = [height * width // 32**2 for height, width in sizes]
    assert len(sizes) == 11 and (min(latents), max(latents)) == (567, 588)
    ratios = sorted(width / height for height, width in sizes)
    assert (ratios[0], ratios[-1]) == (0.5, 2.0)


def test_each_image_gets_the_size_of_which_the_least_is_cropped(shapes):
    """The share that is kept is computed here from the pixels, not from ratios."""
    rows = load_rows(parse_args(shapes))

    def kept(image_size, size):
        (width, height), (size_height, size_width) = image_size, size
        scale = max(size_height / height, size_width / width)
        return size_height * size_width / (scale * width * scale * height)

    for row in range(36):
        shape = list(SHAPES)[row // 6]
        height, width = rows.size(row)
        assert (width, height) == SHAPES[shape]
        best = max(script.bucket_sizes(128), key=lambda size: kept(shape, size))
        assert kept(shape, (height, width)) == pytest.approx(kept(shape, best))


def test_the_share_that_is_cropped_is_logged(shapes, caplog):
    load_rows(parse_args(shapes))
    (message,) = (record.getMessage() for record in caplog.records if "buckets" in record.getMessage())
    counts = collections.Counter(SHAPES[list(SHAPES)[row // 6]] for row in range(36))
    for (width, height), count in counts.items():
        assert f"{width}x{height} ({count} rows)" in message
    images, squares = [], []
    for width, height in SHAPES:
        size_width, size_height = SHAPES[width, height]
        ratios = (width / height) / (size_width / size_height), (size_width / size_height) / (width / height)
        images.append(1 - min(ratios))
        squares.append(1 - min(width, height) / max(width, height))
    shares = re.findall(r"([\d.]+)%", message)
    assert [float(share) / 100 for share in shares] == pytest.approx(
        [np.mean(images), np.mean(squares)], abs=6e-4
    )


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.sampled_from(script.bucket_sizes(128)))
def test_resized_images_just_cover_the_size(width, height, size):
    resized = script.resize_to_cover(Image.new("L", (width, height)), size)
    assert resized.height >= size[0] and resized.width >= size[1]
    assert resized.height == size[0] or resized.width == size[1]
    scale = max(size[0] / height, size[1] / width)
    assert abs(resized.height - scale * height) <= 1 and abs(resized.width - scale * width) <= 1


def test_pixels_are_those_of_torchvision(shapes):
    """Resized whole by torchvision's Resize, and center-cropped."""
    rows = load_rows(parse_args(shapes))
    for row in range(0, 36, 5):
        image = script.load_image(rows[row]["image"], [shapes])
        height, width = rows.size(row)
        scale = max(height / image.height, width / image.width)
        resized = (max(height, int(image.height * scale + 1e-6)), max(width, int(image.width * scale + 1e-6)))
        expected = transforms.Compose(
            [transforms.Resize(resized), transforms.CenterCrop((height, width)), transforms.PILToTensor()]
        )(image)
        assert torch.equal(script.make_image_transforms((height, width))(image), expected)


# ------------------------------------------------------------------------------------------- sizes of images


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif", "bmp"])
@pytest.mark.parametrize("embedded", [False, True], ids=["file", "bytes"])
def test_sizes_from_the_headers_are_those_of_the_decoded_images(suffix, embedded, tmp_path, monkeypatch):
    """For each EXIF orientation."""
    values = []
    for orientation in range(1, 9):
        file = tmp_path / f"{orientation}.{suffix}"
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {} if suffix in ("gif", "bmp") else {"exif": exif}
        Image.new("RGB", (40 + orientation, 20)).save(file, **options)
        values.append({"bytes": file.read_bytes() if embedded else None, "path": str(file)})
    features = script.datasets.Features(
        image=script.datasets.Image(decode=False), text=script.datasets.Value("string")
    )
    dataset = script.datasets.Dataset.from_dict({"image": values, "text": ["a"] * 8}, features=features)
    args = parse_args(tmp_path, cache_dir=tmp_path / "cache")
    decoded = [script.load_image(value, [tmp_path]).size for value in values]

    def fail(self):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image.Image, "load", fail)
    sizes = script.read_image_sizes(dataset, args, "hash")
    assert sizes["error"].tolist() == [""] * 8
    assert list(zip(sizes["width"], sizes["height"], strict=True)) == decoded
    if suffix not in ("gif", "bmp"):
        assert {size[0] < size[1] for size in decoded} == {True, False}, "some are turned"


def test_sizes_are_read_once(shapes, tmp_path, monkeypatch):
    args = parse_args(shapes, cache_dir=tmp_path)
    first = load_rows(args)
    find_image_file, opened = script.find_image_file, []
    monkeypatch.setattr(
        script, "find_image_file", lambda *args: opened.append(args) or find_image_file(*args)
    )
    again = load_rows(args)
    assert opened == [] and again.buckets.tolist() == first.buckets.tolist()
    load_rows(parse_args(shapes, cache_dir=tmp_path / "other"))
    assert len(opened) == 36


@pytest.mark.parametrize("content", [b"", b"no image"], ids=["empty", "text"])
def test_an_image_whose_size_cannot_be_read_ends_the_run_or_is_replaced(shapes, tmp_path, content):
    folder = shutil.copytree(shapes, tmp_path / "images")
    (folder / "07.png").write_bytes(content)
    flags = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(SystemExit, match=r"row 7: the image \(.*07\.png\) cannot be read: .*skip_bad_rows"):
        load_rows(parse_args(folder, **flags))
    args = parse_args(folder, "--skip_bad_rows", **flags)
    rows = load_rows(args)
    assert rows.size(7) == (128, 128), "that of most rows"
    with pytest.raises(SystemExit, match="row 7: "):  # the sizes are in the cache now
        load_rows(parse_args(folder, **flags))

    def preprocess(row, size):
        return {"pixels": script.make_image_transforms(size)(script.load_image(row["image"], [folder]))}

    sample = script.SampleDataset(rows, preprocess, seed=0, skip_bad_rows=True)[3, 7]
    assert list(sample["bad_rows"]) == [7]
    assert rows.size(sample["row"]) == (128, 128) and sample["pixels"].shape == (3, 128, 128)


# ------------------------------------------------------------------------------------------------- the order


def make_rows(counts):
    sizes = [(32 * (1 + bucket), 32) for bucket in range(len(counts))]
    buckets = np.repeat(np.arange(len(counts)), counts)
    return script.SizedRows(range(len(buckets)), sizes, np.random.default_rng(0).permutation(buckets))


def make_order(rows, batch_size, accumulation=1, ranks=1, seed=0):
    plan = script.SamplePlan(
        seed=seed,
        num_rows=len(rows),
        rows_hash="",
        num_processes=ranks,
        train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        bucket_rows=rows.describe(),
    )
    return script.SampleOrder(rows, plan)


COUNTS = st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any)


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, batch_size=st.integers(1, 5), seed=st.integers(0, 9))
def test_every_row_occurs_once_an_epoch_in_batches_of_one_size(counts, batch_size, seed):
    """After `batch_size` epochs each bucket has filled its last batch, so that all rows have occurred equally
    often. Before, a row may lack by the rest of its bucket, which is less than a batch."""
    rows = make_rows(counts)
    order = make_order(rows, batch_size, seed=seed)
    positions = batch_size * len(rows)
    batches = [
        [order.row(position) for position in range(start, start + batch_size)]
        for start in range(0, positions, batch_size)
    ]
    assert all(len({rows.buckets[row] for row in batch}) == 1 for batch in batches)
    seen = np.zeros(len(rows), int)
    for number, batch in enumerate(batches, 1):
        np.add.at(seen, batch, 1)
        epoch = number * batch_size // len(rows)
        lacking = epoch * order.counts - np.bincount(rows.buckets, seen, len(counts))
        if number == order.batches_before(epoch).sum():  # an epoch's end
            assert (lacking >= 0).all() and (lacking < batch_size).all()
    assert (seen == batch_size).all()


def test_buckets_and_rows_are_mixed_anew_in_each_epoch():
    rows = make_rows([40, 24, 16])
    order = make_order(rows, batch_size=4)
    epochs = [[order.row(position) for position in range(80 * e, 80 * e + 80)] for e in range(6)]
    assert all(sorted(epoch) == list(range(80)) for epoch in epochs), "4 divides each bucket"
    buckets = [tuple(rows.buckets[epoch[::4]]) for epoch in epochs]
    assert len(set(buckets)) == 6
    in_bucket = [tuple(row for row in epoch if rows.buckets[row] == 0) for epoch in epochs]
    assert len(set(in_bucket)) == 6
    # Batches of all buckets are spread over the epoch: of the first bucket's ten, some are in each half.
    first_half = [sum(bucket == 0 for bucket in epoch[:10]) for epoch in buckets]
    assert all(1 <= count <= 9 for count in first_half)
    assert epochs[0] != [make_order(rows, 4, seed=1).row(position) for position in range(80)]


@settings(max_examples=100, deadline=None)
@given(
    counts=COUNTS,
    batch_size=st.integers(1, 4),
    accumulation=st.sampled_from([1, 2, 4]),
    steps=st.integers(1, 8),
    data=st.data(),
)
def test_any_number_of_ranks_has_the_same_batches(counts, batch_size, accumulation, steps, data):
    """Also if it goes on with another number of them."""
    rows, micro_batches = make_rows(counts), 4
    stop = data.draw(st.integers(0, steps))

    def batches(ranks, first_step, last_step):
        order = make_order(rows, batch_size, micro_batches // ranks, ranks)
        shares = [list(order.train_batches(rank, first_step, last_step)) for rank in range(ranks)]
        return sorted(batch for share in shares for batch in share)

    unbroken = batches(1, 0, steps)
    assert len(unbroken) == steps * micro_batches
    for before, after in [(1, 2), (2, 4), (4, 1)]:
        assert batches(before, 0, stop) + batches(after, stop, steps) == unbroken


# ------------------------------------------------------------------------------------------------------ runs


RUN = {
    "aspect_ratio_buckets": True,
    "resolution": 128,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 7,
    "checkpointing_steps": 1,
    "learning_rate": 1e-3,
    "validation_split": 7,
    "validation_steps": 3,
}


@pytest.fixture
def train_shapes(train, shapes):
    return lambda patch=None, **flags: train(patch, train_data_dir=shapes, **RUN | flags)


def test_a_run_trains_and_validates_on_all_sizes(train_shapes, shapes):
    run = train_shapes(max_train_steps=15)
    assert run.returncode == 0, run
    args = parse_args(shapes)
    rows = load_rows(args)
    train_rows, held_out_rows = script.split_held_out(36, 7, seed=0)
    order = make_order(rows.select(train_rows), batch_size=2)
    pixels = []
    for number, step in enumerate(run.record["steps"]):
        row = train_rows[order.row(2 * number)]
        height, width = rows.size(row)
        assert step["pixels"].shape == (2, 3, height, width)
        assert step["noise"].shape == step["pred"].shape == (2, 16, height // 32, width // 32)
        image = script.load_image(rows[int(row)]["image"], [shapes])
        expected = script.normalize_pixels(script.make_image_transforms((height, width))(image)[None])
        assert torch.equal(step["pixels"][:1], expected)
        pixels.append((height, width))
    assert len(set(pixels)) == 5
    state = json.loads((run.folder / "checkpoint-15" / script.STATE_FILE).read_text())
    counts = collections.Counter(SHAPES[list(SHAPES)[row // 6]] for row in range(36))
    assert state["plan"]["bucket_rows"] == {f"{w}x{h}": count for (w, h), count in counts.items()}
    losses = [row for row in script.read_metrics(run.folder) if "val_loss" in row]
    assert len({rows.size(row) for row in held_out_rows}) >= 4
    assert [row["step"] for row in losses] == [0, 3, 6, 9, 12, 15]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("flags", [{}, {"random_crop": True}])
def test_a_resumed_run_has_the_same_bits(train_shapes, tmp_path, stop, flags):
    run = train_shapes(**flags)
    assert run.returncode == 0, run
    again = resumed(train_shapes, run, stop, tmp_path, **flags)
    assert_continues_as(again, run, stop, 7)


@pytest.mark.slow
def test_cached_latents_give_the_same_losses(train_shapes, tmp_path):
    run = train_shapes()
    cached = train_shapes(cache_latents=True, cache_dir=tmp_path)
    assert run.returncode == cached.returncode == 0, (run, cached)
    assert torch.equal(run.all("timesteps"), cached.all("timesteps"))
    for one, other in zip(run.record["steps"], cached.record["steps"], strict=True):
        assert torch.equal(one["noise"], other["noise"])
        assert torch.allclose(one["noisy"], other["noisy"], rtol=1e-5, atol=1e-4)
    for name in ("train_loss", "val_loss"):
        assert cached.logged(name) == pytest.approx(run.logged(name), rel=1e-5)


@pytest.mark.slow
def test_held_out_loss_is_that_of_each_row_by_itself(train_shapes):
    """With batches of one: the same rows, noise and timesteps."""
    run = train_shapes(max_train_steps=1, gradient_accumulation_steps=1)
    alone = train_shapes(max_train_steps=1, gradient_accumulation_steps=1, train_batch_size=1)
    assert run.returncode == alone.returncode == 0, (run, alone)
    assert run.logged("val_loss")[0] == pytest.approx(alone.logged("val_loss")[0], rel=1e-5)


@pytest.mark.slow
def test_rows_that_cannot_be_decoded_are_replaced_by_others_of_their_size(shapes, models, run_main, tmp_path):
    """A truncated file, whose header is whole, with and without the cache."""
    folder = shutil.copytree(shapes, tmp_path / "images")
    for name in ("13.png", "20.png"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    results = []
    for cached in (False, True):
        output_dir = tmp_path / f"run-{cached}"
        flags = RUN | {"skip_bad_rows": True, "cache_latents": cached, "cache_dir": tmp_path / "cache"}
        flags |= {"max_train_steps": 18, "checkpointing_steps": 18}
        done = run_main(tiny_args(models, folder, output_dir, **flags))
        assert done.returncode == 0, done
        skipped = sorted(
            set(re.findall(r"Skipped row \d+ of the \d+ used: the image \(\S*/(\d+)\.png", done.output))
        )
        assert skipped == ["13", "20"]
        results.append([row["train_loss"] for row in script.read_metrics(output_dir) if "train_loss" in row])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_train_as_one(train_ranks, train_shapes, shapes, steady_prior):
    flags = RUN | {"pretrained_prior_model_name_or_path": steady_prior, "adam_epsilon": 1e-3}
    alone = train_shapes(**flags)
    ranks = train_ranks(train_data_dir=shapes, **flags | {"gradient_accumulation_steps": 1})
    assert alone.returncode == 0 and all(run.returncode == 0 for run in ranks), (alone, *ranks)
    for name in ("train_loss", "val_loss"):
        assert ranks[0].logged(name) == pytest.approx(alone.logged(name), rel=1e-4)


def test_square_images_train_as_without_buckets(train, shapes, tmp_path):
    """Where all images have the shape of the square, nothing changes but the rounding of --resolution."""
    flags = {"max_train_steps": 4, "resolution": 64, "learning_rate": 1e-3}
    plain = train(**flags)
    with_buckets = train(**flags, aspect_ratio_buckets=True)
    assert plain.returncode == with_buckets.returncode == 0, (plain, with_buckets)
    assert same_weights(plain.prior(), with_buckets.prior())


# ------------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--aspect_ratio_buckets", "--compile"], "--aspect_ratio_buckets"),
        (["--validation_size", "1024"], "--validation_size"),
        (["--validation_size", "1024", "1536", "64"], "--validation_size"),
    ],
)
def test_contradictory_flags_of_sizes_are_refused(argv, named, capsys):
    with pytest.raises(SystemExit) as error:
        script.parse_args(["--train_data_dir=images", *argv])
    assert error.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
