# SPDX-License-Identifier: Apache-2.0
"""What can be watched of a run: the held-out loss, validation pictures, trackers, loss.jsonl, its curve and the
contact sheet. Numbers are compared with formulas written out here, and what one place shows with what others do.
"""

import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import sys
import threading
from contextlib import contextmanager, nullcontext
from io import BytesIO
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import accelerate.tracking
import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import LoggerType
from conftest import tiny_args
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from tiny_models import read_pictures
from transformers import CLIPTextModel, CLIPTokenizerFast

import modeling_efficient_net_encoder as encoding
import train_text_to_image_prior as script
from modeling_efficient_net_encoder import EfficientNetEncoder

PROMPTS = ["a red apple", "an owl at night 🦉", "雪の結晶"]
TOKEN = "hf_pQmRnVbXcZkJhGfDsLwY"
ROWS, HELD_OUT = 14, 6
# An epoch is two updates of eight rows. Held-out rows come in batches of four and of two.
RUN = {
    "train_batch_size": 4,
    "max_train_steps": 7,
    "checkpointing_steps": 3,
    "learning_rate": 3e-4,
    "random_flip": True,
    "caption_dropout": 0.5,
    "validation_prompts": PROMPTS,
    "validation_steps": 2,
    "validation_split": HELD_OUT,
}
AVERAGED = RUN | {"use_ema": True, "loss_weighting": "p2", "report_to": "tensorboard,wandb", "hub_token": TOKEN}
VALIDATED = [0, 2, 4, 6, 7]
RANKS = RUN | {"train_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 2, "validation_split": 0.4}
BANDS = [f"val_loss_t{start}" for start in (0.0, 0.25, 0.5, 0.75)]
MEAN, DEVIATION = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)  # ImageNet's


# --------------------------------------------------------------------------------- runs, and what they leave


@pytest.fixture(scope="module")
def small(pictures, tmp_path_factory):
    """A folder of 14 of the pictures at 64 pixels, so that nothing is left to resize or to crop."""
    folder = tmp_path_factory.mktemp("small")
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()[:ROWS]]
    for number, row in enumerate(rows):
        picture = Image.open(pictures / row["file_name"]).convert("RGB").resize((64, 64))
        row["file_name"] = f"{number:02d}.png"
        picture.save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def watched(main, file, meddle, argv):
    """In the forked child: runs `main`, notes what it trains on and measures, and saves that to `file`."""
    record = {"trained": [], "held_out": [], "loads": 0, "drawn": 0}
    pixels, decoder = [], script.wuerstchen.WuerstchenDecoderPipeline
    encode, predict = EfficientNetEncoder.forward, script.wuerstchen.WuerstchenPrior.forward
    load, draw = decoder.from_pretrained, decoder.__call__

    def note_pixels(self, batch):
        pixels[:] = [(batch * DEVIATION + MEAN).mul(255).round().byte()]
        return encode(self, batch)

    def note_inputs(self, x, r, c):
        if pixels and self.training:
            record["trained"] += [sample.numpy().tobytes() for sample in pixels.pop()]
        elif pixels:  # the pipeline that draws comes without
            record["held_out"].append([tensor.clone() for tensor in (pixels.pop(), x, r, c)])
        return predict(self, x, r, c)

    def note_load(*args, **kwargs):
        record["loads"] += 1
        return load(*args, **kwargs)

    def note_drawing(*args, **kwargs):
        record["drawn"] += 1
        return draw(*args, **kwargs)

    EfficientNetEncoder.forward, script.wuerstchen.WuerstchenPrior.forward = note_pixels, note_inputs
    decoder.from_pretrained, decoder.__call__ = note_load, note_drawing
    if meddle is not None:
        meddle()
    try:
        main(argv)
    finally:
        torch.save(record, file)


@pytest.fixture(scope="module")
def train(run_main, models, small, tmp_path_factory):
    """train(folder=None, meddle=None, ranks=1, **flags): the command with these flags, one run for each rank.

    `meddle` is called in the child before `main`, to patch what it likes. Each run has its `returncode`, `output`,
    `folder`, wandb's folder `wandb` and, unless it was killed, `record`, see `watched`.
    """

    def train(folder=None, meddle=None, ranks=1, **flags):
        folder = folder or tmp_path_factory.mktemp("run") / "out"
        args, main = tiny_args(models, small, folder, **flags), script.main
        records = [tmp_path_factory.mktemp("record") / "record.pt" for _ in range(ranks)]
        env, runs, wandb = [{} for _ in range(ranks)], [None] * ranks, tmp_path_factory.mktemp("wandb")
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]

        def run_watched(argv):
            watched(main, records[int(os.environ.get("RANK", "0"))], meddle, argv)

        def start(rank):
            runs[rank] = run_main(args, timeout=200, WANDB_DIR=str(wandb), **env[rank])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "main", run_watched)
            threads = [threading.Thread(target=start, args=(rank,)) for rank in range(ranks)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for run, record in zip(runs, records, strict=True):
            run.folder, run.wandb = folder, wandb
            run.record = torch.load(record) if record.exists() else None
        return runs if ranks > 1 else runs[0]

    return train


@pytest.fixture(scope="module")
def unbroken(train):
    run = train(**AVERAGED)
    assert run.returncode == 0, run
    return run


@pytest.fixture(scope="module")
def ranks(train):
    """Two ranks, of which the second has no memory for its picture after the second update."""
    runs = train(meddle=no_memory_once_on_second_rank, ranks=2, **RANKS)
    assert [run.returncode for run in runs] == [0, 0], runs
    return runs


@pytest.fixture(scope="module")
def ranks_with_one_prompt(train):
    runs = train(meddle=split_as_before, ranks=2, **RANKS | {"validation_prompts": PROMPTS[2]})
    assert [run.returncode for run in runs] == [0, 0], runs
    return runs


def no_memory_once_on_second_rank():
    cls, calls = script.wuerstchen.WuerstchenDecoderPipeline, itertools.count(1)
    draw = cls.__call__

    def drawing(*args, **kwargs):
        if os.environ["RANK"] == "1" and next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return draw(*args, **kwargs)

    cls.__call__ = drawing


def split_as_before():
    """Accelerate up to 1.13 gives ranks for which there is nothing the last thing once more."""
    split = PartialState.split_between_processes

    @contextmanager
    def split_between_processes(self, inputs, apply_padding=False):
        with split(self, inputs, apply_padding) as mine:
            yield mine or inputs[-1:]

    PartialState.split_between_processes = split_between_processes


def kill_in_update(update):
    """Ends the process after so many updates' gradients, of those that it makes itself."""
    read_numbers, calls = script.read_numbers, itertools.count(1)

    def killing(*args):
        if next(calls) == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_numbers(*args)

    script.read_numbers = killing


def kill_in_validation(update):
    log_validation = script.log_validation

    def killing(run, global_step):
        if global_step == update:
            os.kill(os.getpid(), signal.SIGKILL)
        log_validation(run, global_step)

    script.log_validation = killing


def curve(folder, column):
    """What loss.jsonl has of a number, {update: number}. No update may come twice."""
    rows = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    numbers = [(row["update"], row[column]) for row in rows if column in row]
    assert [update for update, _ in numbers] == sorted({update for update, _ in numbers}), column
    return dict(numbers)


def samples(folder):
    """The validation pictures in samples/, {(update, prompt's number): pixels}."""
    named = re.compile(r"update-(\d+)-prompt-(\d+)\.png")
    found = {path: named.fullmatch(path.name) for path in (folder / "samples").iterdir()}
    assert [path.name for path, match in found.items() if not match] in ([], ["contact-sheet.png"])
    return {(int(m[1]), int(m[2])): np.asarray(Image.open(path)) for path, m in sorted(found.items()) if m}


def board(folder):
    """What TensorBoard shows: {tag: {update: number, text or pixels}}. No update may come twice."""
    path, shown = str(folder / "logs" / "text2image-fine-tune"), {}
    events = EventAccumulator(path, {"tensors": 0}).Reload()
    for tag in events.Tags()["tensors"]:
        values = [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        if tag.endswith("/text_summary"):
            shown[tag] = [(step, value.item().decode()) for step, value in values]
        elif tag.startswith("validation/"):  # width, height, picture
            shown[tag] = [(step, np.asarray(Image.open(BytesIO(value[2])))) for step, value in values]
        elif not tag.startswith("_"):
            shown[tag] = [(step, value.item()) for step, value in values]
    for tag, entries in shown.items():
        assert [step for step, _ in entries] == sorted({step for step, _ in entries}), tag
    return {tag: dict(entries) for tag, entries in shown.items()}


def records_of_wandb(folder):
    """The records of wandb's offline file, which is in LevelDB's log format: pieces with 7 bytes of header, in blocks
    of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = folder.glob("wandb/offline-run-*/*.wandb")
    data = max(files, key=lambda file: file.parent.name).read_bytes()
    at, payload = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        payload += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(payload)
            payload = b""


def same(left, right):
    """Whether two sets of weights are the same, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def equal_pictures(left, right):
    """Whether two dicts hold the same pictures."""
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


# ------------------------------------------------------------------------------------------- the held-out loss


@pytest.fixture(scope="module")
def held_out_rows():
    """The numbers of the rows that the seed holds out, as datasets' train_test_split draws them."""
    return np.random.default_rng(0).permutation(ROWS)[:HELD_OUT].tolist()


@pytest.fixture(scope="module")
def by_formula(models, small, held_out_rows):
    """by_formula(folder, weighting): the held-out loss of a prior by its definition, {name: number}."""
    prior = models / "prior"
    text_encoder = CLIPTextModel.from_pretrained(prior / "text_encoder", attn_implementation="eager").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(prior / "tokenizer")
    image_encoder = EfficientNetEncoder.from_pretrained(models / "encoder").eval()
    metadata = [json.loads(line) for line in (small / "metadata.jsonl").read_text().splitlines()]
    files = [np.asarray(Image.open(small / metadata[row]["file_name"])) for row in held_out_rows]
    pixels = (torch.tensor(np.stack(files)).permute(0, 3, 1, 2) / 255 - MEAN) / DEVIATION
    texts = [metadata[row]["text"] for row in held_out_rows]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        embeds = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        image_embeds = (image_encoder.mapper(image_encoder.backbone(pixels)) + 1) / 42
    draws = [torch.Generator().manual_seed(encoding.draw_seed(0, "held out", row)) for row in range(HELD_OUT)]
    noise = torch.stack([torch.randn(image_embeds.shape[1:], generator=draw) for draw in draws])
    t = (torch.arange(HELD_OUT, dtype=torch.float64) + 0.5) / HELD_OUT
    cosine = [torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2 for time in (t, torch.zeros_like(t))]
    signal_share = (cosine[0] / cosine[1]).clamp(1e-4, 0.9999).view(-1, 1, 1, 1)
    noisy = (signal_share.sqrt() * image_embeds + (1 - signal_share).sqrt() * noise).float()

    def measure(folder, weighting):
        prior = script.wuerstchen.WuerstchenPrior.from_pretrained(folder).eval()
        prior.set_attn_processor(AttnProcessor())  # softmax(QK) V written out
        with torch.no_grad():
            losses = ((prior(noisy, t.float(), embeds) - noise) ** 2).mean(dim=(1, 2, 3)).double()
        if weighting == "p2":
            losses *= 1 - signal_share.flatten()
        assert prior.config.dropout > 0, "or train mode would not show"
        # t is 1/12, 3/12, ... 11/12.
        bands = [losses[:1], losses[1:3], losses[3:4], losses[4:]]
        return {"val_loss": losses.mean().item()} | {
            name: band.mean().item() for name, band in zip(BANDS, bands, strict=True)
        }

    return measure


def test_the_held_out_loss_is_that_of_the_averaged_weights_by_the_formula(unbroken, by_formula, models):
    """With the training's weighting, without its dropout, flips and empty captions."""
    shown = board(unbroken.folder)
    assert list(curve(unbroken.folder, "val_loss")) == VALIDATED
    for update, folder in {
        0: models / "prior" / "prior",
        6: unbroken.folder / "checkpoint-6" / "prior_ema",
        7: unbroken.folder / "prior_pipeline" / "prior",
    }.items():
        right = by_formula(folder, "p2")
        assert curve(unbroken.folder, "val_loss")[update] == pytest.approx(right["val_loss"], rel=1e-5)
        for name, number in right.items():
            assert shown[name][update] == pytest.approx(number, rel=1e-5), (update, name)
    last, average = (by_formula(unbroken.folder / "checkpoint-6" / name, "p2") for name in ("prior", "prior_ema"))
    assert last["val_loss"] != pytest.approx(average["val_loss"], rel=1e-3), "this can tell the two apart"


def test_the_bands_weighted_by_their_rows_are_the_whole(unbroken):
    shown = board(unbroken.folder)
    assert all(list(shown[name]) == VALIDATED for name in ("val_loss", *BANDS))
    for update in VALIDATED:
        bands = [shown[name][update] for name in BANDS]
        whole = sum(rows * band for rows, band in zip((1, 2, 1, 2), bands, strict=True)) / 6
        assert shown["val_loss"][update] == pytest.approx(whole, rel=1e-5)


def test_two_ranks_share_the_held_out_rows_and_get_the_number_of_one(ranks, by_formula, models):
    """Here a share of the rows is held out; 0.4 of 14 are 6."""
    losses = curve(ranks[0].folder, "val_loss")
    assert list(losses) == [0, 2, 4]
    for update, folder in {
        0: models / "prior" / "prior",
        2: ranks[0].folder / "checkpoint-2" / "prior",
        4: ranks[0].folder / "checkpoint-4" / "prior",
    }.items():
        assert losses[update] == pytest.approx(by_formula(folder, "none")["val_loss"], rel=1e-5)
    assert [[len(pixels) for pixels, *_ in run.record["held_out"][:2]] for run in ranks] == [[2, 2], [2, 2]]
    assert [len(run.record["held_out"]) for run in ranks] == [6, 3], "batches, in three validations"


def test_the_held_out_loss_is_the_same_with_cached_latents(train, by_formula, models, tmp_path):
    flags = RUN | {"validation_prompts": None, "max_train_steps": 1, "random_flip": False, "cache_dir": tmp_path}
    run = train(cache_latents=True, **flags)
    assert run.returncode == 0, run
    right = by_formula(models / "prior" / "prior", "none")
    assert curve(run.folder, "val_loss")[0] == pytest.approx(right["val_loss"], rel=1e-5)


def test_held_out_rows_are_never_trained_on_and_all_others_are(unbroken, small, held_out_rows):
    raw = (read_pictures(small, 64) * DEVIATION + MEAN).mul(255).round().byte()
    row_of = {picture.numpy().tobytes(): row for row, picture in enumerate(raw)}
    row_of |= {picture.flip(-1).numpy().tobytes(): row for row, picture in enumerate(raw)}  # --random_flip
    trained = [row_of[sample] for sample in unbroken.record["trained"]]
    held_out = [row_of[sample.numpy().tobytes()] for sample in unbroken.record["held_out"][0][0]]
    held_out += [row_of[sample.numpy().tobytes()] for sample in unbroken.record["held_out"][1][0]]
    assert len(trained) == 7 * 4
    assert sorted(held_out) == sorted(held_out_rows)
    assert set(trained) == set(range(ROWS)) - set(held_out_rows)
    assert "8 rows, 7 updates" in unbroken.output
    assert curve(unbroken.folder, "epoch") == {update: update / 2 for update in range(1, 8)}, "of eight rows"


def test_every_validation_measures_the_same_rows_captions_noise_and_timesteps(unbroken):
    batches = unbroken.record["held_out"]
    assert len(batches) == 2 * len(VALIDATED)
    for number, batch in enumerate(batches):
        assert all(torch.equal(one, other) for one, other in zip(batch, batches[number % 2], strict=True))


def test_validating_changes_no_bit_of_the_training(unbroken, train):
    """The same rows are held out; no pictures, other intervals and no trackers."""
    flags = {"validation_prompts": None, "validation_steps": None, "validation_epochs": 50, "report_to": "none"}
    silent = train(**AVERAGED | flags)
    assert silent.returncode == 0, silent
    assert list(curve(silent.folder, "val_loss")) == [0, 2, 7], "before, after the first epoch and at the end"
    assert not (silent.folder / "samples").exists()
    for part in ("checkpoint-3/prior", "checkpoint-6/prior", "checkpoint-6/prior_ema", "prior_pipeline/prior"):
        assert same(weights(silent.folder / part), weights(unbroken.folder / part)), part
    for column in ("train_loss", "grad_norm", "lr", "epoch"):
        assert curve(silent.folder, column) == curve(unbroken.folder, column)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "half"])
def test_a_held_out_part_that_makes_no_sense_is_refused(models, small, tmp_path, capsys, value):
    with pytest.raises(SystemExit) as end:
        script.parse_args(tiny_args(models, small, tmp_path / "out", validation_split=value))
    assert end.value.code != 0
    assert "--validation_split" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", [str(ROWS), "0.99", "1.5"])
def test_held_out_rows_that_cannot_be_spared_or_are_no_whole_number_are_refused(train, value):
    run = train(**RUN | {"validation_split": value})
    assert run.returncode != 0
    assert "--validation_split" in run.output.splitlines()[-1], run
    assert "Traceback" not in run.output


# ---------------------------------------------------------------------------------------- validation pictures


def test_pictures_are_drawn_before_training_every_so_many_updates_and_at_the_end(unbroken):
    pictures = samples(unbroken.folder)
    assert list(pictures) == [(update, prompt) for update in VALIDATED for prompt in range(3)]
    assert len({picture.tobytes() for picture in pictures.values()}) == len(pictures)
    before = {key: picture.astype(int) for key, picture in pictures.items() if key[0] == 0}
    for prompt in range(3):
        others = [np.abs(before[0, prompt] - before[0, other]).mean() for other in range(3) if other != prompt]
        later = np.abs(before[0, prompt] - pictures[2, prompt]).mean()
        assert later < min(others), "the same noise: two updates change a picture less than another prompt does"


def test_samples_say_what_they_are_of(unbroken):
    for path in (unbroken.folder / "samples").glob("update-*"):
        text = Image.open(path).text
        assert text["prompt"] == PROMPTS[int(path.stem[-1])]
        for setting in (r"learning_rate\W+0\.0003", r"resolution\W+64", r"--use_ema\b", r"loss_weighting\W+p2"):
            assert re.search(setting, text["settings"]), setting
        assert TOKEN not in str(text)


def test_ranks_share_the_prompts_out_and_draw_what_one_rank_draws(ranks, unbroken):
    pictures = samples(ranks[0].folder)
    assert list(pictures) == [(update, prompt) for update in (0, 4) for prompt in range(3)]
    first = {key: picture for key, picture in samples(unbroken.folder).items() if key[0] == 0}
    assert equal_pictures({key: picture for key, picture in pictures.items() if key[0] == 0}, first)
    assert [run.record["drawn"] for run in ranks] == [6, 2], "in three validations, one of which failed"


def test_one_prompt_is_enough_for_two_ranks(ranks_with_one_prompt, unbroken):
    pictures = samples(ranks_with_one_prompt[0].folder)
    assert list(pictures) == [(0, 0), (2, 0), (4, 0)]
    assert np.array_equal(pictures[0, 0], samples(unbroken.folder)[0, 2])
    sheet = Image.open(ranks_with_one_prompt[0].folder / "samples" / "contact-sheet.png")
    assert 4 * sheet.height > sheet.width > 3 * sheet.height, "a row of four: the prompt, and three updates"


def test_no_memory_for_a_picture_is_a_warning_with_advice(ranks, ranks_with_one_prompt):
    """On one rank of two; training goes on, ends in the same bits, and the next pictures are drawn."""
    (warning,) = [line for line in ranks[0].output.splitlines() if "No validation pictures" in line]
    assert "WARNING" in warning
    assert "out of memory" in warning
    assert "--train_batch_size" in warning
    assert not any("Traceback" in run.output for run in ranks)
    assert {update for update, _ in samples(ranks[0].folder)} == {0, 4}
    assert list(curve(ranks[0].folder, "val_loss")) == [0, 2, 4]
    for part in ("checkpoint-2/prior", "checkpoint-4/prior", "prior_pipeline/prior"):
        assert same(weights(ranks[0].folder / part), weights(ranks_with_one_prompt[0].folder / part)), part
    for column in ("train_loss", "val_loss"):
        assert curve(ranks[0].folder, column) == curve(ranks_with_one_prompt[0].folder, column)


def test_the_decoder_is_loaded_once(unbroken, ranks):
    assert ranks[1].record["loads"] == 1, "in three validations, one of which failed"
    assert ranks[0].record["loads"] == unbroken.record["loads"] == 2, "and once more to be saved, in float32"


class Decoder:
    """Stands in for the decoder's pipeline, on a machine with a GPU: notes where it is told to go."""

    decoder = SimpleNamespace(config=SimpleNamespace(patch_size=2, c_hidden=[8, 8, 16, 16]))
    config = SimpleNamespace(latent_dim_scale=10.67)

    def __init__(self, breaks):
        self.places, self.breaks = ["cpu"], breaks

    def to(self, place):
        self.places.append(getattr(place, "type", place))
        return self

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, latents, prompt, **_):
        assert self.places[-1] == "cuda"
        if self.breaks:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return SimpleNamespace(images=[Image.new("RGB", (128, 128))])


@pytest.mark.parametrize("breaks", [False, True], ids=["", "out of memory"])
def test_the_decoder_leaves_the_device_while_it_does_not_draw(models, monkeypatch, breaks):
    decoder, loads = Decoder(breaks), []
    monkeypatch.setattr(script, "load_decoder", lambda *args: loads.append(args) or decoder)
    PartialState()  # what logs asks for it
    run = SimpleNamespace(
        accelerator=SimpleNamespace(
            device=SimpleNamespace(type="cuda"),
            is_main_process=True,
            autocast=nullcontext,
            split_between_processes=nullcontext,
        ),
        args=SimpleNamespace(resolution=64, validation_prompts=PROMPTS),
        prior=script.wuerstchen.WuerstchenPrior.from_pretrained(models / "prior" / "prior").eval(),
        noise_scheduler=script.DDPMWuerstchenScheduler(),
        prompt_embeds=[torch.zeros(1, 77, 32)] * 3,
        empty_embeds=torch.zeros(1, 77, 32),
        decoder=None,
        seed=0,
    )
    for _ in range(2):
        assert len(script.draw_pictures(run, 2)) == (0 if breaks else 3)
    assert decoder.places == ["cpu", "cuda", "cpu", "cuda", "cpu"]
    assert len(loads) == 1


# --------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_shows_what_loss_jsonl_and_samples_hold(unbroken):
    shown = board(unbroken.folder)
    for column in ("train_loss", "val_loss", "lr", "grad_norm", "images_per_second", "epoch"):
        numbers = curve(unbroken.folder, column)
        assert list(numbers) == (VALIDATED if column == "val_loss" else list(range(1, 8)))
        assert shown[column] == pytest.approx(numbers, rel=1e-6), column
    pictures = samples(unbroken.folder)
    for index, prompt in enumerate(PROMPTS):
        images = {(update, index): picture for update, picture in shown[f"validation/{index}"].items()}
        assert equal_pictures(images, {key: picture for key, picture in pictures.items() if key[1] == index})
        assert shown[f"validation/{index}/text_summary"] == dict.fromkeys(VALIDATED, prompt)


def test_wandb_has_what_loss_jsonl_and_samples_hold(unbroken):
    logged, settings = {}, {}
    for record in records_of_wandb(unbroken.wandb):
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in values.items():
            assert logged.setdefault(name, {}).setdefault(values["_step"], value) == value, "an update comes once"
        settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
    for column in ("train_loss", "val_loss", "lr", "grad_norm", "images_per_second", "epoch"):
        assert logged[column] == pytest.approx(curve(unbroken.folder, column), rel=1e-6), column
    assert all(list(logged[band]) == VALIDATED for band in BANDS)

    assert logged["validation/captions"] == dict.fromkeys(VALIDATED, PROMPTS)
    (folder,) = unbroken.wandb.glob("wandb/offline-run-*/files")
    shown = {
        (update, index): np.asarray(Image.open(folder / name))
        for update, names in logged["validation/filenames"].items()
        for index, name in enumerate(names)
    }
    assert equal_pictures(shown, samples(unbroken.folder))

    assert settings["learning_rate"] == 3e-4
    assert settings["seed"] == 0
    assert settings["validation_prompts"] == str(PROMPTS)
    assert "hub_token" not in settings


class Comet(ModuleType):
    """Stands in for comet_ml: notes what it is given."""

    __version__ = "3.50.0"

    def __init__(self):
        super().__init__("comet_ml")
        self.given = {"parameters": {}, "numbers": [], "pictures": []}

    def start(self, project_name):
        return self

    def set_step(self, step):
        pass

    def log_parameters(self, values):
        self.given["parameters"] |= values

    def log_metric(self, name, value, step=None):
        self.given["numbers"].append((name, value, step))

    def log_image(self, image_data, name=None, overwrite=False, image_format="png", step=None):
        self.given["pictures"].append((name, step, np.asarray(image_data)))

    def end(self):
        torch.save(self.given, os.environ["GIVEN"])


class Trackio(ModuleType):
    """Stands in for trackio 0.43, which leaves out what is neither a number, a string nor one of its own objects.

    A list of its images is such a thing: it warns "Type is not JSON serializable: TrackioImage", and drops the key.
    """

    class Image:
        def __init__(self, value, caption=None):
            self.value, self.caption = value, caption

    def __init__(self):
        super().__init__("trackio")
        self.config = {}
        self.given = {"parameters": self.config, "numbers": [], "pictures": []}

    def init(self, project):
        self.config.clear()
        return self

    def log(self, metrics, step=None):
        for name, value in metrics.items():
            if isinstance(value, self.Image):
                self.given["pictures"].append((name, value.caption, step, np.asarray(value.value)))
            elif isinstance(value, (int, float, str)):
                self.given["numbers"].append((name, value, step))

    def finish(self):
        torch.save(self.given, f"{os.environ['GIVEN']}.trackio")


def stand_ins(file):
    """Puts stand-ins for trackers where Accelerate looks for them; they write what they were given to `file`."""
    os.environ["GIVEN"] = str(file)
    sys.modules |= {"comet_ml": Comet(), "trackio": Trackio(), "dvclive": MagicMock(), "dvclive.plots": MagicMock()}
    sys.modules["dvclive.plots"].Metric.could_log = lambda value: True
    available = map(LoggerType, ("tensorboard", "comet_ml", "trackio", "dvclive"))
    accelerate.tracking.get_available_trackers()[:] = available


@pytest.fixture(scope="module")
def given(train, tmp_path_factory):
    """A run that several trackers at once were told of, what comet_ml and trackio were given, and the run."""
    file = tmp_path_factory.mktemp("given") / "given.pt"
    flags = {"validation_prompts": PROMPTS[:2], "max_train_steps": 2, "hub_token": TOKEN}
    run = train(
        meddle=functools.partial(stand_ins, file), **RUN | flags, report_to="comet_ml,trackio,dvclive,tensorboard"
    )
    assert run.returncode == 0, run
    return SimpleNamespace(
        run=run,
        comet_ml=torch.load(file, weights_only=False),
        trackio=torch.load(f"{file}.trackio", weights_only=False),
    )


@pytest.mark.parametrize("name", ["comet_ml", "trackio"])
def test_each_of_several_trackers_gets_the_numbers_and_the_settings(given, name):
    told, folder = getattr(given, name), given.run.folder
    for column in ("train_loss", "val_loss", "lr", "grad_norm", "images_per_second", "epoch"):
        numbers = [(step, value) for tag, value, step in told["numbers"] if tag == column]
        assert numbers == list(curve(folder, column).items()), column
        assert board(folder)[column] == pytest.approx(dict(numbers), rel=1e-6)
    assert told["parameters"]["learning_rate"] == 3e-4
    assert told["parameters"]["seed"] == 0
    assert TOKEN not in str(told["parameters"])


def test_comet_ml_gets_the_pictures_with_their_prompts(given):
    shown = {(step, PROMPTS.index(prompt)): picture for prompt, step, picture in given.comet_ml["pictures"]}
    assert len(given.comet_ml["pictures"]) == 4
    assert equal_pictures(shown, samples(given.run.folder))


def test_trackio_gets_the_pictures_with_their_prompts(given):
    pictures = given.trackio["pictures"]
    shown = {(step, PROMPTS.index(prompt)): picture for _, prompt, step, picture in pictures}
    assert len(pictures) == 4
    assert equal_pictures(shown, samples(given.run.folder))
    assert len({(name, step) for name, _, step, _ in pictures}) == 4, "each under a name of its own"


def test_a_tracker_that_the_script_knows_nothing_of_costs_only_its_pictures(given):
    warnings = [line for line in given.run.output.splitlines() if "dvclive" in line and "WARNING" in line]
    assert len(warnings) == 2
    assert all("samples/" in warning for warning in warnings)


# ------------------------------------------------------------------------------------- looking without a tracker


def test_the_contact_sheet_has_prompts_down_and_updates_across(unbroken):
    sheet = Image.open(unbroken.folder / "samples" / "contact-sheet.png")
    tile = sheet.width // (1 + len(VALIDATED))
    top = sheet.height - 3 * tile
    assert sheet.width == (1 + len(VALIDATED)) * tile
    assert 0 < top < tile / 4, "room for a line"
    for (update, prompt), picture in samples(unbroken.folder).items():
        left, above = (1 + VALIDATED.index(update)) * tile, top + prompt * tile
        shown = sheet.crop((left, above, left + tile, above + tile))
        assert np.array_equal(shown, Image.fromarray(picture).resize((tile, tile))), (update, prompt)
    for prompt in range(3):
        label = np.asarray(sheet.crop((0, top + prompt * tile, tile, top + (prompt + 1) * tile)))
        assert (label < 128).any(), "the prompt is written beside its row"
    for column in range(1, 1 + len(VALIDATED)):
        label = np.asarray(sheet.crop((column * tile, 0, (column + 1) * tile, top)))
        assert (label < 128).any(), "the update is written above its column"


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 23, 24, 25, 36, 144, 150])
def test_the_contact_sheet_keeps_to_its_columns_and_to_the_first_and_last_update(tmp_path, count):
    """Each update's picture is of one colour, which says which one it is."""
    args = script.parse_args(["--train_data_dir=pictures", f"--output_dir={tmp_path}", "--validation_prompts", "owl"])
    (tmp_path / "samples").mkdir()
    colours = [Image.new("RGB", (16, 16), (update, 255, 0)) for update in range(count)]
    for update, picture in enumerate(colours[:-1]):
        picture.save(tmp_path / "samples" / f"update-{100 * update:07d}-prompt-0.png")
    script.log_pictures(SimpleNamespace(trackers=[]), args, colours[-1:], 100 * (count - 1))
    sheet = Image.open(tmp_path / "samples" / "contact-sheet.png")
    line = np.asarray(sheet)[sheet.height - 20]
    shown = [update for update, _ in itertools.groupby(red for red, green, blue in line.tolist() if green > blue)]
    assert len(shown) <= 12
    assert len(shown) == count or len(shown) > 6
    assert shown == sorted(set(shown))
    assert (shown[0], shown[-1]) == (0, count - 1)
    assert sheet.width % (1 + len(shown)) == 0, "one column more, for the prompt"


def blots(plot, colour):
    """The rows of pixels of a colour, {column: middle}."""
    rows, columns = np.nonzero((np.asarray(plot) == colour).all(axis=2))
    return {column: (rows[columns == column].min() + rows[columns == column].max()) / 2 for column in set(columns)}


def test_the_curve_goes_through_the_numbers(tmp_path):
    """The training loss is 1 for fifty updates and then 0.5, and so its running mean falls by 2 % of the rest."""
    means = [1.0] * 50 + [0.5 + 0.5 * 0.98**step for step in range(1, 151)]
    held_out = {0: 1.1, 100: 0.9, 200: 0.3}
    accelerator = SimpleNamespace(log=lambda *_, **__: None, is_main_process=True, project_dir=tmp_path)
    script.log_numbers(accelerator, {"val_loss": held_out[0]}, 0)
    for update in range(1, 201):
        script.log_numbers(accelerator, {"train_loss": 1.0 if update <= 50 else 0.5}, update)
        if update in held_out:
            script.log_numbers(accelerator, {"val_loss": held_out[update]}, update)
    plot = encoding.loss_curve(encoding.read_losses(tmp_path))
    blue, red = blots(plot, (0, 0, 255)), blots(plot, (255, 0, 0))
    # The ends of the red line say where the axes are.
    (left, right), (high, low) = (min(red), max(red)), (red[min(red)], red[max(red)])

    def place(update, loss):
        return round(left + (right - left) * update / 200), high + (low - high) * (1.1 - loss) / 0.8

    column, row = place(100, 0.9)
    assert red[column] == pytest.approx(row, abs=3)
    for update in (2, 20, 49, 60, 80, 120, 160, 199):
        column, row = place(update, means[update - 1])
        if column in blue and abs(red[column] - row) > 6:  # where the red line does not lie on it
            assert blue[column] == pytest.approx(row, abs=3), update
    assert sum(column in blue for column in range(left + 10, right - 10)) > 0.9 * (right - left)


def test_the_curve_is_drawn_beside_loss_jsonl(unbroken):
    plot = Image.open(unbroken.folder / "loss.png").convert("RGB")
    colours = {colour for _, colour in plot.getcolors(1 << 20)}
    assert {(0, 0, 255), (255, 0, 0), (211, 211, 211)} <= colours, "running mean, held-out and training loss"


# ---------------------------------------------------------------------------------------- resuming and starting anew


def assert_watched_alike(folder, unbroken):
    """loss.jsonl, TensorBoard and samples/ have each update once, with the unbroken run's numbers and pictures."""
    for column in ("train_loss", "val_loss", "lr", "grad_norm", "epoch"):
        assert curve(folder, column) == curve(unbroken, column), column
    assert list(curve(folder, "images_per_second")) == list(curve(unbroken, "images_per_second"))
    assert equal_pictures(samples(folder), samples(unbroken))
    shown, right = board(folder), board(unbroken)
    assert shown.keys() == right.keys()
    for tag in shown.keys() - {"images_per_second"}:
        if tag.startswith("validation/") and not tag.endswith("text_summary"):
            assert equal_pictures(shown[tag], right[tag]), tag
        else:
            assert shown[tag] == right[tag], tag
    sheets = [Image.open(path / "samples" / "contact-sheet.png") for path in (folder, unbroken)]
    assert np.array_equal(*map(np.asarray, sheets))
    plots = [Image.open(path / "loss.png") for path in (folder, unbroken)]
    assert np.array_equal(*map(np.asarray, plots))


@pytest.fixture(scope="module")
def killed_and_resumed(train):
    """A run that is killed in update 6, when checkpoint-3 is its last, and its continuation."""
    killed = train(meddle=functools.partial(kill_in_update, 6), **AVERAGED)
    assert killed.returncode == -signal.SIGKILL, killed
    assert max(curve(killed.folder, "train_loss")) == 5
    assert max(curve(killed.folder, "val_loss")) == 4
    resumed = train(killed.folder, **AVERAGED, resume_from_checkpoint="latest")
    assert resumed.returncode == 0, resumed
    assert "is at update 3" in resumed.output
    return killed, resumed


def test_a_killed_and_resumed_run_shows_each_update_once_with_the_unbroken_runs_numbers(killed_and_resumed, unbroken):
    assert_watched_alike(killed_and_resumed[1].folder, unbroken.folder)


def test_resuming_goes_on_in_the_same_wandb_run(killed_and_resumed, unbroken):
    ids = []
    for run in (*killed_and_resumed, unbroken):
        (name,) = {path.name.rpartition("-")[2] for path in run.wandb.glob("wandb/offline-run-*")}
        ids.append(name)
    assert ids[0] == ids[1] != ids[2]
    told = {record.run.run_id for record in records_of_wandb(killed_and_resumed[1].wandb) if record.run.run_id}
    assert told == {ids[0]}
    steps = {record.history.step.num for record in records_of_wandb(killed_and_resumed[1].wandb)} - {0}
    assert steps == {4, 5, 6, 7}, "what follows checkpoint-3"


def test_a_run_killed_while_it_validates_lacks_no_validation(train, unbroken, tmp_path):
    """It validates at update 6, after it has saved checkpoint-6, from which it goes on."""
    folder, flags = tmp_path / "run", AVERAGED | {"report_to": "tensorboard", "resume_from_checkpoint": "latest"}
    shutil.copytree(unbroken.folder, folder)
    shutil.rmtree(folder / "checkpoint-6")
    killed = train(folder, meddle=functools.partial(kill_in_validation, 6), **flags)
    assert killed.returncode == -signal.SIGKILL, killed
    assert max(curve(folder, "train_loss")) == 6
    assert max(curve(folder, "val_loss")) == 4
    resumed = train(folder, **flags)
    assert resumed.returncode == 0, resumed
    assert "is at update 6" in resumed.output
    assert_watched_alike(folder, unbroken.folder)


@pytest.mark.parametrize("torn", ['{"update": 4, "train_l', "\0" * 40], ids=["cut off", "zeros"])
def test_what_a_power_failure_leaves_of_the_last_line_does_not_keep_a_run_from_going_on(unbroken, tmp_path, torn):
    lines = (unbroken.folder / "loss.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "loss.jsonl").write_text("".join(lines) + torn)
    encoding.forget_what_follows(tmp_path, 3)
    encoding.loss_curve(encoding.read_losses(tmp_path))
    for name in ("train_loss", "val_loss"):
        before = {update: number for update, number in curve(unbroken.folder, name).items() if update <= 3}
        assert curve(tmp_path, name) == before


def test_resuming_a_finished_run_shows_no_update_twice(train, unbroken, tmp_path):
    folder, flags = tmp_path / "run", AVERAGED | {"report_to": "tensorboard", "max_train_steps": 6}
    shutil.copytree(unbroken.folder, folder)
    resumed = train(folder, **flags, resume_from_checkpoint="latest")
    assert resumed.returncode == 0, resumed
    assert "nothing is left to train" in resumed.output
    for name in ("train_loss", "val_loss"):
        before = {update: number for update, number in curve(unbroken.folder, name).items() if update <= 6}
        assert curve(folder, name) == before
        assert board(folder)[name] == pytest.approx(before, rel=1e-6)
    pictures = {key: picture for key, picture in samples(unbroken.folder).items() if key[0] <= 6}
    assert equal_pictures(samples(folder), pictures)


def test_overwriting_starts_all_that_is_watched_anew(train, unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    flags = {"max_train_steps": 2, "validation_prompts": PROMPTS[:1], "seed": 1, "report_to": "tensorboard"}
    run = train(folder, **RUN | flags, overwrite_output_dir=True)
    assert run.returncode == 0, run
    assert list(curve(folder, "train_loss")) == [1, 2]
    assert list(curve(folder, "val_loss")) == [0, 2]
    pictures, shown = samples(folder), board(folder)
    assert list(pictures) == [(0, 0), (2, 0)]
    for column in ("train_loss", "val_loss", "lr"):
        assert shown[column] == pytest.approx(curve(folder, column), rel=1e-6)
    assert equal_pictures(shown["validation/0"], {update: picture for (update, _), picture in pictures.items()})
    assert shown.get("validation/1", {}) == {}
    sheet = Image.open(folder / "samples" / "contact-sheet.png")
    assert 3 * sheet.height > sheet.width > 2 * sheet.height, "a row of three: the prompt, and two updates"
