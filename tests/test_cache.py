# SPDX-License-Identifier: Apache-2.0
"""What --cache_latents keeps on disk, when it is made anew, and that training on it is training without it."""

import gc
import hashlib
import inspect
import json
import os
import resource
import shutil
import signal
import threading
import weakref
from functools import partial
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
import test_training
import torch
from conftest import tiny_args
from datasets.table import ConcatenationTable, MemoryMappedTable
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training import assert_goes_on_as, resumed, same
from tiny_models import DECODER_TEXT_WIDTH, read_pictures
from transformers import CLIPTextModel, CLIPTokenizerFast

import modeling_efficient_net_encoder as encoding
import train_text_to_image_prior as script

finished_runs, train, train_ranks = test_training.finished_runs, test_training.train, test_training.train_ranks

# Ten rows of two captions each; epochs end inside updates 2, 4 and 7 and with update 5. 72 pixels make 3 x 3 latents.
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
PIECES = {"max_train_steps": 8, "train_batch_size": 8, "checkpointing_steps": 8, "learning_rate": 1e-3}


# -------------------------------------------------------------------------- what is watched in the forked child


def watch_encoders(folder, then=None):
    """Notes each batch that an encoder is given in a file of `folder`, one a process. `then` is called after it, with
    how many batches of pictures there have been."""
    with_pictures, with_text = encoding.EfficientNetEncoder.forward, CLIPTextModel.forward
    batches = []

    def note(kind, samples):
        digests = [hashlib.sha256(sample.numpy().tobytes()).hexdigest() for sample in samples]
        with open(folder / f"{os.getpid()}.jsonl", "a") as file:
            print(json.dumps([kind, digests]), file=file)

    def encode_pictures(self, pixels):
        note("pictures", pixels.float())
        batches.append(len(pixels))
        if then is not None:
            then(len(batches))
        return with_pictures(self, pixels)

    def encode_text(self, input_ids, *args, **kwargs):
        note("texts", input_ids)
        return with_text(self, input_ids, *args, **kwargs)

    encoding.EfficientNetEncoder.forward, CLIPTextModel.forward = encode_pictures, encode_text


class Encoded:
    """What the encoders of all processes were given, batch by batch, as digests."""

    def __init__(self, folder):
        self.processes = [
            [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(folder.glob("*.jsonl"))
        ]

    def batches(self, kind):
        return [digests for process in self.processes for what, digests in process if what == kind]

    def all(self, kind):
        return [digest for batch in self.batches(kind) for digest in batch]


@pytest.fixture
def watched_train(train, tmp_path_factory):
    """watched_train(then=None, meddle=None, **flags): a Run, and what its encoders were given."""

    def run(then=None, meddle=None, **flags):
        folder = tmp_path_factory.mktemp("encoded")
        done = train(partial(both, partial(watch_encoders, folder, then), meddle), **flags)
        return done, Encoded(folder)

    return run


@pytest.fixture
def run_meddled(run_main, models, pictures, monkeypatch):
    """run_meddled(meddle, **flags): a run in a child that has called `meddle`, and whose models nobody holds on to."""
    main = script.main

    def run(meddle, output_dir, **flags):
        def meddled(argv):
            meddle()
            main(argv)

        monkeypatch.setattr(script, "main", meddled)
        return run_main(tiny_args(models, pictures, output_dir, **flags))

    return run


def both(first, second):
    first()
    if second is not None:
        second()


def set_sizes(batch, piece):
    encoding.ENCODING_BATCH, encoding.ENCODING_PIECE = batch, piece


small_pieces = partial(set_sizes, 8, 16)


def pixels_of(folder, resolution=64):
    """The digests, as in Encoded, of a folder's pictures in the order of their names."""
    return [hashlib.sha256(picture.numpy().tobytes()).hexdigest() for picture in read_pictures(folder, resolution)]


def some_pictures(pictures, folder, count=10):
    """A copy of the first pictures, with their rows."""
    folder.mkdir()
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()[:count]]
    for row in rows:
        shutil.copy(pictures / row["file_name"], folder)
    write_rows(folder, rows)
    return rows


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def largest(run, other, name):
    """The largest difference in what a tensor was in two runs, as a share of its largest value."""
    one, two = run.all(name).double(), other.all(name).double()
    return ((one - two).abs().max() / two.abs().max()).item()


# ------------------------------------------------------------------------------- training as without the cache


@pytest.mark.parametrize(("precision", "rounding"), [("no", 1e-5), ("bf16", 2**-6)])
def test_every_step_is_that_of_the_uncached_run(train, tmp_path, precision, rounding):
    """With lists of captions, dropout of captions, accumulation and held-out rows."""
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
    # At the first update, when the weights are the same.
    for name in ("image_embeds", "prompt_embeds"):
        assert largest(cached, plain, name) < rounding, name
    for tag in ("train_loss", "grad_norm", "val_loss"):
        expected, got = plain.logged(tag), cached.logged(tag)
        assert expected.keys() == got.keys() and len(expected) >= 3
        print(tag, max(abs(got[update] / expected[update] - 1) for update in expected))
        assert got == pytest.approx(expected, rel=10 * rounding if tag == "grad_norm" else rounding)
    assert plain.logged("lr") == cached.logged("lr")

    texts = [tuple(ids.tolist()) for ids in plain.all("ids")]
    assert 12 < len(set(texts)) <= 17, "both captions of most of the eight rows were drawn, and the empty one"
    empty = [place for place, ids in enumerate(texts) if ids[0] + 1 == ids[1]]  # start and end of text, without any
    assert 3 < len(empty) < 24
    assert len({cached.all("prompt_embeds")[place].float().numpy().tobytes() for place in empty}) == 1


def test_what_lies_on_disk_is_the_raw_output_of_both_encoders(train, models, pictures, tmp_path):
    run = train(**LISTS | {"max_train_samples": None, "max_train_steps": 1}, cache_latents=True, cache_dir=tmp_path)
    assert run.returncode == 0, run
    (file,) = {path for path in tmp_path.rglob("*.arrow") if "latents" in datasets.Dataset.from_file(str(path))[0]}
    kept = datasets.Dataset.from_file(str(file))
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    assert len(kept) == len(rows) == 64

    image_encoder = encoding.EfficientNetEncoder.from_pretrained(models / "encoder").eval()
    text_encoder = CLIPTextModel.from_pretrained(models / "prior" / "text_encoder", attn_implementation="eager").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(models / "prior" / "tokenizer")
    pixels = read_pictures(pictures, 72)
    apart = []
    with torch.no_grad():
        for row, picture, entry in zip(rows, pixels, kept, strict=True):
            features = image_encoder.mapper(image_encoder.backbone(picture[None]))
            latents = torch.frombuffer(bytearray(entry["latents"]), dtype=torch.float32).view(1, 16, 3, 3)
            apart.append((latents - features).abs().max().item())
            assert len(entry["prompt_embeds"]) == len(row["captions"]) == 2
            for caption, value in zip(row["captions"], entry["prompt_embeds"], strict=True):
                tokens = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt")
                expected = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
                embeds = torch.frombuffer(bytearray(value), dtype=torch.float32).view(1, 77, 32)
                assert torch.allclose(embeds, expected, atol=1e-5)
    assert max(apart) < 1e-4 * 42, "not scaled: the latents' deviation is 42"
    assert not any(entry["problem"] for entry in kept)


def test_pictures_and_captions_are_encoded_once_in_large_batches_under_a_progress_bar(
    watched_train, pictures, tmp_path
):
    flags = {"max_train_steps": 20, "caption_column": "captions", "cache_latents": True, "cache_dir": tmp_path}
    run, encoded = watched_train(**flags)
    assert run.returncode == 0, run
    assert [len(batch) for batch in encoded.batches("pictures")] == [32, 32]
    assert sorted(encoded.all("pictures")) == sorted(pixels_of(pictures))
    assert sorted(map(len, encoded.batches("texts"))) == [1, 64, 64], "two captions a row, and the empty one"
    bars = [line for line in run.output.replace("\r", "\n").splitlines() if line.startswith("Encoding")]
    assert bars and bars[-1].startswith("Encoding: 100%") and "64/64" in bars[-1], run
    assert "Generating" not in "".join(bars) and "examples" not in run.output.split("Encoding", 1)[1]


def test_both_encoders_are_freed_before_training(run_meddled, tmp_path):
    alive = tmp_path / "alive.json"
    flags = {"max_train_steps": 1, "validation_prompts": ["a red apple"], "cache_dir": tmp_path / "cache"}
    for cached, expected in ((False, ["CLIPTextModel", "EfficientNetEncoder"]), (True, [])):
        run = run_meddled(partial(note_alive, alive), output_dir=tmp_path / f"{cached}", **flags, cache_latents=cached)
        assert run.returncode == 0, run
        assert json.loads(alive.read_text()) == expected


def note_alive(file):
    """Writes down which of the models that encoded something still exist when training begins."""
    gc.disable()  # on a device their memory must be free at once, not when Python looks for cycles
    models = {}
    for cls in (encoding.EfficientNetEncoder, CLIPTextModel):

        def noting(self, *args, forward=cls.forward, **kwargs):
            if getattr(self.config, "hidden_size", None) != DECODER_TEXT_WIDTH:
                models.setdefault(id(self), weakref.ref(self))
            return forward(self, *args, **kwargs)

        cls.forward = noting
    prior = script.wuerstchen.WuerstchenPrior.forward

    def train_prior(self, *args, **kwargs):
        if self.training:
            named = (type(model()).__name__ for model in models.values() if model() is not None)
            file.write_text(json.dumps(sorted(named)))
        return prior(self, *args, **kwargs)

    script.wuerstchen.WuerstchenPrior.forward = train_prior


@pytest.mark.parametrize("update", [2, 5], ids=["within an epoch", "at an epoch's edge"])
def test_a_resumed_run_ends_in_the_bits_of_the_unbroken_one_and_encodes_nothing(
    watched_train, train, tmp_path_factory, tmp_path, update
):
    cache = tmp_path_factory.getbasetemp() / "cache-of-resumed"
    flags = LISTS | {"cache_latents": True, "cache_dir": cache}
    run = train(**flags)
    assert run.returncode == 0, run

    encoded = []

    def again(**flags):
        done, given = watched_train(**flags)
        encoded.append(given)
        return done

    on = resumed(again, run, update, tmp_path, **flags, dataloader_num_workers=2 * (update == 5))
    assert encoded[0].all("pictures") == []
    assert len(on.record["steps"]) == 3 * (7 - update)
    for name in ("image_embeds", "prompt_embeds", "noise", "timesteps"):
        assert torch.equal(on.all(name), run.all(name)[6 * update :]), name
    assert_goes_on_as(on, run, update, 7)


@pytest.mark.slow
def test_the_reading_processes_change_no_bit(watched_train, tmp_path):
    flags = PIECES | {"cache_latents": True}
    runs = []
    for workers in (0, 2):
        settings = {"dataloader_num_workers": workers, "cache_dir": tmp_path / f"of-{workers}"}
        run, encoded = watched_train(meddle=small_pieces, **flags, **settings)
        assert run.returncode == 0, run
        assert [len(batch) for batch in encoded.batches("pictures")] == [8] * 8
        runs.append(run)
    assert torch.equal(runs[0].all("image_embeds"), runs[1].all("image_embeds"))
    assert same(runs[0].prior(), runs[1].prior())


@pytest.mark.parametrize("flag", ["random_crop", "random_flip"])
def test_what_makes_other_latents_each_time_is_refused(capsys, flag):
    with pytest.raises(SystemExit) as refused:
        script.parse_args(["--train_data_dir=pictures", "--cache_latents", f"--{flag}"])
    assert refused.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--{flag}" in line and "--cache_latents" in line


# ----------------------------------------------------------------------------------- when it is encoded anew


@pytest.fixture(scope="module")
def table(pictures, tmp_path_factory):
    """A folder with one Parquet file of eight rows and two columns each of pictures and of captions."""
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
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def others(models, tmp_path_factory):
    """Models that differ from the tiny ones by very little."""
    folder = tmp_path_factory.mktemp("others")
    for name in ("same-encoder", "encoder"):
        shutil.copytree(models / "encoder", folder / name)
    for name in ("same-prior", "weights", "tokenizer", "activation"):
        shutil.copytree(models / "prior", folder / name)
    nudge(folder / "encoder" / "diffusion_pytorch_model.safetensors", "mapper.1.bias")
    nudge(folder / "weights" / "text_encoder" / "model.safetensors", "final_layer_norm.bias")
    change(folder / "tokenizer" / "tokenizer" / "tokenizer_config.json", model_max_length=60)
    change(folder / "activation" / "text_encoder" / "config.json", hidden_act="gelu")
    return folder


def nudge(file, name):
    """Changes one number of the tensor whose name ends so."""
    tensors = load_file(file)
    (name,) = [full for full in tensors if full.endswith(name)]
    tensors[name][0] += 1e-3
    save_file(tensors, file, {"format": "pt"})


def change(file, **settings):
    config = json.loads(file.read_text())
    assert all(config.get(name, "quick_gelu") != value for name, value in settings.items())
    file.write_text(json.dumps(config | settings))


@pytest.fixture(scope="module")
def first_pass(run_main, models, table, tmp_path_factory):
    """A folder in which the table's pictures lie encoded."""
    folder = tmp_path_factory.mktemp("cache")
    run = run_main(tiny_args(models, table, tmp_path_factory.mktemp("out"), **ONE_STEP, cache_dir=folder))
    assert run.returncode == 0, run
    return folder


def change_source(name):
    """As if someone had edited a function."""
    read = inspect.getsource
    inspect.getsource = lambda what: read(what) + ("# edited" if getattr(what, "__name__", "") == name else "")


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
        {"meddle": partial(change_source, "read_row")},
        {"meddle": partial(change_source, "crop_square")},
        *(
            pytest.param({"meddle": partial(change_source, name)}, marks=pytest.mark.slow)
            for name in ("tokenize_captions", "embed_tokens", "check_captions", "decode_picture", "normalize_pixels")
        ),
    ],
    ids=lambda flags: flags["meddle"].args[0] if "meddle" in flags else "=".join(map(str, *flags.items())),
)
def test_what_another_cache_follows_from_is_encoded_anew(watched_train, table, first_pass, others, flags):
    models = {name: others / flags[name] for name in (ENCODER, PRIOR) if name in flags}
    run, encoded = watched_train(**ONE_STEP | {"train_data_dir": table, "cache_dir": first_pass} | flags | models)
    assert run.returncode == 0, run
    assert len(encoded.all("pictures")) == flags.get("max_train_samples", 8)


@pytest.mark.parametrize(
    "flags",
    [
        {"seed": 5, "train_batch_size": 3, "caption_dropout": 0.5, "validation_split": 2, "skip_bad_rows": True},
        {ENCODER: "same-encoder", PRIOR: "same-prior"},
    ],
    ids=["another plan", "models moved"],
)
def test_what_changes_nothing_in_it_encodes_nothing(watched_train, table, first_pass, others, flags):
    before = {path: path.stat().st_mtime_ns for path in first_pass.rglob("generator-*.arrow")}
    models = {name: others / flags[name] for name in (ENCODER, PRIOR) if name in flags}
    run, encoded = watched_train(**ONE_STEP | {"train_data_dir": table, "cache_dir": first_pass} | flags | models)
    assert run.returncode == 0, run
    assert encoded.all("pictures") == []
    assert [len(batch) for batch in encoded.batches("texts")] == [1], "the empty caption"
    assert before == {path: path.stat().st_mtime_ns for path in first_pass.rglob("generator-*.arrow")}
    assert "100%" in next(line for line in run.output.replace("\r", "\n").splitlines()[::-1] if "Encoding" in line)


def test_a_changed_picture_or_caption_is_encoded_anew(watched_train, pictures, tmp_path):
    folder = tmp_path / "pictures"
    rows = some_pictures(pictures, folder, 6)
    flags = ONE_STEP | {"train_data_dir": folder, "cache_dir": tmp_path / "cache"}

    def encoded():
        run, given = watched_train(**flags)
        assert run.returncode == 0, run
        return given

    first = encoded()
    assert len(first.all("pictures")) == 6
    assert encoded().all("pictures") == []

    name = folder / rows[2]["file_name"]
    Image.open(name).convert("RGB").transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(name)
    second = encoded()
    assert second.all("pictures") == pixels_of(folder) != first.all("pictures")

    rows[4]["text"] = "something else"
    write_rows(folder, rows)
    third = encoded()
    assert len(set(third.all("texts")) - set(second.all("texts"))) == 1
    assert encoded().all("pictures") == []


def test_the_key_does_not_hang_on_the_order_of_a_set(monkeypatch, tmp_path):
    """The order is another one in each process, and so on each rank, and that of the columns is part of the key."""
    pairs = [(f"image-{number}", f"text-{number}") for number in range(12)]  # by chance all are in order once in 4096
    columns = {name: [{"bytes": b"", "path": ""}] for name, _ in pairs} | {name: ["a"] for _, name in pairs}
    rows = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(encoding, "load_split", lambda *args, **kwargs: rows)
    for image, text in pairs:
        flags = [f"--train_data_dir={tmp_path}", f"--image_column={image}", f"--caption_column={text}"]
        assert script.load_train_dataset(script.parse_args(flags), seed=0).column_names == [image, text]


@pytest.mark.slow
def test_a_fresh_process_finds_what_another_encoded(run_script, models, table, tmp_path):
    """Nothing in the key may depend on the process, such as the order of a set or the address of an object."""
    kept = []
    for number, seed in enumerate(("1", "2")):
        args = tiny_args(models, table, tmp_path / f"out-{number}", **ONE_STEP, cache_dir=tmp_path / "cache")
        run = run_script(args, PYTHONHASHSEED=seed)
        assert run.returncode == 0, run.stderr
        kept.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("generator-*.arrow")})
    assert kept[0] == kept[1] and len(kept[0]) == 1


# --------------------------------------------------------------------------- passes that ended before their end


@pytest.fixture
def unbroken_pass(train, tmp_path_factory):
    """A run over a cache of four pieces that was made in one go."""
    cache = tmp_path_factory.getbasetemp() / "cache-in-one-go"
    run = train(small_pieces, **PIECES, cache_latents=True, cache_dir=cache)
    assert run.returncode == 0, run
    return run


def assert_completed(watched_train, unbroken_pass, pictures, cache, missing):
    """Another run encodes the missing rows alone, leaves nothing half-done, and is the unbroken run in every bit."""
    run, encoded = watched_train(meddle=small_pieces, **PIECES, cache_latents=True, cache_dir=cache)
    assert run.returncode == 0, run
    assert encoded.all("pictures") == pixels_of(pictures)[missing]
    assert list(cache.rglob("*.incomplete")) == []
    for name in ("image_embeds", "prompt_embeds"):
        assert torch.equal(run.all(name), unbroken_pass.all(name))
    assert same(run.prior(), unbroken_pass.prior())


def kill_in_third_piece(batches):
    if batches == 6:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_at_third_rename():
    small_pieces()
    move, moved = shutil.move, []

    def moving(source, target):
        if str(source).endswith(".incomplete") and "generator" in str(source):
            moved.append(source)
            if len(moved) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        return move(source, target)

    shutil.move = moving


@pytest.mark.parametrize(
    ("then", "meddle"),
    [(kill_in_third_piece, small_pieces), (None, kill_at_third_rename)],
    ids=["inside a piece", "before its rename"],
)
def test_a_killed_pass_goes_on_at_the_missing_piece(watched_train, unbroken_pass, pictures, tmp_path, then, meddle):
    killed, encoded = watched_train(then, meddle, **PIECES, cache_latents=True, cache_dir=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed
    assert len(encoded.all("pictures")) == 48
    assert_completed(watched_train, unbroken_pass, pictures, tmp_path, slice(32, 64))


def fill_disk_in_third_piece(batches):
    if batches == 5:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def with_room_after_the_pass():
    """For what the test writes down."""
    small_pieces()
    before, encode_once = resource.getrlimit(resource.RLIMIT_FSIZE), encoding.encode_once

    def encode(*args, **kwargs):
        try:
            return encode_once(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    encoding.encode_once = encode


def test_a_full_disk_is_one_line_and_with_room_the_pass_goes_on(watched_train, unbroken_pass, pictures, tmp_path):
    full, _ = watched_train(
        fill_disk_in_third_piece, with_room_after_the_pass, **PIECES, cache_latents=True, cache_dir=tmp_path / "cache"
    )
    assert full.returncode == 1, full
    assert "Traceback" not in full.output
    line = full.output.splitlines()[-1]
    assert "--cache_dir" in line and str(tmp_path / "cache") in line and "File too large" in line, full
    assert not (full.folder / "prior_pipeline").exists()
    assert_completed(watched_train, unbroken_pass, pictures, tmp_path / "cache", slice(32, 64))


@pytest.mark.slow
def test_two_runs_at_once_share_one_pass(run_meddled, tmp_path):
    folder = tmp_path / "encoded"
    folder.mkdir()
    flags = ONE_STEP | {"cache_dir": tmp_path / "cache", "max_train_samples": 16}
    runs = {}

    def start(number):
        runs[number] = run_meddled(partial(watch_encoders, folder), output_dir=tmp_path / f"out-{number}", **flags)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [runs[number].returncode for number in range(2)] == [0, 0], runs
    assert len(Encoded(folder).all("pictures")) == 16


# -------------------------------------------------------------------------------------------------- two ranks


def test_two_ranks_share_the_pieces_and_train_as_without_the_cache(
    train_ranks, watched_train, pictures, tmp_path_factory, tmp_path
):
    flags = {"train_batch_size": 4, "max_train_steps": 4, "learning_rate": 1e-3}
    folder = tmp_path / "encoded"
    folder.mkdir()
    meddle = partial(both, partial(watch_encoders, folder), small_pieces)
    cached = train_ranks(meddle, **flags, cache_latents=True, cache_dir=tmp_path / "cache")
    plain = train_ranks(**flags)
    assert all(run.returncode == 0 for run in (*cached, *plain)), (cached, plain)
    encoded = Encoded(folder)
    assert sorted(encoded.all("pictures")) == sorted(pixels_of(pictures)), "each once"
    shares = [sum(len(digests) for what, digests in process if what == "pictures") for process in encoded.processes]
    assert shares == [32, 32]
    assert ["Encoding" in run.output for run in cached] == [True, False]

    for one, other in zip(cached, plain, strict=True):
        assert torch.equal(one.all("noise"), other.all("noise"))
        for name in ("image_embeds", "prompt_embeds"):
            assert largest(one, other, name) < 1e-5, name
    assert cached[0].logged("train_loss") == pytest.approx(plain[0].logged("train_loss"), rel=1e-5)

    alone, encoded = watched_train(meddle=small_pieces, **flags, cache_latents=True, cache_dir=tmp_path / "cache")
    assert alone.returncode == 0, alone
    assert encoded.all("pictures") == [], "one rank finds what two have made"


# ---------------------------------------------------------------------------------------------------- bad rows


@pytest.fixture(scope="module")
def broken_pictures(pictures, tmp_path_factory):
    """Ten rows; the picture of row 3 is cut off, and row 7 has no caption. With the name of the first."""
    folder = tmp_path_factory.mktemp("broken") / "pictures"
    rows = some_pictures(pictures, folder)
    os.truncate(folder / rows[3]["file_name"], 900)
    rows[7]["text"] = None
    write_rows(folder, rows)
    return folder, rows[3]["file_name"]


def assert_names_row_3(run, file):
    assert run.returncode == 1, run
    assert "Traceback" not in run.output
    line = run.output.splitlines()[-1]
    for part in ("row 3", file, "cannot be read: OSError", "--skip_bad_rows"):
        assert part in line, run


@pytest.mark.parametrize(("workers", "batch", "piece"), [(0, 2, 10), (2, 2, 2)], ids=["second batch", "second piece"])
def test_a_bad_row_ends_the_pass_in_one_line(train, broken_pictures, tmp_path, workers, batch, piece):
    folder, file = broken_pictures
    flags = ONE_STEP | {"train_data_dir": folder, "cache_dir": tmp_path, "dataloader_num_workers": workers}
    assert_names_row_3(train(partial(set_sizes, batch, piece), **flags), file)
    assert len(list(tmp_path.rglob("generator-*.arrow"))) == (piece == 2), "the first piece was whole"


def test_bad_rows_are_left_out_as_without_the_cache(train, broken_pictures, tmp_path):
    folder, file = broken_pictures
    flags = {"train_data_dir": folder, "max_train_steps": 8, "skip_bad_rows": True}
    plain, cached = train(**flags), train(partial(set_sizes, 1, 10), **flags, cache_latents=True, cache_dir=tmp_path)
    assert plain.returncode == cached.returncode == 0, (plain, cached)
    named = [
        sorted(line.split("Left out: ")[1] for line in run.output.splitlines() if "Left out: " in line)
        for run in (plain, cached)
    ]
    assert named[0] == named[1] and len(named[1]) == 2 and "row 3 " in named[1][0] and file in named[1][0]
    assert "2 rows left out so far, at the end of epoch 3" in cached.output
    for name in ("image_embeds", "prompt_embeds"):
        assert largest(cached, plain, name) < 1e-5, "other rows came in their place"
    assert cached.logged("train_loss") == pytest.approx(plain.logged("train_loss"), rel=1e-5)

    again = train(**flags | {"skip_bad_rows": False}, cache_latents=True, cache_dir=tmp_path)
    assert_names_row_3(again, file)


def test_a_row_that_was_mended_is_used(watched_train, pictures, tmp_path):
    folder = tmp_path / "pictures"
    rows = some_pictures(pictures, folder, 6)
    os.truncate(folder / rows[3]["file_name"], 900)
    flags = ONE_STEP | {"train_data_dir": folder, "cache_dir": tmp_path / "cache"}
    run, encoded = watched_train(**flags, skip_bad_rows=True)
    assert run.returncode == 0 and len(encoded.all("pictures")) == 5, run
    shutil.copy(pictures / rows[3]["file_name"], folder)
    run, encoded = watched_train(**flags)
    assert run.returncode == 0 and encoded.all("pictures") == pixels_of(folder), run


# --------------------------------------------------------------------------------------------- many, many rows


ALONE = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None)


def encode_once(rows, folder, accelerator=ALONE, read=None, tokenize=None, encode=None):
    args = SimpleNamespace(cache_dir=str(folder), skip_bad_rows=False, dataloader_num_workers=0)
    return encoding.encode_once(accelerator, rows, "key", read, tokenize, encode, args)


def encode_numbers(count, folder):
    """A cache of `count` rows: row n has latents (16, 2, 2) of n, and two captions' embeddings (77, 4) of n and -n."""

    def read(row):
        return torch.full((16, 2, 2), float(row["n"])), [f"{row['n']}", f"-{row['n']}"]

    def tokenize(captions):
        return torch.tensor([float(caption) for caption in captions]).view(-1, 1), None

    def encode(batch):
        return batch["text_input_ids"][..., None].expand(-1, 77, 4), batch["effnet_pixel_values"]

    rows = datasets.Dataset.from_dict({"n": list(range(count))})
    return encode_once(rows, folder, read=read, tokenize=tokenize, encode=encode)


def tables(table):
    return [part for row in table.blocks for part in row] if isinstance(table, ConcatenationTable) else [table]


def test_rows_are_mapped_from_disk_and_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "ENCODING_PIECE", 100)
    rows = encode_numbers(1050, tmp_path)
    assert len(rows) == 1050 and len(rows.cache_files) == 11
    for kept in (rows, rows.train_test_split(50, seed=0)["train"]):
        assert {type(part) for part in tables(kept.data)} == {MemoryMappedTable}
    before = pyarrow.total_allocated_bytes()
    for number in (1049, 0, 730, 99, 100):
        row = rows[number]
        latents = torch.frombuffer(bytearray(row["latents"]), dtype=torch.float32)
        assert latents.unique().tolist() == [number] and len(latents) == 64
        signs = [
            torch.frombuffer(bytearray(text), dtype=torch.float32).unique().item() for text in row["prompt_embeds"]
        ]
        assert signs == [number, -number]
    assert pyarrow.total_allocated_bytes() - before < 10_000


def test_a_pass_holds_few_rows_in_memory(tmp_path):
    """By itself `datasets` writes at each thousandth row: 1 GB of five captions each, and as much again for a copy."""
    rows = encode_numbers(1050, tmp_path)
    assert max(len(batch) for batch in rows.data.to_batches()) <= 100


def test_a_sample_reads_one_row_however_many_there_are(tmp_path, monkeypatch):
    """A million rows: a hundred of them, mapped ten thousand times over."""
    monkeypatch.setattr(encoding, "ENCODING_PIECE", 50)
    hundred = encode_numbers(100, tmp_path)
    read, asked = type(hundred).__getitem__, []

    class Million:
        def __len__(self):
            return 1_000_000

        def __getitem__(self, row):
            asked.append(row)
            return read(hundred, row % 100)

    args = SimpleNamespace(resolution=64, caption_dropout=0.0)
    one = partial(encoding.read_cached, empty=torch.zeros(77, 4), args=args)
    samples = encoding.TrainSamples(Million(), one, seed=0, skip_bad_rows=False)
    plan = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "processes": 2}
    for first in (0, 10, 700_000):  # resuming at the last is no more work than beginning
        asked.clear()
        positions = next(encoding.micro_batches(first, 800_000, plan, rank=1))
        batch = script.collate_fn([samples[position] for position in positions])
        assert asked == batch["rows"]
        assert positions == range(first * 16 + 4, first * 16 + 8)
        assert batch["latents"][:, 0, 0, 0].tolist() == [row % 100 for row in asked]
        assert batch["prompt_embeds"].shape == (4, 77, 4)
        assert batch["prompt_embeds"][:, 0, 0].abs().tolist() == [row % 100 for row in asked]


@pytest.mark.parametrize("count", [1, 2048, 2049, 100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("ranks", [1, 3])
def test_all_rows_are_kept_in_few_files_that_the_ranks_share(tmp_path, monkeypatch, count, ranks):
    """Every piece stays open, and a process may open a thousand files or so."""
    made = []

    class Rows:
        def __len__(self):
            return count

        def select(self, piece):
            return piece

    def from_generator(generator, gen_kwargs, **settings):
        made.append(gen_kwargs["loader"].dataset.rows)
        assert gen_kwargs["first"] == made[-1].start
        return made[-1]

    monkeypatch.setattr(datasets.Dataset, "from_generator", from_generator)
    monkeypatch.setattr(datasets, "concatenate_datasets", list)
    shares = []
    for rank in range(ranks):
        made.clear()
        accelerator = SimpleNamespace(**vars(ALONE) | {"process_index": rank, "num_processes": ranks})
        pieces = encode_once(Rows(), tmp_path, accelerator)
        shares.append(made[: -len(pieces)])
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == count
        assert len(pieces) <= 256
    assert sorted((piece for share in shares for piece in share), key=lambda piece: piece.start) == pieces
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
