# SPDX-License-Identifier: Apache-2.0
"""What --cache_latents keeps on disk, when it is made anew, and that training on it equals training without
it."""

import ast
import gc
import hashlib
import inspect
import json
import os
import resource
import shutil
import signal
import sys
import threading
import types
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from conftest import SCRIPT, Samples, assert_continues_as, resumed, same_weights, tiny_args
from datasets.table import ConcatenationTable, MemoryMappedTable
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import DECODER_TEXT_WIDTH, read_images
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizerFast

import train_text_to_image_prior as script

# Ten rows of two captions each; epochs end inside steps 2, 4 and 7 and with step 5. 72 pixels make 3 x 3
# latents.
LISTS = {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_train_samples": 10,
    "max_train_steps": 7,
    "checkpointing_steps": 1,
    "use_ema": True,
    "caption_column": "captions",
    "caption_dropout": 0.25,
    "resolution": 72,
    "learning_rate": 1e-3,
}
ONE_STEP = {"max_train_steps": 1, "train_batch_size": 2, "cache_latents": True}
# All 64 rows, each once.
FOUR_SHARDS = {"max_train_steps": 8, "train_batch_size": 8, "checkpointing_steps": 8, "learning_rate": 1e-3}
# Those of the script whose source is part of the key.
KEYED_FUNCTIONS = [
    "load_image",
    "resize_to_cover",
    "make_image_transforms",
    "normalize_pixels",
    "list_captions",
    "tokenize_captions",
    "embed_captions",
    "embed_images",
]


# ----------------------------------------------------------------------- what is recorded in the forked child


def record_encoders(folder, on_batch=None):
    """Writes each batch that an encoder receives to a file in `folder`, one per process. `on_batch` is called
    after it with the number of image batches so far."""
    encode_images, encode_text = script.EfficientNetEncoder.forward, CLIPTextModel.forward
    batches = []

    def record(kind, samples):
        digests = [hashlib.sha256(sample.numpy().tobytes()).hexdigest() for sample in samples]
        with open(folder / f"{os.getpid()}.jsonl", "a") as file:
            print(json.dumps([kind, digests]), file=file)

    def recorded_images(self, pixels):
        record("images", pixels.float())
        batches.append(len(pixels))
        if on_batch is not None:
            on_batch(len(batches))
        return encode_images(self, pixels)

    def recorded_text(self, input_ids, *args, **kwargs):
        record("texts", input_ids)
        return encode_text(self, input_ids, *args, **kwargs)

    script.EfficientNetEncoder.forward, CLIPTextModel.forward = recorded_images, recorded_text


class Encoded:
    """What the encoders of all processes received, batch by batch, as digests."""

    def __init__(self, folder):
        self.processes = [
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in sorted(folder.glob("*.jsonl"))
        ]

    def batches(self, kind):
        return [digests for process in self.processes for what, digests in process if what == kind]

    def all(self, kind):
        return [digest for batch in self.batches(kind) for digest in batch]


@pytest.fixture
def recorded_train(train, tmp_path_factory):
    """recorded_train(on_batch=None, patch=None, **flags): a Run, and what its encoders received."""

    def run(on_batch=None, patch=None, **flags):
        folder = tmp_path_factory.mktemp("encoded")
        done = train(partial(call_both, partial(record_encoders, folder, on_batch), patch), **flags)
        return done, Encoded(folder)

    return run


@pytest.fixture
def run_patched(run_main, models, pictures, monkeypatch):
    """run_patched(patch, **flags): a run in a child that has called `patch`. Unlike `train`, it keeps no
    references to the run's models."""
    main = script.main

    def run(patch, output_dir, **flags):
        def patched_main(argv):
            patch()
            main(argv)

        monkeypatch.setattr(script, "main", patched_main)
        return run_main(tiny_args(models, pictures, output_dir, **flags))

    return run


def call_both(first, second):
    first()
    if second is not None:
        second()


def set_sizes(batch_size, shard_size):
    script.CACHE_BATCH_SIZE, script.CACHE_SHARD_SIZE = batch_size, shard_size


small_shards = partial(set_sizes, 8, 16)


def image_digests(folder, resolution=64):
    """The digests, as in Encoded, of a folder's images in the order of their names."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in read_images(folder, resolution)]


def copy_images(pictures, folder, count=10):
    """A copy of the first images with their metadata; returns the rows."""
    folder.mkdir()
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()[:count]]
    for row in rows:
        shutil.copy(pictures / row["file_name"], folder)
    write_rows(folder, rows)
    return rows


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def cache_files(folder):
    return sorted(folder.glob("wuerstchen_latents/*/*.arrow"))


def relative_difference(run, other, name):
    """The largest difference of a tensor between two runs, as a share of its largest value."""
    one, two = run.all(name).double(), other.all(name).double()
    return ((one - two).abs().max() / two.abs().max()).item()


# ------------------------------------------------------------------------------ training as without the cache


@pytest.mark.parametrize(
    ("precision", "rounding"), [("no", 1e-5), pytest.param("bf16", 2**-6, marks=pytest.mark.slow)]
)
def test_every_step_is_that_of_the_uncached_run(train, tmp_path, precision, rounding):
    """With lists of captions, caption dropout, accumulation and held-out rows."""
    flags = LISTS | {"mixed_precision": precision, "validation_split": 2, "validation_steps": 3}
    plain, cached = train(**flags), train(**flags, cache_latents=True, cache_dir=tmp_path)
    assert plain.returncode == cached.returncode == 0, (plain, cached)
    assert len(plain.record["steps"]) == len(cached.record["steps"]) == 21
    for name in ("noise", "timesteps"):
        assert torch.equal(plain.all(name), cached.all(name)), name
    for one, other in zip(plain.record["steps"], cached.record["steps"], strict=True):
        for name in ("image_embeds", "prompt_embeds", "noisy"):
            assert one[name].dtype == other[name].dtype
            assert one[name].shape == other[name].shape
    for name in ("image_embeds", "prompt_embeds"):
        assert relative_difference(cached, plain, name) < rounding, name
    for tag in ("train_loss", "grad_norm", "val_loss"):
        expected, got = plain.logged(tag), cached.logged(tag)
        assert expected.keys() == got.keys() and len(expected) >= 3
        print(tag, max(abs(got[step] / expected[step] - 1) for step in expected))
        assert got == pytest.approx(expected, rel=10 * rounding if tag == "grad_norm" else rounding)
    assert plain.logged("lr") == cached.logged("lr")

    texts = [tuple(ids.tolist()) for ids in plain.all("ids")]
    assert 12 < len(set(texts)) <= 17, "both captions of most of the eight rows, and the empty one"
    empty = [i for i, ids in enumerate(texts) if ids[0] + 1 == ids[1]]  # the start token, then the end token
    assert 3 < len(empty) < 24
    assert len({cached.all("prompt_embeds")[i].float().numpy().tobytes() for i in empty}) == 1


def test_the_cache_holds_the_raw_output_of_both_encoders(train, models, pictures, tmp_path):
    flags = LISTS | {"max_train_samples": None, "max_train_steps": 1}
    run = train(**flags, cache_latents=True, cache_dir=tmp_path)
    assert run.returncode == 0, run
    (file,) = {
        path
        for path in tmp_path.rglob("*.arrow")
        if "latents" in datasets.Dataset.from_file(str(path)).column_names
    }
    cached = datasets.Dataset.from_file(str(file))
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    assert len(cached) == len(rows) == 64

    image_encoder = script.EfficientNetEncoder.from_pretrained(models / "encoder").eval()
    text_encoder = CLIPTextModel.from_pretrained(
        models / "prior" / "text_encoder", attn_implementation="eager"
    ).eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(models / "prior" / "tokenizer")
    pixels = read_images(pictures, 72)
    differences = []
    with torch.no_grad():
        for row, image, entry in zip(rows, pixels, cached, strict=True):
            features = image_encoder.mapper(image_encoder.backbone(image[None]))
            latents = torch.frombuffer(bytearray(entry["latents"]), dtype=torch.float32).view(1, 16, 3, 3)
            differences.append((latents - features).abs().max().item())
            assert len(entry["prompt_embeds"]) == len(row["captions"]) == 2
            for caption, value in zip(row["captions"], entry["prompt_embeds"], strict=True):
                tokens = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt")
                expected = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
                embeds = torch.frombuffer(bytearray(value), dtype=torch.float32).view(1, 77, 32)
                assert torch.allclose(embeds, expected, atol=1e-5)
    assert max(differences) < 1e-4 * 42, "not scaled: the latents' deviation is 42"
    assert not any(entry["error"] for entry in cached)


def test_images_and_captions_are_encoded_once_in_large_batches_under_one_progress_bar(
    recorded_train, pictures, tmp_path
):
    flags = {
        "max_train_steps": 20,
        "caption_column": "captions",
        "cache_latents": True,
        "cache_dir": tmp_path,
    }
    run, encoded = recorded_train(**flags)
    assert run.returncode == 0, run
    assert [len(batch) for batch in encoded.batches("images")] == [32, 32]
    assert sorted(encoded.all("images")) == sorted(image_digests(pictures))
    assert sorted(map(len, encoded.batches("texts"))) == [1, 64, 64], "two captions a row, and the empty one"
    bars = [line for line in run.output.replace("\r", "\n").splitlines() if line.startswith("Encoding")]
    assert bars and bars[-1].startswith("Encoding: 100%") and "64/64" in bars[-1], run
    assert "Generating" not in "".join(bars) and "examples" not in run.output.split("Encoding", 1)[1]


@pytest.mark.slow
def test_both_encoders_are_freed_before_training(run_patched, tmp_path):
    file = tmp_path / "alive.json"
    flags = {
        "max_train_steps": 1,
        "validation_prompts": ["a red apple"],
        "cache_dir": tmp_path / "cache",
    }
    for cached, expected in ((False, ["CLIPTextModel", "EfficientNetEncoder"]), (True, [])):
        run = run_patched(
            partial(record_alive_models, file),
            output_dir=tmp_path / f"{cached}",
            **flags,
            cache_latents=cached,
        )
        assert run.returncode == 0, run
        assert json.loads(file.read_text()) == expected


def record_alive_models(file):
    """Writes to `file` which of the models that encoded something still exist when training begins."""
    gc.disable()  # on a device their memory must be free at once, not when Python looks for cycles
    models = {}
    for cls in (script.EfficientNetEncoder, CLIPTextModel):

        def recorded_forward(self, *args, forward=cls.forward, **kwargs):
            if getattr(self.config, "hidden_size", None) != DECODER_TEXT_WIDTH:
                models.setdefault(id(self), weakref.ref(self))
            return forward(self, *args, **kwargs)

        cls.forward = recorded_forward
    prior_forward = script.wuerstchen.WuerstchenPrior.forward

    def recorded_prior_forward(self, *args, **kwargs):
        if self.training:
            names = (type(model()).__name__ for model in models.values() if model() is not None)
            file.write_text(json.dumps(sorted(names)))
        return prior_forward(self, *args, **kwargs)

    script.wuerstchen.WuerstchenPrior.forward = recorded_prior_forward


@pytest.mark.parametrize(
    "step", [2, pytest.param(5, marks=pytest.mark.slow)], ids=["within an epoch", "at an epoch's end"]
)
def test_a_resumed_run_over_a_cache_has_the_same_bits_and_encodes_nothing(
    recorded_train, train, tmp_path_factory, tmp_path, step
):
    cache = tmp_path_factory.getbasetemp() / "cache-of-resumed"
    flags = LISTS | {"cache_latents": True, "cache_dir": cache}
    run = train(**flags)
    assert run.returncode == 0, run

    received = []

    def recorded_once(**flags):
        done, encoded = recorded_train(**flags)
        received.append(encoded)
        return done

    again = resumed(recorded_once, run, step, tmp_path, **flags, dataloader_num_workers=2 * (step == 5))
    assert received[0].all("images") == []
    assert len(again.record["steps"]) == 3 * (7 - step)
    for name in ("image_embeds", "prompt_embeds", "noise", "timesteps"):
        assert torch.equal(again.all(name), run.all(name)[6 * step :]), name
    assert_continues_as(again, run, step, 7)


@pytest.mark.slow
@pytest.mark.slow
def test_worker_processes_change_no_bit_of_the_cache(recorded_train, tmp_path):
    flags = FOUR_SHARDS | {"cache_latents": True}
    runs = []
    for workers in (0, 2):
        settings = {"dataloader_num_workers": workers, "cache_dir": tmp_path / f"of-{workers}"}
        run, encoded = recorded_train(patch=small_shards, **flags, **settings)
        assert run.returncode == 0, run
        assert [len(batch) for batch in encoded.batches("images")] == [8] * 8
        runs.append(run)
    assert torch.equal(runs[0].all("image_embeds"), runs[1].all("image_embeds"))
    assert same_weights(runs[0].prior(), runs[1].prior())


@pytest.mark.parametrize("flag", ["random_crop", "random_flip"])
def test_augmentation_flags_are_rejected_with_a_cache(capsys, flag):
    with pytest.raises(SystemExit) as rejected:
        script.parse_args(["--train_data_dir=images", "--cache_latents", f"--{flag}"])
    assert rejected.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--{flag}" in line and "--cache_latents" in line


def test_any_augmentation_of_ones_own_is_rejected_with_a_cache(capsys, monkeypatch):
    flags = ["--train_data_dir=images", "--cache_latents"]
    assert script.parse_args(flags).cache_latents
    monkeypatch.setattr(script, "make_augmentations", lambda args, size: [transforms.ColorJitter(hue=0.1)])
    assert not script.parse_args(flags[:1]).cache_latents
    with pytest.raises(SystemExit) as rejected:
        script.parse_args(flags)
    assert rejected.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "make_augmentations" in line and "--cache_latents" in line


# -------------------------------------------------------------------------------- when the cache is made anew


@pytest.fixture(scope="module")
def table(pictures, tmp_path_factory):
    """A folder with one Parquet file of eight rows, with two columns of images and two of captions."""
    folder = tmp_path_factory.mktemp("table")
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()[:8]]
    files = [{"bytes": (pictures / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
    columns = {
        "image": files,
        "other_image": files[::-1],
        "text": [row["text"] for row in rows],
        "captions": [row["captions"] for row in rows],
    }
    features = datasets.Dataset.from_dict(columns).features
    features |= {"image": datasets.Image(), "other_image": datasets.Image()}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    dataset.to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def other_models(models, tmp_path_factory):
    """Copies of the tiny models, and models that differ from them by very little."""
    folder = tmp_path_factory.mktemp("others")
    for name in ("same-encoder", "encoder"):
        shutil.copytree(models / "encoder", folder / name)
    for name in ("same-prior", "weights", "tokenizer", "activation"):
        shutil.copytree(models / "prior", folder / name)
    change_weight(folder / "encoder" / "diffusion_pytorch_model.safetensors", "mapper.1.bias")
    change_weight(folder / "weights" / "text_encoder" / "model.safetensors", "final_layer_norm.bias")
    change_config(folder / "tokenizer" / "tokenizer" / "tokenizer_config.json", model_max_length=60)
    change_config(folder / "activation" / "text_encoder" / "config.json", hidden_act="gelu")
    return folder


def change_weight(file, name):
    """Changes one number of the tensor whose name ends so."""
    tensors = load_file(file)
    (name,) = [full_name for full_name in tensors if full_name.endswith(name)]
    tensors[name][0] += 1e-3
    save_file(tensors, file, {"format": "pt"})


def change_config(file, **settings):
    config = json.loads(file.read_text())
    assert all(config.get(name, "quick_gelu") != value for name, value in settings.items())
    file.write_text(json.dumps(config | settings))


@pytest.fixture(scope="module")
def filled_cache(run_main, models, table, tmp_path_factory):
    """A cache_dir that holds the encoded rows of `table`."""
    folder = tmp_path_factory.mktemp("cache")
    run = run_main(tiny_args(models, table, tmp_path_factory.mktemp("out"), **ONE_STEP, cache_dir=folder))
    assert run.returncode == 0, run
    return folder


def change_source(name):
    """Changes what inspect.getsource returns for a function, as an edit of it does."""
    getsource = inspect.getsource
    inspect.getsource = lambda function: (
        getsource(function) + ("# edited" if getattr(function, "__name__", "") == name else "")
    )


ENCODER, PRIOR = "pretrained_image_encoder_name_or_path", "pretrained_prior_model_name_or_path"


@pytest.mark.parametrize(
    "flags",
    [
        {"resolution": 96},
        {"mixed_precision": "bf16"},
        {"caption_column": "captions"},
        {"image_column": "other_image"},
        pytest.param({"max_train_samples": 7}, marks=pytest.mark.slow),
        {ENCODER: "encoder"},
        {PRIOR: "weights"},
        {PRIOR: "activation"},
        {PRIOR: "tokenizer"},
        *({"patch": partial(change_source, name)} for name in KEYED_FUNCTIONS[:2]),
        *(
            pytest.param({"patch": partial(change_source, name)}, marks=pytest.mark.slow)
            for name in KEYED_FUNCTIONS[2:]
        ),
    ],
    ids=lambda flags: flags["patch"].args[0] if "patch" in flags else "=".join(map(str, *flags.items())),
)
def test_what_the_cache_depends_on_makes_it_anew(recorded_train, table, filled_cache, other_models, flags):
    models = {name: other_models / flags[name] for name in (ENCODER, PRIOR) if name in flags}
    settings = ONE_STEP | {"train_data_dir": table, "cache_dir": filled_cache} | flags | models
    run, encoded = recorded_train(**settings)
    assert run.returncode == 0, run
    assert len(encoded.all("images")) == flags.get("max_train_samples", 8)


@pytest.mark.parametrize(
    "flags",
    [
        {
            "seed": 5,
            "train_batch_size": 3,
            "caption_dropout": 0.5,
            "validation_split": 2,
            "skip_bad_rows": True,
        },
        {ENCODER: "same-encoder", PRIOR: "same-prior"},
    ],
    ids=["another plan", "models moved"],
)
def test_what_the_cache_does_not_depend_on_encodes_nothing(
    recorded_train, table, filled_cache, other_models, flags
):
    before = {path: path.stat().st_mtime_ns for path in cache_files(filled_cache)}
    models = {name: other_models / flags[name] for name in (ENCODER, PRIOR) if name in flags}
    settings = ONE_STEP | {"train_data_dir": table, "cache_dir": filled_cache} | flags | models
    run, encoded = recorded_train(**settings)
    assert run.returncode == 0, run
    assert encoded.all("images") == []
    assert [len(batch) for batch in encoded.batches("texts")] == [1], "the empty caption"
    assert before and before == {path: path.stat().st_mtime_ns for path in cache_files(filled_cache)}
    bars = [line for line in run.output.replace("\r", "\n").splitlines() if "Encoding" in line]
    assert "100%" in bars[-1]


@pytest.mark.slow
def test_a_changed_image_or_caption_is_encoded_anew(recorded_train, pictures, tmp_path):
    folder = tmp_path / "images"
    rows = copy_images(pictures, folder, 6)
    flags = ONE_STEP | {"train_data_dir": folder, "cache_dir": tmp_path / "cache"}

    def run_once():
        run, encoded = recorded_train(**flags)
        assert run.returncode == 0, run
        return encoded

    first = run_once()
    assert len(first.all("images")) == 6
    assert run_once().all("images") == []

    name = folder / rows[2]["file_name"]
    Image.open(name).convert("RGB").transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(name)
    second = run_once()
    assert second.all("images") == image_digests(folder) != first.all("images")

    rows[4]["text"] = "something else"
    write_rows(folder, rows)
    third = run_once()
    assert len(set(third.all("texts")) - set(second.all("texts"))) == 1
    assert run_once().all("images") == []


def test_the_order_of_the_columns_is_the_same_in_every_process(monkeypatch, tmp_path):
    """It is part of the key. The order of a set of names would differ between processes, and so between
    ranks."""
    # Twelve pairs: that all are in order by chance happens once in 4096 times.
    pairs = [(f"image-{number}", f"text-{number}") for number in range(12)]
    columns = {name: [{"bytes": b"", "path": ""}] for name, _ in pairs} | {name: ["a"] for _, name in pairs}
    rows = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(script, "load_splits", lambda *args, **kwargs: {"train": rows})
    for image, text in pairs:
        flags = [f"--train_data_dir={tmp_path}", f"--image_column={image}", f"--caption_column={text}"]
        assert script.load_train_dataset(script.parse_args(flags)).column_names == [image, text]


def edited_source(name):
    """The script's source with a comment at the end of a function."""
    lines = SCRIPT.read_text().splitlines()
    (function,) = (
        node
        for node in ast.parse(SCRIPT.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    lines[function.end_lineno - 1] += "  # edited"
    return "\n".join(lines) + "\n"


def load_script(folder, source, module_name, monkeypatch):
    """The namespace of a script with this source, imported or, with the name `__main__`, run without flags,
    which ends in the argument parser."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SCRIPT.name
    file.write_text(source)
    module = types.ModuleType(module_name)
    module.__file__ = str(file)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module_name, module)
        patch.setattr(sys, "argv", [str(file)])
        try:
            exec(compile(source, file, "exec"), vars(module))
        except SystemExit:
            assert module_name == "__main__"
        else:
            assert module_name != "__main__"
    return module


def test_an_edit_of_a_listed_function_changes_the_key_whether_the_script_is_main_or_imported(
    tmp_path, monkeypatch, capsys
):
    called = [getattr(script, name, None) for name in script.cache_key.__code__.co_names]
    listed = {function.__name__ for function in called if inspect.isfunction(function)} - {
        "hash_model",
        "hash_rows",
    }
    assert listed == set(KEYED_FUNCTIONS)

    model = torch.nn.Linear(1, 1)
    model.dtype = torch.float32
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: "vocabulary"))
    rows = SimpleNamespace(_fingerprint="rows")
    args = script.parse_args(["--train_data_dir=images"])
    keys = {}
    for name in ("", *KEYED_FUNCTIONS, "choose_caption"):
        for module_name in ("__main__", script.__name__):
            source = edited_source(name) if name else SCRIPT.read_text()
            module = load_script(tmp_path / f"{name}-{module_name}", source, module_name, monkeypatch)
            assert module.cache_key is not script.cache_key
            module.hash_rows = lambda dataset, args: "rows"
            dataset = module.SizedRows(rows, [(64, 64)], np.zeros(5, np.int64))
            keys[name, module_name] = module.cache_key(dataset, args, tokenizer, model, model)
    assert all(keys[name, "__main__"] == keys[name, script.__name__] for name, _ in keys)
    assert keys["choose_caption", "__main__"] == keys["", "__main__"], "its edits make the cache not anew"
    assert len({keys[name, "__main__"] for name in ("", *KEYED_FUNCTIONS)}) == 1 + len(KEYED_FUNCTIONS)


@pytest.mark.slow
def test_a_fresh_process_finds_the_cache_of_another(run_script, recorded_train, models, table, tmp_path):
    """Nothing in the key may depend on the process, such as the order of a set, the address of an object or
    whether the script is `__main__` or imported."""
    found = []
    for number, seed in enumerate(("1", "2")):
        args = tiny_args(models, table, tmp_path / f"out-{number}", **ONE_STEP, cache_dir=tmp_path / "cache")
        run = run_script(args, PYTHONHASHSEED=seed)
        assert run.returncode == 0, run.stderr
        found.append({path: path.stat().st_mtime_ns for path in cache_files(tmp_path / "cache")})
    assert found[0] == found[1] and len(found[0]) == 1
    run, encoded = recorded_train(**ONE_STEP, train_data_dir=table, cache_dir=tmp_path / "cache")
    assert run.returncode == 0, run
    assert encoded.all("images") == []


# ------------------------------------------------------------------------------- passes that were interrupted


@pytest.fixture
def uninterrupted_run(train, tmp_path_factory):
    """A run over a cache of four shards that was made in one go."""
    cache = tmp_path_factory.getbasetemp() / "cache-in-one-go"
    run = train(small_shards, **FOUR_SHARDS, cache_latents=True, cache_dir=cache)
    assert run.returncode == 0, run
    return run


def assert_completed(recorded_train, uninterrupted_run, pictures, cache, missing):
    """Another run encodes only the missing rows, leaves no temporary file, and has the same bits as the
    uninterrupted one."""
    run, encoded = recorded_train(patch=small_shards, **FOUR_SHARDS, cache_latents=True, cache_dir=cache)
    assert run.returncode == 0, run
    assert encoded.all("images") == image_digests(pictures)[missing]
    assert list(cache.rglob("*.partial")) == []
    for name in ("image_embeds", "prompt_embeds"):
        assert torch.equal(run.all(name), uninterrupted_run.all(name))
    assert same_weights(run.prior(), uninterrupted_run.prior())


def kill_in_third_shard(batches):
    if batches == 6:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_at_third_rename():
    small_shards()
    replace, replaced = Path.replace, []

    def killing_replace(self, target):
        if self.suffix == ".partial":
            replaced.append(self)
            if len(replaced) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = killing_replace


@pytest.mark.parametrize(
    ("on_batch", "patch"),
    [
        pytest.param(kill_in_third_shard, small_shards, marks=pytest.mark.slow),
        (None, kill_at_third_rename),
    ],
    ids=["inside a shard", "before its rename"],
)
def test_a_killed_pass_continues_at_the_missing_shard(
    recorded_train, uninterrupted_run, pictures, tmp_path, on_batch, patch
):
    killed, encoded = recorded_train(on_batch, patch, **FOUR_SHARDS, cache_latents=True, cache_dir=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed
    assert len(encoded.all("images")) == 48
    assert_completed(recorded_train, uninterrupted_run, pictures, tmp_path, slice(32, 64))


def fill_disk_in_third_shard(batches):
    if batches == 5:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def lift_limit_after_the_pass():
    """So that the record of the run can be written."""
    small_shards()
    before, cache_latents = resource.getrlimit(resource.RLIMIT_FSIZE), script.cache_latents

    def cache_then_lift(*args, **kwargs):
        try:
            return cache_latents(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    script.cache_latents = cache_then_lift


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_with_space_the_pass_continues(
    recorded_train, uninterrupted_run, pictures, tmp_path
):
    full, _ = recorded_train(
        fill_disk_in_third_shard,
        lift_limit_after_the_pass,
        **FOUR_SHARDS,
        cache_latents=True,
        cache_dir=tmp_path / "cache",
    )
    assert full.returncode == 1, full
    assert "Traceback" not in full.output
    line = full.output.splitlines()[-1]
    assert "--cache_dir" in line and str(tmp_path / "cache") in line and "File too large" in line, full
    assert not (full.folder / "prior_pipeline").exists()
    assert_completed(recorded_train, uninterrupted_run, pictures, tmp_path / "cache", slice(32, 64))


@pytest.mark.slow
def test_two_runs_at_the_same_time_share_one_pass(run_patched, tmp_path):
    folder = tmp_path / "encoded"
    folder.mkdir()
    flags = ONE_STEP | {"cache_dir": tmp_path / "cache", "max_train_samples": 16}
    runs = {}

    def start(number):
        runs[number] = run_patched(
            partial(record_encoders, folder), output_dir=tmp_path / f"out-{number}", **flags
        )

    threads = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [runs[number].returncode for number in range(2)] == [0, 0], runs
    assert len(Encoded(folder).all("images")) == 16


# -------------------------------------------------------------------------------------------------- two ranks


@pytest.mark.slow
def test_two_ranks_share_the_shards_and_train_as_without_the_cache(
    train_ranks, recorded_train, pictures, tmp_path
):
    flags = {"train_batch_size": 4, "max_train_steps": 4, "learning_rate": 1e-3}
    folder = tmp_path / "encoded"
    folder.mkdir()
    patch = partial(call_both, partial(record_encoders, folder), small_shards)
    cached = train_ranks(patch, **flags, cache_latents=True, cache_dir=tmp_path / "cache")
    plain = train_ranks(**flags)
    assert all(run.returncode == 0 for run in (*cached, *plain)), (cached, plain)
    encoded = Encoded(folder)
    assert sorted(encoded.all("images")) == sorted(image_digests(pictures)), "each once"
    shares = [
        sum(len(digests) for kind, digests in process if kind == "images") for process in encoded.processes
    ]
    assert shares == [32, 32]
    assert ["Encoding" in run.output for run in cached] == [True, False]

    for one, other in zip(cached, plain, strict=True):
        assert torch.equal(one.all("noise"), other.all("noise"))
        for name in ("image_embeds", "prompt_embeds"):
            assert relative_difference(one, other, name) < 1e-5, name
    assert cached[0].logged("train_loss") == pytest.approx(plain[0].logged("train_loss"), rel=1e-5)

    alone, encoded = recorded_train(
        patch=small_shards, **flags, cache_latents=True, cache_dir=tmp_path / "cache"
    )
    assert alone.returncode == 0, alone
    assert encoded.all("images") == [], "one rank finds what two have made"


# --------------------------------------------------------------------------------------------------- bad rows


@pytest.fixture(scope="module")
def broken_images(pictures, tmp_path_factory):
    """A folder of ten rows, of which rows 3 and 7 have truncated images; and the name of row 3's file."""
    folder = tmp_path_factory.mktemp("broken") / "images"
    rows = copy_images(pictures, folder)
    for row in (3, 7):
        os.truncate(folder / rows[row]["file_name"], 900)
    write_rows(folder, rows)
    return folder, rows[3]["file_name"]


def assert_names_row_3(run, file):
    assert run.returncode == 1, run
    assert "Traceback" not in run.output
    line = run.output.splitlines()[-1]
    for words in ("row 3", file, "cannot be read: OSError", "--skip_bad_rows"):
        assert words in line, run


@pytest.mark.parametrize(
    ("workers", "batch_size", "shard_size"), [(0, 2, 10), (2, 2, 2)], ids=["second batch", "second shard"]
)
def test_a_bad_row_ends_the_pass_in_one_line(train, broken_images, tmp_path, workers, batch_size, shard_size):
    folder, file = broken_images
    flags = ONE_STEP | {"train_data_dir": folder, "cache_dir": tmp_path, "dataloader_num_workers": workers}
    assert_names_row_3(train(partial(set_sizes, batch_size, shard_size), **flags), file)
    assert len(cache_files(tmp_path)) == (shard_size == 2), "the first shard was complete"


def skipped_lines(run):
    return sorted(line.split("Skipped ")[1] for line in run.output.splitlines() if "Skipped " in line)


@pytest.mark.slow
def test_bad_rows_are_skipped_as_without_the_cache(train, broken_images, tmp_path):
    folder, file = broken_images
    flags = {"train_data_dir": folder, "max_train_steps": 8, "skip_bad_rows": True}
    plain = train(**flags)
    cached = train(partial(set_sizes, 1, 10), **flags, cache_latents=True, cache_dir=tmp_path)
    assert plain.returncode == cached.returncode == 0, (plain, cached)
    names = skipped_lines(cached)
    assert names == skipped_lines(plain) and len(names) == 2
    assert names[0].startswith("row 3 ") and file in names[0]
    assert names[1].startswith("row 7 ")
    assert sorted(line[-10:] for line in names) == ["(1 so far)", "(2 so far)"]
    for name in ("image_embeds", "prompt_embeds"):
        assert relative_difference(cached, plain, name) < 1e-5, "other rows replaced them"
    assert cached.logged("train_loss") == pytest.approx(plain.logged("train_loss"), rel=1e-5)

    again = train(**flags | {"skip_bad_rows": False}, cache_latents=True, cache_dir=tmp_path)
    assert_names_row_3(again, file)


def fail_in_two_lines(file):
    """Makes the decoder of images raise an error of two lines for this file."""
    find_image_file = script.find_image_file

    def failing(path, folders):
        if Path(path).name == file:
            raise OSError("bad marker\nat byte 7")
        return find_image_file(path, folders)

    script.find_image_file = failing


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip", [False, True], ids=["stopped", "skipped"])
def test_an_error_of_several_lines_names_row_and_file(train, pictures, tmp_path, workers, skip):
    folder = tmp_path / "images"
    file = copy_images(pictures, folder, 6)[3]["file_name"]
    run = train(
        partial(fail_in_two_lines, file),
        **ONE_STEP | {"max_train_steps": 3},
        train_data_dir=folder,
        cache_dir=tmp_path / "cache",
        dataloader_num_workers=workers,
        skip_bad_rows=skip,
    )
    assert run.returncode == (0 if skip else 1), run
    assert "Traceback" not in run.output
    (line,) = (line for line in run.output.splitlines() if "row 3" in line)
    assert f"/{file}) cannot be read: OSError: bad marker" in line, run
    if skip:
        assert "Skipped row 3 of the 6 used: " in line
    else:
        assert run.output.rstrip().endswith("--skip_bad_rows")


def break_transforms():
    """An error in the script itself, as after a wrong edit."""

    def raise_error(image):
        raise RuntimeError("wrong edit")

    script.make_image_transforms = lambda size, augmentations=(): raise_error


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_reason_of_any_other_error_in_the_pass_is_shown(train, tmp_path, workers):
    flags = ONE_STEP | {"skip_bad_rows": True, "dataloader_num_workers": workers, "cache_dir": tmp_path}
    run = train(break_transforms, **flags)
    assert run.returncode == 1, run
    assert "RuntimeError" in run.output and "wrong edit" in run.output, run


def kill_worker():
    """Makes the worker process that decodes an image end, as the kernel does when memory is short."""

    def killed(path, folders):
        assert torch.utils.data.get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    script.find_image_file = killed


def test_a_worker_killed_in_the_pass_is_one_line_that_names_the_flag(train, tmp_path):
    run = train(kill_worker, **ONE_STEP, dataloader_num_workers=1, cache_dir=tmp_path)
    assert run.returncode == 1, run
    assert "Traceback" not in run.output
    line = run.output.splitlines()[-1]
    assert "--dataloader_num_workers=1: DataLoader worker (pid" in line, run


def test_a_row_that_was_fixed_is_used(recorded_train, pictures, tmp_path):
    folder = tmp_path / "images"
    rows = copy_images(pictures, folder, 6)
    os.truncate(folder / rows[3]["file_name"], 900)
    flags = ONE_STEP | {"train_data_dir": folder, "cache_dir": tmp_path / "cache"}
    run, encoded = recorded_train(**flags, skip_bad_rows=True)
    assert run.returncode == 0 and len(encoded.all("images")) == 5, run
    shutil.copy(pictures / rows[3]["file_name"], folder)
    run, encoded = recorded_train(**flags)
    assert run.returncode == 0 and encoded.all("images") == image_digests(folder), run


# --------------------------------------------------------------------------------------------- very many rows


ONE_RANK = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)


def cache_rows(rows, folder, accelerator=ONE_RANK):
    args = script.parse_args([f"--train_data_dir={folder}", f"--cache_dir={folder}", "--resolution=64"])
    rows = script.choose_sizes(rows, args, rows_hash="")
    return script.cache_latents(accelerator, rows, args, None, None, None).dataset


@pytest.fixture
def cache_numbers(tmp_path, monkeypatch):
    """cache_numbers(count): a cache in which row n has latents (16, 2, 2) of n, and two captions' embeddings
    (77, 4) of n and -n."""

    def tokenize(captions, tokenizer):
        return {"text_input_ids": torch.tensor([float(caption) for caption in captions])}

    def embed_images(numbers, image_encoder):
        return numbers.float().view(-1, 1, 1, 1).expand(-1, 16, 2, 2)

    def embed_captions(tokens, text_encoder):
        return tokens["text_input_ids"].view(-1, 1, 1).expand(-1, 77, 4)

    monkeypatch.setattr(script, "cache_key", lambda *_: "key")
    monkeypatch.setattr(script, "load_image", lambda number, folders: torch.tensor(number))
    monkeypatch.setattr(script, "make_image_transforms", lambda size: lambda image: image)
    monkeypatch.setattr(script, "tokenize_captions", tokenize)
    monkeypatch.setattr(script, "embed_images", embed_images)
    monkeypatch.setattr(script, "embed_captions", embed_captions)

    def cache(count):
        captions = [[f"{number}", f"-{number}"] for number in range(count)]
        rows = datasets.Dataset.from_dict({"image": list(range(count)), "text": captions})
        return cache_rows(rows, tmp_path)

    return cache


def tables(table):
    if isinstance(table, ConcatenationTable):
        return [block for row in table.blocks for block in row]
    return [table]


def test_cached_rows_are_memory_mapped_and_not_held_in_memory(cache_numbers, monkeypatch):
    monkeypatch.setattr(script, "CACHE_SHARD_SIZE", 100)
    rows = cache_numbers(1050)
    assert len(rows) == 1050 and len(rows.cache_files) == 11
    train_rows, _ = script.split_held_out(1050, 50, seed=0)
    for cached in (rows, rows.select(train_rows, keep_in_memory=True)):
        assert {type(block) for block in tables(cached.data)} == {MemoryMappedTable}
    before = pyarrow.total_allocated_bytes()
    for number in (1049, 0, 730, 99, 100):
        row = rows[number]
        latents = torch.frombuffer(bytearray(row["latents"]), dtype=torch.float32)
        assert latents.unique().tolist() == [number] and len(latents) == 64
        signs = [
            torch.frombuffer(bytearray(text), dtype=torch.float32).unique().item()
            for text in row["prompt_embeds"]
        ]
        assert signs == [number, -number]
    assert pyarrow.total_allocated_bytes() - before < 10_000


def test_a_pass_holds_few_rows_in_memory(cache_numbers):
    """By default `datasets` writes after every 1,000 rows: 1 GB with five captions each, and as much again
    for a copy."""
    rows = cache_numbers(1050)
    assert max(len(batch) for batch in rows.data.to_batches()) <= 100


def test_a_sample_reads_one_row_however_many_there_are(cache_numbers, monkeypatch):
    """A million rows: a hundred of them, mapped ten thousand times."""
    monkeypatch.setattr(script, "CACHE_SHARD_SIZE", 50)
    hundred = cache_numbers(100)
    read_row, read = type(hundred).__getitem__, []

    class Million:
        def __len__(self):
            return 1_000_000

        def __getitem__(self, row):
            read.append(row)
            return read_row(hundred, row % 100)

    preprocess = partial(script.preprocess_cached, empty_embeds=torch.zeros(77, 4), caption_dropout=0.0)
    samples = Samples(Million(), preprocess, seed=0, skip_bad_rows=False)
    plan = script.SamplePlan(
        seed=0,
        num_rows=1_000_000,
        rows_hash="",
        num_processes=2,
        train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    for first in (0, 10, 700_000):  # resuming at the last is no more work than beginning
        read.clear()
        positions = next(plan.train_batches(1, first, 800_000))
        batch = script.collate_fn([samples[position] for position in positions])
        assert read == batch["rows"]
        assert positions == range(first * 16 + 4, first * 16 + 8)
        assert batch["latents"][:, 0, 0, 0].tolist() == [row % 100 for row in read]
        assert batch["prompt_embeds"].shape == (4, 77, 4)
        assert batch["prompt_embeds"][:, 0, 0].abs().tolist() == [row % 100 for row in read]


@pytest.mark.parametrize("count", [1, 2048, 2049, 100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("ranks", [1, 3])
def test_all_rows_are_in_few_shards_that_the_ranks_share(tmp_path, monkeypatch, count, ranks):
    """Every shard stays open, and a process may open only about a thousand files."""
    made, shares = [], []

    class Rows:
        def __len__(self):
            return count

        def select(self, shard, keep_in_memory):
            return shard

    monkeypatch.setattr(script, "cache_key", lambda *_: "key")
    monkeypatch.setattr(script, "RowDataset", lambda rows, args: rows.dataset)
    monkeypatch.setattr(script, "DataLoader", lambda rows, **_: rows)
    monkeypatch.setattr(script, "encode_rows", lambda rows, first_row, *_: (rows, first_row))
    monkeypatch.setattr(script, "load_shard", lambda file, rows: rows if (rows, rows.start) in made else None)
    monkeypatch.setattr(script, "write_shard", lambda file, encoded: made.append(encoded))
    monkeypatch.setattr(datasets, "concatenate_datasets", list)
    monkeypatch.setattr(script, "count_separate_ranks", lambda *_: 0)
    monkeypatch.setattr(script, "wait_for_slow_ranks", lambda _: shares.append([shard for shard, _ in made]))
    for rank in range(ranks):
        made.clear()
        accelerator = SimpleNamespace(**vars(ONE_RANK) | {"process_index": rank, "num_processes": ranks})
        shards = cache_rows(Rows(), tmp_path, accelerator)
        assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards[:-1])]
        assert shards[-1].stop == count
        assert len(shards) <= 256
    assert sorted((shard for share in shares for shard in share), key=lambda shard: shard.start) == shards
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
