# SPDX-License-Identifier: Apache-2.0
"""What --cache_latents keeps on disk, when it is made anew, and that training on it equals training without
it."""

import copy
import functools
import gc
import itertools
import json
import os
import re
import resource
import shutil
import signal
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import at_call, checksum, distance, same_weights
from PIL import Image
from safetensors.torch import load_file
from tiny_models import read_images
from transformers import CLIPTextModel, CLIPTokenizerFast

import train_text_to_image_prior as script

# Ten rows of two captions each, of which two are held out; 72 pixels make 3 x 3 latents.
LISTS = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_samples": 10}
LISTS |= {"max_train_steps": 7, "caption_column": "captions", "caption_dropout": 0.25, "resolution": 72}
LISTS |= {"use_ema": True, "learning_rate": 1e-3}
ONE_STEP = {"max_train_steps": 1, "train_batch_size": 2, "cache_latents": True}
# All 64 rows, each once.
ALL = {"max_train_steps": 8, "train_batch_size": 8, "checkpointing_steps": 8, "learning_rate": 1e-3}
ALL |= {"cache_latents": True}


@pytest.fixture
def new_run(train, tmp_path_factory):
    """new_run(patch=None, **flags): a Run that has not been run before. `images` are the checksums of those
    that its encoder received."""

    def new_run(patch=None, **flags):
        run = train(patch, record=True, output_dir=tmp_path_factory.mktemp("run") / "out", **flags).ok()
        run.images = list(itertools.chain.from_iterable(run.record["images"]))
        return run

    return new_run


def set_batch_size(batch_size):
    script.CACHE_BATCH_SIZE = batch_size


batches_of_8 = functools.partial(set_batch_size, 8)


def image_checksums(folder, resolution=64):
    """The checksums of a folder's images in the order of their names."""
    return [checksum(image) for image in read_images(folder, resolution)]


def copy_images(images, folder, count=10):
    """A copy of the first images with their metadata; returns the rows."""
    folder.mkdir()
    rows = read_rows(images)[:count]
    for row in rows:
        shutil.copy(images / row["file_name"], folder)
    write_rows(folder, rows)
    return rows


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def cache_files(folder):
    """The files of all rows, in order, and nothing else."""
    files = [path for path in folder.glob("wuerstchen_latents/**/*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors"}
    return sorted(files, key=lambda path: int(path.stem))


def assert_alike(run, other, rounding):
    """Each step has the same inputs, up to rounding."""
    for one, two in zip(run.record["steps"], other.record["steps"], strict=True):
        for name in ("image_embeds", "prompt_embeds", "noisy"):
            assert (one[name].dtype, one[name].shape) == (two[name].dtype, two[name].shape), name
            difference = (one[name].double() - two[name].double()).abs().max()
            assert difference < rounding * two[name].abs().max(), name


# ------------------------------------------------------------------------------ training as without the cache


@pytest.mark.parametrize(
    ("precision", "rounding"), [("no", 1e-5), pytest.param("bf16", 2**-6, marks=pytest.mark.slow)]
)
def test_every_step_is_that_of_the_uncached_run(train, tmp_path, precision, rounding):
    flags = LISTS | {"mixed_precision": precision, "validation_split": 2, "validation_steps": 3}
    flags |= {"record": True}
    plain, cached = train(**flags).ok(), train(**flags, cache_latents=True, cache_dir=tmp_path).ok()
    assert len(plain.record["steps"]) == len(cached.record["steps"]) == 21
    for name in ("noise", "timesteps"):
        assert torch.equal(plain.all(name), cached.all(name)), name
    assert_alike(cached, plain, rounding)
    for name in ("train_loss", "grad_norm", "val_loss"):
        expected, got = plain.losses(name), cached.losses(name)
        assert expected.keys() == got.keys() and len(expected) >= 3
        assert got == pytest.approx(expected, rel=10 * rounding if name == "grad_norm" else rounding)
    assert plain.losses("lr") == cached.losses("lr")

    texts = [tuple(ids.tolist()) for ids in plain.all("ids")]
    assert 12 < len(set(texts)) <= 17, "both captions of most of the eight rows, and the empty one"
    empty = [i for i, ids in enumerate(texts) if ids[0] + 1 == ids[1]]  # the start token, then the end token
    assert 3 < len(empty) < 24
    assert len({cached.all("prompt_embeds")[i].float().numpy().tobytes() for i in empty}) == 1


def test_all_rows_are_encoded_once_in_large_batches_and_the_raw_output_is_kept(
    new_run, models, images, tmp_path
):
    flags = LISTS | {"max_train_samples": None, "max_train_steps": 20}
    run = new_run(**flags, cache_latents=True, cache_dir=tmp_path)
    assert [len(batch) for batch in run.record["images"]] == [32, 32]
    assert sorted(map(len, run.record["texts"])) == [1, 64, 64], "two captions a row, and the empty one"
    assert sorted(run.images) == sorted(image_checksums(images, 72))

    cached = [load_file(file) for file in cache_files(tmp_path)]
    rows = read_rows(images)
    assert len(cached) == len(rows) == 64
    image_encoder = script.EfficientNetEncoder.from_pretrained(models / "encoder").eval()
    text_encoder = models / "prior" / "text_encoder"
    text_encoder = CLIPTextModel.from_pretrained(text_encoder, attn_implementation="eager").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(models / "prior" / "tokenizer")
    differences = []
    with torch.no_grad():
        for row, image, entry in zip(rows, read_images(images, 72), cached, strict=True):
            features = image_encoder.mapper(image_encoder.backbone(image[None]))
            differences.append((entry["latents"] - features).abs().max().item())
            assert len(entry["prompt_embeds"]) == len(row["captions"]) == 2
            for caption, value in zip(row["captions"], entry["prompt_embeds"], strict=True):
                tokens = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt")
                expected = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
                assert torch.allclose(value[None], expected, atol=1e-5)
    assert max(differences) < 1e-4 * 42, "not scaled: the latents' deviation is 42"


@pytest.mark.slow
@pytest.mark.parametrize(("cached", "alive"), [(False, ["CLIPTextModel", "EfficientNetEncoder"]), (True, [])])
def test_both_encoders_are_freed_before_training(train, tmp_path, cached, alive):
    flags = {"max_train_steps": 1, "validation_prompts": ["a red apple"], "cache_dir": tmp_path / "cache"}
    patch = functools.partial(record_alive_encoders, tmp_path / "alive")
    train(patch, **flags, cache_latents=cached).ok()
    assert json.loads((tmp_path / "alive").read_text()) == alive


def record_alive_encoders(file):
    """Writes to `file` which encoders still exist when the first loss is computed."""
    gc.disable()  # on a device their memory must be free at once, not when Python looks for cycles
    load_encoders, encoders = script.load_encoders, []

    def recorded_load(*args):
        models = load_encoders(*args)
        encoders.extend(map(weakref.ref, models))
        return models

    def record():
        names = [type(model()).__name__ for model in encoders if model() is not None]
        file.write_text(json.dumps(sorted(names)))

    script.load_encoders = recorded_load
    at_call(script, "diffusion_loss", 1, record)


# -------------------------------------------------------------------------------- when the cache is made anew


@pytest.fixture(scope="module")
def table(images, tmp_path_factory):
    """A folder with one Parquet file of eight rows, with two columns of images and two of captions."""
    folder = tmp_path_factory.mktemp("table")
    rows = read_rows(images)[:8]
    files = [{"bytes": (images / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
    columns = {"image": files, "other_image": files[::-1]}
    columns |= {name: [row[name] for row in rows] for name in ("text", "captions")}
    dataset = datasets.Dataset.from_dict(columns)
    for name in ("image", "other_image"):
        dataset = dataset.cast_column(name, datasets.Image())
    dataset.to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def key_of(models, table):
    """key_of(change=None, models=models, **flags): the key of a run with these flags. `change`
    is called with a copy of the tokenizer and the encoders."""

    @functools.cache
    def load_tools(models, mixed_precision):
        flags = {"pretrained_prior_model_name_or_path": models / "prior", "cache_dir": None}
        args = SimpleNamespace(**flags, pretrained_image_encoder_name_or_path=models / "encoder")
        accelerator = {"device": torch.device("cpu"), "native_amp": True, "mixed_precision": mixed_precision}
        tokenizer = CLIPTokenizerFast.from_pretrained(models / "prior" / "tokenizer")
        return tokenizer, *script.load_encoders(args, SimpleNamespace(**accelerator))

    def key_of(change=None, models=models, new_flag="photo of", **flags):
        settings = {"train_data_dir": table, "resolution": 64, "seed": 0} | flags
        argv = [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]
        args = script.parse_args(argv)
        args.new_flag = new_flag  # as an edit adds one
        dataset, _, rows_hash = script.check_rows(script.load_train_dataset(args), args)
        sizes = np.full((len(dataset), 2), args.resolution)
        tools = load_tools(models, args.mixed_precision)
        if change is not None:
            change(*(tools := copy.deepcopy(tools)))
        return script.cache_key(dataset, sizes, rows_hash, args, *tools)

    return key_of


def change_activation(model):
    name, _ = next(item for item in model.named_modules() if item[0].endswith("activation_fn"))
    model.set_submodule(name, torch.nn.GELU())


CHANGES = {
    "resolution": {"resolution": 96},
    "dtype": {"mixed_precision": "bf16"},
    "captions": {"caption_column": "captions"},
    "images": {"image_column": "other_image"},
    "number of rows": {"max_train_samples": 7},
    "image encoder": {"change": lambda _, text, image: image.mapper[1].bias.data[0].add_(1e-3)},
    "text encoder": {"change": lambda _, text, image: next(text.parameters()).data[0, 0].add_(1e-3)},
    "activation": {"change": lambda _, text, image: change_activation(text)},
    "length of tokens": {"change": lambda tokenizer, *_: setattr(tokenizer, "model_max_length", 60)},
}
LIST_CAPTIONS, LOAD_IMAGE = script.list_captions, script.load_image
MAKE_TRANSFORMS, TOKENIZE = script.make_image_transforms, script.tokenize_captions
EDITS = {
    "list_captions": lambda row, args: [f"{args.new_flag} {text}" for text in LIST_CAPTIONS(row, args)],
    "load_image": lambda value: LOAD_IMAGE(value).convert("L").convert("RGB"),
    "make_image_transforms": lambda size, _=(): lambda image: MAKE_TRANSFORMS(size)(image).flip(-1),
    "tokenize_captions": lambda captions, tokenizer: TOKENIZE([text[1:] for text in captions], tokenizer),
    "normalize_pixels": lambda pixels: pixels.float() / 127.5 - 1,
    "embed_images": lambda pixels, image_encoder: image_encoder(pixels),
    "embed_captions": lambda tokens, text_encoder: text_encoder(**tokens).hidden_states[-2],
}


@pytest.mark.parametrize("name", [*CHANGES, *EDITS])
def test_what_the_encoded_rows_depend_on_changes_the_key(key_of, monkeypatch, name):
    """Captions and pixels by what they are, so that a new flag counts if an edit changes them by it."""
    before = key_of()
    if name in EDITS:
        monkeypatch.setattr(script, name, EDITS[name])
    changed = key_of(**CHANGES.get(name, {}))
    assert changed != before
    assert name in CHANGES or (key_of(new_flag="drawing of") != changed) == (name == "list_captions")


OTHERS = {"seed": 5, "train_batch_size": 3, "caption_dropout": 0.5, "validation_split": 2, "use_ema": True}
OTHERS |= {"skip_bad_rows": True, "dataloader_num_workers": 2, "loss_weighting": "p2"}


@pytest.mark.parametrize("column", ["text", "captions"])
def test_what_the_encoded_rows_do_not_depend_on_keeps_the_key(key_of, models, tmp_path, monkeypatch, column):
    """Other flags, models that were moved, the random state, and edits of other functions. Of lists, all
    captions are encoded."""
    before = key_of(caption_column=column)
    moved = shutil.copytree(models, tmp_path / "moved")
    for name in ("choose_caption", "diffusion_loss", "make_optimizer"):
        monkeypatch.setattr(script, name, lambda *args, **kwargs: None)
    for _ in range(3):
        assert key_of(models=moved, caption_column=column, **OTHERS) == before


def rotate(file, orientation):
    """Writes an image of 64 x 40 with an EXIF orientation. The file's size is always the same."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.linear_gradient("L").resize((64, 40)).convert("RGB").save(file, exif=exif)
    return file.stat().st_size


def test_a_run_encodes_anew_what_was_changed_in_place_and_otherwise_nothing(new_run, images, tmp_path):
    """An image that is turned, its file's size as before, has its new shape."""
    folder = tmp_path / "images"
    rows = copy_images(images, folder, 4)
    rows.append({"file_name": "turned.jpg", "text": "a gradient"})
    write_rows(folder, rows)
    size = rotate(folder / "turned.jpg", 1)
    flags = ONE_STEP | {"train_data_dir": folder, "cache_dir": tmp_path / "cache", "resolution": 128}
    flags |= {"aspect_ratio_buckets": True, "train_batch_size": 1}

    def encode(**changed):
        run = new_run(**flags | changed)
        bars = [line for line in run.output.replace("\r", "\n").splitlines() if "Encoding" in line]
        assert f"Encoding {len(run.images)} rows: " in bars[-1]
        return run.images, [len(batch) for batch in run.record["texts"]]

    first, _ = encode()
    assert len(first) == 5
    before = {path: path.stat().st_mtime_ns for path in cache_files(flags["cache_dir"])}
    assert encode(seed=5, caption_dropout=0.5) == ([], [1]), "the empty caption"
    assert before == {path: path.stat().st_mtime_ns for path in cache_files(flags["cache_dir"])}
    assert rotate(folder / "turned.jpg", 6) == size
    image = LOAD_IMAGE({"bytes": None, "path": folder / "turned.jpg"})
    assert image.size == (40, 64)
    pixels = script.normalize_pixels(MAKE_TRANSFORMS((160, 96))(image)[None])
    second, _ = encode()
    assert set(second) - set(first) == {checksum(pixels[0])}
    rows[1]["text"] = "something else"
    write_rows(folder, rows)
    assert sorted(encode()[0]) == sorted(second)
    assert encode()[0] == []


@pytest.mark.slow
def test_the_cache_of_another_process_is_found(train_fresh, new_run, images, tmp_path):
    """Nothing in the key may depend on the process, such as the order of a set or an address."""
    copy_images(images, tmp_path / "images")
    flags = ONE_STEP | {"train_data_dir": tmp_path / "images", "caption_column": "captions"}
    flags |= {"cache_dir": tmp_path / "cache"}
    run = train_fresh(env={"PYTHONHASHSEED": "1"}, **flags).ok()
    assert new_run(**flags | run.encoder).images == [] and len(cache_files(tmp_path / "cache")) == 10


# ---------------------------------------------------------- passes that are interrupted, or share the work


@pytest.fixture(scope="module")
def in_one_go(train, tmp_path_factory):
    """A run over a cache that was made in one go."""
    cache = tmp_path_factory.mktemp("cache")
    run = train(batches_of_8, **ALL, cache_dir=cache, record=True).ok()
    run.cache = cache
    return run


def at_batch(number, action):
    """Batches of 8 rows, and an action before one of them is encoded."""
    batches_of_8()
    at_call(script, "embed_images", number, action)


kill = functools.partial(signal.raise_signal, signal.SIGKILL)


def fill_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(
    ("number", "action"), [(6, kill), pytest.param(6, fill_disk, marks=pytest.mark.slow)]
)
def test_an_interrupted_pass_continues_at_the_missing_rows(
    train, new_run, in_one_go, images, tmp_path, number, action
):
    run = train(functools.partial(at_batch, number, action), **ALL, cache_dir=tmp_path)
    if action is kill:
        assert run.returncode == -signal.SIGKILL, run
    else:
        assert f"--cache_dir={tmp_path}" in run.error() and "File too large" in run.error()
        (partial,) = set(tmp_path.glob("wuerstchen_latents/*/*")) - set(tmp_path.rglob("*.safetensors"))
        partial.unlink()
    assert not (run.folder / "prior_pipeline").exists()
    run = new_run(batches_of_8, **ALL, cache_dir=tmp_path)
    assert run.images == image_checksums(images)[40:]
    assert len(cache_files(tmp_path)) == 64
    for name in ("image_embeds", "prompt_embeds"):
        assert torch.equal(run.all(name), in_one_go.all(name))
    assert same_weights(run.prior(), in_one_go.prior())


@pytest.mark.parametrize("size", [0, 300])
def test_an_emptied_file_is_made_anew_and_a_damaged_one_named(
    train, new_run, in_one_go, images, tmp_path, size
):
    """A power failure empties files."""
    flags = ALL | {"cache_dir": shutil.copytree(in_one_go.cache, tmp_path / "cache")}
    file = cache_files(flags["cache_dir"])[17]
    os.truncate(file, size)
    if size:
        error = train(**flags).error()
        assert re.search(rf"^row 17: {file} cannot be read \(.*\): delete it and start again", error)
        file.unlink()
    run = new_run(**flags)
    assert run.images == image_checksums(images)[17:18]
    assert distance(run.prior(), in_one_go.prior()) < 1e-4, "it was encoded in another batch"


@pytest.mark.slow
def test_two_runs_at_the_same_time_share_a_cache(new_run, in_one_go, tmp_path):
    flags, runs = ALL | {"cache_dir": tmp_path / "cache"}, []
    threads = [threading.Thread(target=lambda: runs.append(new_run(batches_of_8, **flags))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 2 and all(same_weights(run.prior(), in_one_go.prior()) for run in runs)
    assert len(cache_files(tmp_path / "cache")) == 64


# --------------------------------------------------------------------------------------------------- bad rows


@pytest.fixture(scope="module")
def broken_images(images, tmp_path_factory):
    """A folder of ten rows, of which rows 3 and 7 have truncated images; and the names of their files."""
    folder = tmp_path_factory.mktemp("broken") / "images"
    files = [row["file_name"] for row in copy_images(images, folder)]
    for row in (3, 7):
        os.truncate(folder / files[row], 900)
    return folder, (files[3], files[7])


def assert_names_row_3(run, file):
    for words in ("row 3", file, "cannot be read: OSError", "--skip_bad_rows"):
        assert words in run.error(), run


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_row_ends_the_pass_in_one_line(train, broken_images, tmp_path, workers):
    folder, (file, _) = broken_images
    flags = ONE_STEP | {"train_data_dir": folder, "cache_dir": tmp_path, "dataloader_num_workers": workers}
    assert_names_row_3(train(functools.partial(set_batch_size, 2), **flags), file)
    assert len(cache_files(tmp_path)) == 2, "the rows of the first batch"


@pytest.mark.slow
def test_bad_rows_are_skipped_as_without_the_cache(train, new_run, broken_images, tmp_path):
    """The same rows replace them: of the held-out ones, others that are held out. Each run names them."""
    folder, files = broken_images
    flags = {"train_data_dir": folder, "max_train_steps": 5, "skip_bad_rows": True}
    flags |= {"validation_split": 4, "learning_rate": 1e-3}
    cache = {"cache_latents": True, "cache_dir": tmp_path}
    plain = new_run(**flags)
    first, second = (new_run(functools.partial(set_batch_size, 3), **flags, **cache) for _ in range(2))
    for run in (plain, first, second):
        skipped = [line.split("Skipped ")[1] for line in run.output.splitlines() if "Skipped " in line]
        assert len(skipped) == 2, "each is named once"
        for line, row, file in zip(sorted(skipped), (3, 7), files, strict=True):
            assert line.startswith(f"row {row}: ") and file in line
    assert len(first.images) == 10 and len(second.images) == 2, "two good rows in their places"
    assert same_weights(first.prior(), second.prior())
    assert_alike(first, plain, 1e-5)  # the same rows replaced them
    for name in ("train_loss", "val_loss"):
        assert first.losses(name) == pytest.approx(plain.losses(name), rel=1e-5)
    assert_names_row_3(train(**flags | cache | {"skip_bad_rows": False}), files[0])


def fail_to_read(file):
    def load_image(value):
        if Path(value["path"]).name == file:
            raise ValueError(f"the image ({file}) cannot be read: OSError: the network is down")
        return LOAD_IMAGE(value)

    script.load_image = load_image


@pytest.mark.slow
def test_a_row_that_could_not_be_read_is_encoded_as_soon_as_it_can(new_run, images, tmp_path):
    """Though its file has not changed."""
    folder = tmp_path / "images"
    file = copy_images(images, folder, 12)[2]["file_name"]  # the key has the pixels of 8 other rows
    flags = ONE_STEP | {"train_data_dir": folder, "cache_dir": tmp_path / "cache", "skip_bad_rows": True}
    checksums = image_checksums(folder)
    run = new_run(functools.partial(fail_to_read, file), **flags)
    assert "Skipped row 2: " in run.output, run
    assert set(checksums) - set(run.images) == {checksums[2]}
    run = new_run(**flags)
    assert "Skipped" not in run.output, run
    assert run.images == [checksums[2]]
    assert len(cache_files(tmp_path / "cache")) == 12
    assert new_run(**flags).images == []
