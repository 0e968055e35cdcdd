# SPDX-License-Identifier: Apache-2.0
"""The sizes of --aspect_ratio_buckets, and the order in which rows are trained on, also on several ranks and
after resuming."""

import itertools
import json
import math
import re
import shutil
import tracemalloc
from fractions import Fraction
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import IMAGES
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


def write_images(folder, shapes):
    """An image and a caption for each (width, height), cut from the bundled images."""
    folder.mkdir(exist_ok=True)
    lines = (IMAGES / "metadata.jsonl").read_text().splitlines()
    rows = []
    for index, ((width, height), line) in enumerate(zip(shapes, map(json.loads, lines), strict=False)):
        with Image.open(IMAGES / line["file_name"]) as image:
            image = image.convert("RGB").resize((64, 64)).crop((0, 0, width, height))
        image.save(folder / f"{index:02d}.png")
        rows.append(json.dumps({"file_name": f"{index:02d}.png", "text": line["text"]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def cut_in_half(file):
    """Its header, from which the size is read, is whole; its pixels are not."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of 36 images, six of each shape, in the order of SHAPES."""
    return write_images(tmp_path_factory.mktemp("shapes"), [shape for shape in SHAPES for _ in range(6)])


@pytest.fixture
def train_shapes(train, shapes):
    return lambda patch=None, **flags: train(patch, train_data_dir=shapes, **RUN | flags)


def make_rank(rank=0, num_processes=1):
    return SimpleNamespace(process_index=rank, num_processes=num_processes, is_main_process=rank == 0)


def load_sizes(folder, batch_size=1, train_rows=None):
    """The data set in a folder, and the size of each row as (width, height)."""
    flags = [f"--train_data_dir={folder}", "--resolution=128", f"--train_batch_size={batch_size}"]
    args = script.parse_args([*flags, "--aspect_ratio_buckets"])
    dataset = script.load_train_dataset(args)
    train_rows = np.arange(len(dataset)) if train_rows is None else train_rows
    sizes = script.choose_sizes(dataset, train_rows, args, make_rank())
    return dataset, [(width, height) for height, width in sizes.tolist()]


# ----------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("resolution", [96, 128, 512, 750, 768, 1024])
def test_sizes_have_about_as_many_latents_as_the_square(resolution):
    side = math.ceil(resolution / 32)
    sizes = list(map(tuple, script.bucket_sizes(resolution).tolist()))
    assert (32 * side, 32 * side) in sizes
    assert len(set(sizes)) == len(sizes)
    assert set(sizes) == {(width, height) for height, width in sizes}, "upright and lying ones"
    assert all(height % 32 == width % 32 == 0 for height, width in sizes)
    latents = [height * width / 32**2 for height, width in sizes]
    assert all(abs(number / side**2 - 1) <= (0.05 if side >= 16 else 0.25) for number in latents)
    if resolution == 768:
        ratios = sorted(width / height for height, width in sizes)
        assert len(sizes) == 11 and (min(latents), max(latents)) == (567, 588)
        assert (ratios[0], ratios[-1]) == (0.5, 2.0)


def test_each_image_gets_the_size_of_which_the_least_is_cropped(shapes, caplog):
    """The share that is kept is computed here from the pixels, not from ratios."""
    _, sizes = load_sizes(shapes)

    def kept(image_size, size):
        scale = max(size[0] / image_size[0], size[1] / image_size[1])
        return size[0] * size[1] / (scale**2 * image_size[0] * image_size[1])

    for shape, size in zip((shape for shape in SHAPES for _ in range(6)), sizes, strict=True):
        assert size == SHAPES[shape]
        # The sizes come in pairs of width and height.
        best = max(map(tuple, script.bucket_sizes(128).tolist()), key=lambda size: kept(shape, size))
        assert kept(shape, size) == pytest.approx(kept(shape, best))
    (message,) = (record.getMessage() for record in caplog.records if "WIDTHxHEIGHT" in record.getMessage())
    for size, count in {(128, 128): 12, (160, 96): 6, (96, 160): 6, (192, 96): 6, (96, 192): 6}.items():
        assert f"'{size[0]}x{size[1]}': {count}" in message


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    size=st.sampled_from(script.bucket_sizes(128).tolist()),
)
def test_pixels_of_each_size_are_those_of_torchvision(width, height, size):
    """Resized whole by torchvision's Resize, so that the size is just covered, and center-cropped."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scale = max(Fraction(size[0], height), Fraction(size[1], width))
    resized = (int(scale * height), int(scale * width))
    steps = [transforms.Resize(resized), transforms.CenterCrop(size), transforms.PILToTensor()]
    image = Image.fromarray(values)
    assert torch.equal(script.make_image_transforms(size)(image), transforms.Compose(steps)(image))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif", "bmp"])
def test_shapes_from_the_headers_are_those_of_the_decoded_images(suffix, tmp_path, monkeypatch):
    """For each EXIF orientation, of files and of bytes."""
    values, ratios = [], []
    for orientation in range(1, 9):
        file = tmp_path / f"{orientation}.{suffix}"
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {} if suffix in ("gif", "bmp") else {"exif": exif}
        Image.new("RGB", (40 + orientation, 20)).save(file, **options)
        values += [{"bytes": None, "path": str(file)}, {"bytes": file.read_bytes(), "path": None}]
    for value in values:
        width, height = script.load_image(value).size
        ratios.append(height / width)

    def fail(self):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image.Image, "load", fail)
    assert list(map(script.read_ratio, values)) == pytest.approx(ratios, rel=1e-12)
    if suffix not in ("gif", "bmp"):
        assert {ratio < 1 for ratio in ratios} == {True, False}, "some are turned"


def test_a_shape_with_fewer_rows_than_a_micro_batch_joins_the_nearest_that_has_enough(tmp_path):
    """Rows that are held out do not count. Without any such shape, the most frequent one is used."""
    wanted = [(60, 60)] * 5 + [(28, 64)] * 4 + [(64, 30)] * 3 + [(40, 64)] * 2
    folder = write_images(tmp_path / "images", wanted)
    batches_of_four = [(128, 128)] * 5 + [(96, 192)] * 4 + [(128, 128)] * 3 + [(96, 192)] * 2
    assert load_sizes(folder, batch_size=4)[1] == batches_of_four, "(40, 64) is nearer to (28, 64)"
    held_out_apart = load_sizes(folder, 4, train_rows=np.delete(np.arange(14), 5))[1]
    assert held_out_apart == [(128, 128)] * 14
    assert load_sizes(folder, batch_size=9)[1] == [(128, 128)] * 14
    assert load_sizes(folder, batch_size=2)[1] == [SHAPES[shape] for shape in wanted]
    for row in range(8):  # of which one cannot read the shape
        (folder / f"{row:02d}.png").write_bytes(b"no image")
    known, unknown = [SHAPES[shape] for shape in wanted[8:]], [SHAPES[64, 30]] * 8
    assert load_sizes(folder, batch_size=1)[1] == unknown + known, "they have the most frequent one"


# ------------------------------------------------------------------------------------------- order of samples


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any)


def make_rows(counts):
    """The sizes of rows, `counts` of each of several sizes, in random order."""
    buckets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return np.stack([32 * (1 + buckets), np.full(len(buckets), 32)], axis=1)


def read_steps(sizes, first_step, last_step, batch_size=1, accumulation=1, ranks=1, buckets=True, seed=0):
    """The micro-batches of each step, those of all ranks together, as lists of (position, row)."""
    flags = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, "seed": seed}
    args = SimpleNamespace(aspect_ratio_buckets=buckets, **flags)
    steps = [[] for _ in range(first_step, last_step)]
    for rank in range(ranks):
        batches = script.order_batches(np.arange(len(sizes)), sizes, args, make_rank(rank, ranks), first_step)
        for step in steps:
            step += itertools.islice(batches, accumulation)
    return [sorted(step) for step in steps]


@settings(max_examples=100, deadline=None)
@given(counts=COUNTS, batch_size=st.integers(1, 5), seed=st.integers(0, 9))
def test_every_row_occurs_once_an_epoch_in_batches_of_one_size(counts, batch_size, seed):
    """After `batch_size` epochs each bucket has filled its last batch, so that all rows have occurred equally
    often. Before, a bucket may lack less than a batch."""
    sizes = make_rows(counts)
    buckets = sizes[:, 0] // 32 - 1
    counts = np.bincount(buckets, minlength=len(counts))
    batches = [batch for (batch,) in read_steps(sizes, 0, len(sizes), batch_size, seed=seed)]
    rows = [[row for _, row in batch] for batch in batches]
    assert [at for batch in batches for at, _ in batch] == list(range(batch_size * len(sizes)))
    assert all(len(batch) == batch_size and len(set(buckets[batch])) == 1 for batch in rows)
    for epoch in range(1, batch_size + 1):
        until = (epoch * counts // batch_size).sum()
        seen = np.bincount(np.concatenate([[], *rows[:until]]).astype(int), minlength=len(sizes))
        lacking = epoch * counts - np.bincount(buckets, seen, len(counts))
        assert (lacking >= 0).all() and (lacking < batch_size).all()
    assert (seen == batch_size).all()


@pytest.mark.parametrize("counts", [[64], [24, 16, 24]])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_rows_and_batches_are_mixed_anew_in_each_epoch(counts, batch_size):
    """Also without buckets, where a batch is of any rows."""
    sizes, orders = make_rows(counts), []
    for seed in range(4):
        steps = read_steps(sizes, 0, 8 * 64 // batch_size, batch_size, seed=seed, buckets=len(counts) > 1)
        order = [row for (batch,) in steps for _, row in batch]
        orders += [order[start : start + 64] for start in range(0, 8 * 64, 64)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    # If they were one order reversed or shifted, neighbors would stay neighbors. By chance few do.
    pairs = [set(itertools.pairwise(order)) for order in orders]
    assert max(len(a & b) for i, a in enumerate(pairs) for b in pairs[:i]) < 12
    if len(counts) > 1:
        mixtures = [tuple(sizes[order[::batch_size], 0]) for order in orders]
        assert len(set(mixtures)) == len(mixtures)
        # Batches of all sizes are spread over the epoch: some of the first size are in each half.
        for mixture in mixtures:
            half = mixture[: len(mixture) // 2]
            assert 0 < half.count(32) < mixture.count(32)


@settings(max_examples=100, deadline=None)
@given(
    counts=COUNTS,
    batch_size=st.sampled_from([2, 4, 6]),
    steps=st.integers(1, 8),
    buckets=st.booleans(),
    data=st.data(),
)
def test_any_number_of_ranks_has_the_same_batches_and_resuming_continues_them(
    counts, batch_size, steps, buckets, data
):
    """Also with another number of ranks or, without buckets, with micro-batches of another size."""
    stop = data.draw(st.integers(0, steps))
    sizes = make_rows(counts)

    def batches(ranks, first_step, last_step):
        return read_steps(sizes, first_step, last_step, batch_size, 4 // ranks, ranks, buckets)

    unbroken = batches(1, 0, steps)
    assert [len(step) for step in unbroken] == [4] * steps
    for before, after in [(1, 1), (1, 2), (2, 4), (4, 1)]:
        assert batches(before, 0, stop) + batches(after, stop, steps) == unbroken
    if not buckets:
        halves = read_steps(sizes, stop, steps, batch_size // 2, 8, buckets=False)
        for step, other in zip(unbroken[stop:], halves, strict=True):
            assert list(itertools.chain(*step)) == list(itertools.chain(*other))


@settings(max_examples=100, deadline=None)
@given(batch_size=st.integers(1, 5), counts=COUNTS)
def test_each_held_out_row_is_in_one_batch_of_its_size(batch_size, counts):
    sizes = make_rows(counts)
    held_out = np.random.default_rng(1).permutation(len(sizes))[: len(sizes) // 2 + 1].tolist()
    batches = script.group_by_size(held_out, sizes, batch_size)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(len({sizes[row, 0] for _, row in batch}) == 1 for batch in batches)
    assert sorted(itertools.chain(*batches)) == list(enumerate(held_out))


def test_starting_at_a_late_step_needs_no_memory_and_decodes_no_earlier_image():
    count, first_step, opened = 3000, 30_000, []  # after ten epochs
    sizes, rows = np.full((count, 2), 32), np.arange(count)
    dataset = datasets.Dataset.from_dict({"image": list(range(count))})
    args = script.parse_args([f"--train_data_dir={IMAGES}", "--seed=0"])

    def preprocess(row, size, train):
        opened.append(row["image"])
        return {"value": torch.tensor(row["image"])}

    tracemalloc.start()
    try:
        batches = script.order_batches(rows, sizes, args, make_rank(), first_step)
        first = next(batches)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, "a list of 30,000 samples takes 3 MB"
    finally:
        tracemalloc.stop()
    batches = itertools.chain([first], batches)
    load = script.load_batches(args, torch.device("cpu"), [], dataset, sizes, preprocess, rows, batches, True)
    batch = next(load)
    ((_, row),) = read_steps(sizes, 0, first_step + 1, buckets=False)[-1][0]
    assert batch["row"] == batch["value"].tolist() == opened == [row]
    assert batch["position"] == [first_step]


# ------------------------------------------------------------------------------------------------------ runs


def test_a_run_trains_and_validates_on_all_sizes(train_shapes, shapes):
    run = train_shapes(max_train_steps=10, checkpointing_steps=10, record=True).ok()
    train_rows, held_out_rows = script.split_held_out(36, 7, seed=0)
    dataset, sizes = load_sizes(shapes, 2, train_rows)
    sizes = np.array(sizes)[:, ::-1]
    args = SimpleNamespace(train_batch_size=2, aspect_ratio_buckets=True, seed=0)
    order = list(itertools.islice(script.order_rows(train_rows, sizes, args), 40))
    assert len(run.record["steps"]) == 20
    for number, step in enumerate(run.record["steps"]):
        rows = order[2 * number : 2 * number + 2]
        height, width = sizes[rows[0]].tolist()
        assert step["noise"].shape == step["pred"].shape == (2, 16, height // 32, width // 32)
        images = [script.load_image(dataset[row]["image"]) for row in rows]
        expected = torch.stack(list(map(script.make_image_transforms((height, width)), images)))
        assert torch.equal(step["pixels"], script.normalize_pixels(expected))
    assert len({tuple(sizes[row]) for row in order}) == 5
    assert len({tuple(sizes[row]) for row in held_out_rows}) >= 4
    assert list(run.losses("val_loss")) == [0, 3, 6, 9, 10]


def use_two_sizes():
    script.bucket_sizes = lambda resolution: np.array([[128, 96], [96, 128]])


def test_two_sizes_of_ones_own_are_trained_on_and_others_refused_on_resuming(train_shapes, tmp_path):
    run = train_shapes(use_two_sizes, max_train_steps=4, checkpointing_steps=4, record=True).ok()
    assert {step["pixels"].shape for step in run.record["steps"]} == {(2, 3, 128, 96), (2, 3, 96, 128)}
    folder = shutil.copytree(run.folder, tmp_path / "run")
    error = train_shapes(output_dir=folder, resume_from_checkpoint="latest").error()
    assert "cannot be resumed exactly: its run had buckets=[2, [[96, 128], [128, 96]]], not " in error


@pytest.mark.slow
def test_held_out_loss_is_that_of_each_row_by_itself(train_shapes):
    """With batches of one: the same rows, noise and timesteps."""
    run = train_shapes(max_train_steps=1, gradient_accumulation_steps=1).ok()
    alone = train_shapes(max_train_steps=1, gradient_accumulation_steps=1, train_batch_size=1).ok()
    assert run.losses("val_loss")[0] == pytest.approx(alone.losses("val_loss")[0], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_train_as_one_with_buckets(train_ranks, train_shapes, shapes, steady_prior):
    flags = RUN | {"pretrained_prior_model_name_or_path": steady_prior, "adam_epsilon": 1e-3}
    alone = train_shapes(**flags).ok()
    ranks = train_ranks(train_data_dir=shapes, **flags | {"gradient_accumulation_steps": 1})
    assert all(run.returncode == 0 for run in ranks), ranks
    for name in ("train_loss", "val_loss"):
        assert ranks[0].losses(name) == pytest.approx(alone.losses(name), rel=1e-4)


# -------------------------------------------------------------------------------------------------- bad rows


@pytest.mark.slow
def test_the_only_image_of_its_shape_may_be_unreadable(train, tmp_path):
    """With --skip_bad_rows others replace it, and one without a shape; without, the run ends in a line."""
    folder = write_images(tmp_path / "images", [(60, 60)] * 6 + [(64, 30), (64, 64)])
    cut_in_half(folder / "06.png")
    (folder / "07.png").write_bytes(b"no image")
    flags = RUN | {"train_data_dir": folder, "validation_split": None, "max_train_steps": 4}
    alone = train(**flags | {"train_batch_size": 1, "max_train_steps": 10}, skip_bad_rows=True)
    assert alone.returncode == 0 and "Skipped row 6" in alone.output, alone
    run = train(**flags, skip_bad_rows=True, record=True).ok()
    skipped = re.findall(r"Skipped row \d+: the image \(\S*/(\d+)\.png\) cannot be read", run.output)
    assert sorted(skipped) == ["06", "07"], "each is reported once"
    assert run.all("pixels").shape == (16, 3, 128, 128)
    error = train(**flags).error()
    assert re.search(r"row [67]: the image \(.*0[67]\.png\) cannot be .*--skip_bad_rows$", error)


@pytest.mark.slow
def test_unreadable_rows_are_replaced_by_others_of_their_size(train, shapes, tmp_path):
    """By the same ones with and without the cache."""
    folder = shutil.copytree(shapes, tmp_path / "images")
    cut_in_half(folder / "13.png")
    cut_in_half(folder / "20.png")
    flags = RUN | {"skip_bad_rows": True, "cache_dir": tmp_path / "cache", "train_data_dir": folder}
    flags |= {"max_train_steps": 18, "checkpointing_steps": 18}
    runs = [train(**flags, cache_latents=cached).ok() for cached in (False, True)]
    for run in runs:
        skipped = re.findall(r"Skipped row \d+: the image \(\S*/(\d+)\.png", run.output)
        assert sorted(skipped) == ["13", "20"]
    for name in ("train_loss", "val_loss"):
        assert runs[1].losses(name) == pytest.approx(runs[0].losses(name), rel=1e-5)


def test_a_row_of_a_rare_shape_is_trained_on_in_each_epoch(train, tmp_path):
    """31 images of one shape and one of another: it was left out for 16 epochs, then filled a whole batch."""
    folder = write_images(tmp_path / "images", [(60, 60)] * 31 + [(64, 32)])
    flags = {"train_data_dir": folder, "train_batch_size": 16, "max_train_steps": 4, "resolution": 64}
    run = train(**flags, aspect_ratio_buckets=True, record=True).ok()
    assert "{'64x64': 32}" in run.output
    pixels = [image.numpy().tobytes() for image in run.all("pixels")]
    assert len(set(pixels[:32])) == 32 and sorted(pixels[:32]) == sorted(pixels[32:])
