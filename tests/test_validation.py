# SPDX-License-Identifier: Apache-2.0
"""Validation: the held-out loss, the images of the prompts, and when both are made. The held-out loss is
compared with its definition, written out here; images are compared with those of other runs."""

import itertools
import json
import math
import os
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from conftest import equal_images, read_curve, read_samples, same_weights, tiny_args
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file
from tiny_models import read_images
from transformers import CLIPTextModel, CLIPTokenizerFast

import train_text_to_image_prior as script
from modeling_efficient_net_encoder import EfficientNetEncoder

PROMPTS = ["a red apple", "an owl at night 🦉", "雪の結晶"]
NUM_ROWS, HELD_OUT = 14, 6
# An epoch is two steps of eight samples. Held-out rows come in batches of four and of two.
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
WITH_EMA = RUN | {"use_ema": True, "loss_weighting": "p2", "report_to": "tensorboard,wandb"}
VALIDATED = [0, 2, 4, 6, 7]
RANKS = RUN | {
    "train_batch_size": 2,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "validation_split": 0.4,
    "report_to": "none",
}
BANDS = [f"val_loss_t{start}" for start in (0.0, 0.25, 0.5, 0.75)]
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


# ------------------------------------------------------------------------------- runs, and what they record


@pytest.fixture(scope="module")
def small(pictures, tmp_path_factory):
    """A folder of 14 of the images at 64 pixels, so that nothing is left to resize or to crop."""
    folder = tmp_path_factory.mktemp("small")
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()[:NUM_ROWS]]
    for number, row in enumerate(rows):
        image = Image.open(pictures / row["file_name"]).convert("RGB").resize((64, 64))
        row["file_name"] = f"{number:02d}.png"
        image.save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def record_validation():
    """In the forked child, before `main`: records what is trained on and what validation computes, and saves
    it in the output folder after each validation."""
    record = {"trained": [], "held_out": [], "weights": {}, "num_decoder_loads": 0, "num_images": 0}
    pixels, decoder = [], script.wuerstchen.WuerstchenDecoderPipeline
    encode, predict = EfficientNetEncoder.forward, script.wuerstchen.WuerstchenPrior.forward
    load, decode = script.load_decoder, decoder.__call__
    generate_images, log_validation = script.Validator.generate_images, script.Validator.log_validation

    def record_pixels(self, batch):
        pixels[:] = [to_bytes(batch)]
        return encode(self, batch)

    def record_inputs(self, x, r, c):
        if pixels and self.training:
            record["trained"] += [sample.numpy().tobytes() for sample in pixels.pop()]
        elif pixels:  # the pipeline that generates images calls the prior without
            record["held_out"].append([tensor.clone() for tensor in (pixels.pop(), x, r, c)])
        return predict(self, x, r, c)

    def record_load(*args, **kwargs):
        record["num_decoder_loads"] += 1
        return load(*args, **kwargs)

    def record_image(*args, **kwargs):
        record["num_images"] += 1
        return decode(*args, **kwargs)

    def record_weights(self, global_step):
        weights = self.prior.state_dict().items()
        record["weights"][global_step] = {name: tensor.clone() for name, tensor in weights}
        return generate_images(self, global_step)

    def save_record(self, global_step):
        log_validation(self, global_step)
        torch.save(record, record_file(self.args.output_dir, self.accelerator.process_index))

    EfficientNetEncoder.forward, script.wuerstchen.WuerstchenPrior.forward = record_pixels, record_inputs
    script.load_decoder, decoder.__call__ = record_load, record_image
    script.Validator.generate_images = record_weights
    script.Validator.log_validation = save_record


def to_bytes(pixels):
    """The inverse of the script's normalize_pixels."""
    return (pixels * IMAGENET_STD + IMAGENET_MEAN).mul(255).round().byte()


def record_file(folder, rank):
    return Path(folder, f"validation-record-{rank}.pt")


def read_record(run, rank=0):
    return torch.load(record_file(run.folder, rank))


@pytest.fixture
def run_with_ema(train, small):
    run = train(patch=record_validation, train_data_dir=small, **WITH_EMA)
    assert run.returncode == 0, run
    return run


@pytest.fixture
def ranks(train_ranks, small):
    """Two ranks, of which the second has no memory for its image after the second step."""
    runs = train_ranks(patch=record_with_one_failure, train_data_dir=small, **RANKS)
    assert [run.returncode for run in runs] == [0, 0], runs
    return runs


@pytest.fixture
def ranks_with_one_prompt(train_ranks, small):
    flags = RANKS | {"validation_prompts": PROMPTS[2]}
    runs = train_ranks(patch=split_like_old_accelerate, train_data_dir=small, **flags)
    assert [run.returncode for run in runs] == [0, 0], runs
    return runs


def record_with_one_failure():
    """Records, and raises out of memory in the second rank's second validation."""
    record_validation()
    decoder, calls = script.wuerstchen.WuerstchenDecoderPipeline, itertools.count(1)
    decode = decoder.__call__

    def fail_once(*args, **kwargs):
        if os.environ["RANK"] == "1" and next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(*args, **kwargs)

    decoder.__call__ = fail_once


def split_like_old_accelerate():
    """Accelerate up to 1.13 repeats the last input for ranks for which there is none."""
    split = PartialState.split_between_processes

    @contextmanager
    def split_between_processes(self, inputs, apply_padding=False):
        with split(self, inputs, apply_padding) as own_inputs:
            yield own_inputs or inputs[-1:]

    PartialState.split_between_processes = split_between_processes


# ------------------------------------------------------------------------------------------ the held-out loss


@pytest.fixture(scope="module")
def held_out_rows():
    """The indices of the rows that seed 0 holds out: `train_test_split` of `datasets` holds out the same."""
    return np.random.default_rng(0).permutation(NUM_ROWS)[:HELD_OUT].tolist()


@pytest.fixture(scope="module")
def compute_by_formula(models, small, held_out_rows):
    """compute_by_formula(folder, weighting): the held-out loss of a prior by its definition, {name:
    number}."""
    prior = models / "prior"
    text_encoder = CLIPTextModel.from_pretrained(prior / "text_encoder", attn_implementation="eager").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(prior / "tokenizer")
    image_encoder = EfficientNetEncoder.from_pretrained(models / "encoder").eval()
    metadata = [json.loads(line) for line in (small / "metadata.jsonl").read_text().splitlines()]
    files = [np.asarray(Image.open(small / metadata[row]["file_name"])) for row in held_out_rows]
    pixels = (torch.tensor(np.stack(files)).permute(0, 3, 1, 2) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    texts = [metadata[row]["text"] for row in held_out_rows]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        embeds = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        image_embeds = (image_encoder.mapper(image_encoder.backbone(pixels)) + 1) / 42
    seeds = [script.derive_seed(0, "held out", row) for row in range(HELD_OUT)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(image_embeds.shape[1:], generator=g) for g in generators])
    t = (torch.arange(HELD_OUT, dtype=torch.float64) + 0.5) / HELD_OUT
    cosine = [torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2 for time in (t, torch.zeros_like(t))]
    signal_share = (cosine[0] / cosine[1]).clamp(1e-4, 0.9999).view(-1, 1, 1, 1)
    noisy = (signal_share.sqrt() * image_embeds + (1 - signal_share).sqrt() * noise).float()

    def compute(folder, weighting):
        prior = script.wuerstchen.WuerstchenPrior.from_pretrained(folder).eval()
        prior.set_attn_processor(AttnProcessor())  # softmax(QK) V written out
        with torch.no_grad():
            losses = ((prior(noisy, t.float(), embeds) - noise) ** 2).mean(dim=(1, 2, 3)).double()
        if weighting == "p2":
            losses *= 1 - signal_share.flatten()
        assert prior.config.dropout > 0, "or train mode would not show"
        # t is 1/12, 3/12, ... 11/12.
        bands = [losses[:1], losses[1:3], losses[3:4], losses[4:]]
        by_band = {name: band.mean().item() for name, band in zip(BANDS, bands, strict=True)}
        return {"val_loss": losses.mean().item()} | by_band

    return compute


def test_the_held_out_loss_is_that_of_the_averaged_weights_by_the_formula(
    run_with_ema, compute_by_formula, models
):
    """With the training's weighting, without its dropout, flips and empty captions."""
    folder = run_with_ema.folder
    assert list(read_curve(folder, "val_loss")) == VALIDATED
    for step, weights in {
        0: models / "prior" / "prior",
        6: folder / "checkpoint-6" / "prior_ema",
        7: folder / "prior_pipeline" / "prior",
    }.items():
        for name, number in compute_by_formula(weights, "p2").items():
            assert read_curve(folder, name)[step] == pytest.approx(number, rel=1e-5), (step, name)
    last, average = (
        compute_by_formula(folder / "checkpoint-6" / name, "p2") for name in ("prior", "prior_ema")
    )
    assert last["val_loss"] != pytest.approx(average["val_loss"], rel=1e-3), "this can tell the two apart"


def test_the_mean_of_the_bands_weighted_by_their_rows_is_the_held_out_loss(run_with_ema):
    curves = {name: read_curve(run_with_ema.folder, name) for name in ("val_loss", *BANDS)}
    assert all(list(curve) == VALIDATED for curve in curves.values())
    for step in VALIDATED:
        bands = [curves[name][step] for name in BANDS]
        mean = sum(num_rows * band for num_rows, band in zip((1, 2, 1, 2), bands, strict=True)) / 6
        assert curves["val_loss"][step] == pytest.approx(mean, rel=1e-5)


def test_two_ranks_share_the_held_out_rows_and_get_the_loss_of_one(ranks, compute_by_formula, models):
    """Here a fraction of the rows is held out; 0.4 of 14 are 6."""
    folder = ranks[0].folder
    losses = read_curve(folder, "val_loss")
    assert list(losses) == [0, 2, 4]
    for step, weights in {
        0: models / "prior" / "prior",
        2: folder / "checkpoint-2" / "prior",
        4: folder / "checkpoint-4" / "prior",
    }.items():
        expected = compute_by_formula(weights, "none")["val_loss"]
        assert losses[step] == pytest.approx(expected, rel=1e-5), step
    batches = [read_record(run, rank)["held_out"] for rank, run in enumerate(ranks)]
    assert [[len(pixels) for pixels, *_ in rank[:2]] for rank in batches] == [[2, 2], [2, 2]]
    assert [len(rank) for rank in batches] == [6, 3], "batches, in three validations"


def test_the_held_out_loss_is_the_same_with_cached_latents(
    train, compute_by_formula, models, small, tmp_path
):
    flags = {"validation_prompts": None, "max_train_steps": 1, "random_flip": False, "cache_dir": tmp_path}
    run = train(train_data_dir=small, cache_latents=True, **RUN | flags)
    assert run.returncode == 0, run
    expected = compute_by_formula(models / "prior" / "prior", "none")
    assert read_curve(run.folder, "val_loss")[0] == pytest.approx(expected["val_loss"], rel=1e-5)


def test_held_out_rows_are_never_trained_on_and_all_others_are(run_with_ema, small, held_out_rows):
    images, record = to_bytes(read_images(small, 64)), read_record(run_with_ema)
    row_of = {image.numpy().tobytes(): row for row, image in enumerate(images)}
    row_of |= {image.flip(-1).numpy().tobytes(): row for row, image in enumerate(images)}  # --random_flip
    trained = [row_of[sample] for sample in record["trained"]]
    held_out = [
        row_of[sample.numpy().tobytes()] for pixels, *_ in record["held_out"][:2] for sample in pixels
    ]
    assert len(trained) == 7 * 4
    assert sorted(held_out) == sorted(held_out_rows)
    assert set(trained) == set(range(NUM_ROWS)) - set(held_out_rows)
    assert ": 8 rows, " in run_with_ema.output
    epochs = {step: step / 2 for step in range(1, 8)}
    assert read_curve(run_with_ema.folder, "epoch") == epochs, "of eight rows"


def test_every_validation_uses_the_same_rows_captions_noise_and_timesteps(run_with_ema):
    batches = read_record(run_with_ema)["held_out"]
    assert len(batches) == 2 * len(VALIDATED)
    for number, batch in enumerate(batches):
        first = batches[number % 2]
        assert all(torch.equal(left, right) for left, right in zip(batch, first, strict=True))


def test_neither_validation_nor_trackers_change_a_bit_of_the_training(run_with_ema, train, small):
    """The same rows are held out; no images, other intervals and no trackers."""
    flags = {"validation_prompts": None, "validation_steps": None, "validation_epochs": 50}
    other = train(train_data_dir=small, **WITH_EMA | flags | {"report_to": "none"})
    assert other.returncode == 0, other
    steps = list(read_curve(other.folder, "val_loss"))
    assert steps == [0, 2, 7], "before the first step, after the first epoch and at the end"
    assert not (other.folder / "samples").exists()
    for name in (
        "checkpoint-3/prior",
        "checkpoint-6/prior",
        "checkpoint-6/prior_ema",
        "prior_pipeline/prior",
    ):
        left, right = (
            load_file(run.folder / name / "diffusion_pytorch_model.safetensors")
            for run in (other, run_with_ema)
        )
        assert same_weights(left, right), name
    for column in ("train_loss", "grad_norm", "lr", "epoch"):
        assert read_curve(other.folder, column) == read_curve(run_with_ema.folder, column)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "half"])
def test_a_validation_split_that_is_not_a_positive_number_is_refused(models, small, tmp_path, capsys, value):
    with pytest.raises(SystemExit) as end:
        script.parse_args(tiny_args(models, small, tmp_path / "out", validation_split=value))
    assert end.value.code != 0
    assert "--validation_split" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", [str(NUM_ROWS), "0.99", "1.5"])
def test_a_validation_split_of_all_rows_or_of_a_fraction_of_a_row_is_refused(train, small, value):
    run = train(train_data_dir=small, **RUN | {"validation_split": value})
    assert run.returncode != 0
    assert "--validation_split" in run.output.splitlines()[-1], run
    assert "Traceback" not in run.output


# ---------------------------------------------------------------------------------- the images of the prompts


def test_images_are_generated_before_training_every_so_many_steps_and_at_the_end(run_with_ema):
    images = read_samples(run_with_ema.folder)
    assert list(images) == [(step, prompt) for step in VALIDATED for prompt in range(3)]
    assert len({image.tobytes() for image in images.values()}) == len(images)
    before = {key: image.astype(int) for key, image in images.items() if key[0] == 0}
    for prompt in range(3):
        others = [
            np.abs(before[0, prompt] - before[0, other]).mean() for other in range(3) if other != prompt
        ]
        later = np.abs(before[0, prompt] - images[2, prompt]).mean()
        assert later < min(others), "the same noise: two steps change an image less than another prompt does"


def test_images_are_generated_with_the_averaged_weights(run_with_ema, models):
    weights = read_record(run_with_ema)["weights"]
    assert list(weights) == VALIDATED
    for step, folder in {
        0: models / "prior" / "prior",
        6: run_with_ema.folder / "checkpoint-6" / "prior_ema",
        7: run_with_ema.folder / "prior_pipeline" / "prior",
    }.items():
        expected = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert same_weights(weights[step], expected), step
    assert not same_weights(weights[6], run_with_ema.prior(6)), "this can tell the two apart"


def test_ranks_share_the_prompts_and_generate_what_one_rank_does(ranks, run_with_ema):
    images = read_samples(ranks[0].folder)
    assert list(images) == [(step, prompt) for step in (0, 4) for prompt in range(3)]
    first = {key: image for key, image in read_samples(run_with_ema.folder).items() if key[0] == 0}
    assert equal_images({key: image for key, image in images.items() if key[0] == 0}, first)
    counts = [read_record(run, rank)["num_images"] for rank, run in enumerate(ranks)]
    assert counts == [6, 2], "in three validations, one of which failed"


def test_one_prompt_is_enough_for_two_ranks(ranks_with_one_prompt, run_with_ema):
    images = read_samples(ranks_with_one_prompt[0].folder)
    assert list(images) == [(0, 0), (2, 0), (4, 0)]
    assert np.array_equal(images[0, 0], read_samples(run_with_ema.folder)[0, 2])


def test_no_memory_for_an_image_is_a_warning_with_advice(ranks, ranks_with_one_prompt):
    """On one rank of two; training continues, ends in the same bits, and the next images are generated."""
    (warning,) = [line for line in ranks[0].output.splitlines() if "No validation images at step 2" in line]
    assert "WARNING" in warning
    assert "out of memory" in warning
    assert "--train_batch_size" in warning
    assert not any("Traceback" in run.output for run in ranks)
    assert {step for step, _ in read_samples(ranks[0].folder)} == {0, 4}
    assert list(read_curve(ranks[0].folder, "val_loss")) == [0, 2, 4]
    run, other = ranks[0], ranks_with_one_prompt[0]
    for step in (2, 4, None):
        assert same_weights(run.prior(step), other.prior(step)), step
    for column in ("train_loss", "val_loss"):
        assert read_curve(run.folder, column) == read_curve(other.folder, column)


def test_the_decoder_is_loaded_once(run_with_ema, ranks):
    first, second = (read_record(run, rank)["num_decoder_loads"] for rank, run in enumerate(ranks))
    assert second == 1, "in three validations, one of which failed"
    single = read_record(run_with_ema)["num_decoder_loads"]
    assert first == single == 2, "and once more to be saved, in float32"


class Decoder:
    """A stand-in for the decoder's pipeline on a machine with a GPU, which records the devices it is moved
    to."""

    decoder = SimpleNamespace(config=SimpleNamespace(patch_size=2, c_hidden=[8, 8, 16, 16]))
    config = SimpleNamespace(latent_dim_scale=10.67)

    def __init__(self, fails):
        self.devices, self.fails = ["cpu"], fails

    def to(self, device):
        self.devices.append(getattr(device, "type", device))
        return self

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, latents, prompt, **_):
        assert self.devices[-1] == "cuda"
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return SimpleNamespace(images=[Image.new("RGB", (128, 128))])


@pytest.mark.parametrize("fails", [False, True], ids=["", "out of memory"])
def test_the_decoder_leaves_the_device_while_it_is_not_used(models, monkeypatch, fails):
    decoder, loads = Decoder(fails), []
    monkeypatch.setattr(script, "load_decoder", lambda *args: loads.append(args) or decoder)
    PartialState()  # the logger needs it
    validator = script.Validator(
        accelerator=SimpleNamespace(
            device=SimpleNamespace(type="cuda"),
            is_main_process=True,
            num_processes=1,
            autocast=nullcontext,
            split_between_processes=nullcontext,
        ),
        args=SimpleNamespace(resolution=64, validation_prompts=PROMPTS, validation_size=None, seed=0),
        prior=script.wuerstchen.WuerstchenPrior.from_pretrained(models / "prior" / "prior").eval(),
        ema_prior=None,
        noise_scheduler=script.DDPMWuerstchenScheduler(),
        encode=None,
        empty_embeds=torch.zeros(1, 77, 32),
        prompt_embeds=[torch.zeros(1, 77, 32)] * 3,
        held_out_dataloader=None,
        signals=[],
    )
    for _ in range(2):
        assert len(validator.generate_images(2)) == (0 if fails else 3)
    assert decoder.devices == ["cpu", "cuda", "cpu", "cuda", "cpu"]
    assert len(loads) == 1


# ------------------------------------------------------------------------------------------- further sizes


SIZED = {
    "max_train_steps": 2,
    "validation_steps": 2,
    "validation_prompts": PROMPTS[:2],
    "validation_size": [128, 256, 256, 128],
}


@pytest.fixture
def sized(train, small):
    run = train(train_data_dir=small, **SIZED)
    assert run.returncode == 0, run
    return run


def test_each_prompt_is_generated_at_each_size(sized, models):
    """The last ones are what the saved pipeline generates at that size."""
    samples = sized.folder / "samples"
    names = [
        f"step-{step:07d}-prompt-{index}{size}.png"
        for step in (0, 2)
        for index in (0, 1)
        for size in SUFFIXES
    ]
    assert sorted(file.name for file in samples.iterdir()) == sorted([*names, "contact-sheet.png"])
    pipeline = script.diffusers.AutoPipelineForText2Image.from_pretrained(sized.folder)
    pipeline.set_progress_bar_config(disable=True)
    for suffix, (width, height) in SUFFIXES.items():
        for index, prompt in enumerate(PROMPTS[:2]):
            with Image.open(samples / f"step-0000002-prompt-{index}{suffix}.png") as image:
                assert image.size == (width, height) and image.info["prompt"] == prompt
                generated = np.asarray(image).astype(int)
            expected = pipeline(
                prompt,
                width=width,
                height=height,
                prior_timesteps=script.wuerstchen.DEFAULT_STAGE_C_TIMESTEPS,
                prior_guidance_scale=script.GUIDANCE_SCALE,
                decoder_guidance_scale=0.0,
                generator=torch.Generator().manual_seed(0),
            ).images[0]
            assert np.abs(np.asarray(expected).astype(int) - generated).max() <= 1


SUFFIXES = {"": (128, 128), "-128x256": (128, 256), "-256x128": (256, 128)}


def test_the_contact_sheet_has_a_row_for_each_prompt_and_size(sized, tmp_path, monkeypatch):
    """Squares first. Each cell has its image whole, between white margins."""
    made = {}
    make_grid = script.make_image_grid
    monkeypatch.setattr(
        script,
        "make_image_grid",
        lambda images, **kw: made.update(kw, images=images) or make_grid(images, **kw),
    )
    shutil.copytree(sized.folder / "samples", tmp_path / "samples")
    script.save_contact_sheet(tmp_path, PROMPTS[:2], [None, (128, 256), (256, 128)])
    assert (made["rows"], made["cols"]) == (6, 2)
    cells = iter(made["images"])
    for (suffix, (width, height)), index, step in itertools.product(SUFFIXES.items(), (0, 1), (0, 2)):
        cell = np.asarray(next(cells)).astype(int)
        with Image.open(tmp_path / "samples" / f"step-{step:07d}-prompt-{index}{suffix}.png") as image:
            scaled = image.resize([192 * side // max(width, height) for side in (width, height)])
        left, top = (192 - scaled.width) // 2, (192 - scaled.height) // 2
        inside = cell[top : top + scaled.height, left : left + scaled.width]
        assert np.array_equal(inside, np.asarray(scaled))
        assert cell.sum() == inside.sum() + 255 * 3 * (192 * 192 - scaled.width * scaled.height)


def test_a_size_that_the_decoder_does_not_support_becomes_the_nearest(train, small):
    run = train(train_data_dir=small, **SIZED | {"validation_size": [150, 230], "max_train_steps": 1})
    assert run.returncode == 0, run
    assert run.output.count("--validation_size: the decoder makes (128, 256) of (150, 230)") == 1
    with Image.open(run.folder / "samples" / "step-0000000-prompt-1-150x230.png") as image:
        assert image.size == (128, 256)


@pytest.mark.parametrize(
    ("size", "latents"), [((1024, 1536), (24, 36)), ((1536, 1024), (36, 24)), ((1024, 1024), (24, 24))]
)
def test_the_guides_sizes_are_possible_with_the_published_decoder(published_decoder, size, latents):
    sides = [script.decoder_image_size(published_decoder, pixels * 32 / 42.67) for pixels in size]
    assert tuple(sides) == size
    assert tuple(math.ceil(side / 42.67) for side in sides) == latents, (
        "as the prior's pipeline computes them"
    )


# ------------------------------------------------------------------------------------ when validation happens


def list_due_steps(num_steps, num_rows, batch_size, **flags):
    """The steps up to `num_steps` after which the script validates."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    args = script.parse_args(["--train_data_dir=images", *words])
    plan = script.SamplePlan(
        seed=0,
        num_rows=num_rows,
        rows_hash="",
        num_processes=1,
        train_batch_size=batch_size,
        gradient_accumulation_steps=1,
    )
    return [step for step in range(num_steps + 1) if script.is_validation_due(step, args, plan)]


@pytest.mark.parametrize("interval", [1, 4, 7])
def test_validation_is_due_before_the_first_step_and_every_so_many_steps(interval):
    """Whatever the epochs are."""
    due = list_due_steps(20, num_rows=5, batch_size=2, validation_steps=interval, validation_epochs=1)
    assert due == list(range(0, 21, interval))


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("num_rows, batch_size", [(8, 4), (8, 3), (7, 7), (3, 8), (5, 1)])
def test_validation_is_due_after_the_first_epoch_and_every_so_many_from_there(epochs, num_rows, batch_size):
    """An epoch ends with the step that contains its last row. A step may end several epochs."""
    ends = [math.ceil((epoch + 1) * num_rows / batch_size) for epoch in range(0, 100, epochs)]
    due = list_due_steps(30, num_rows=num_rows, batch_size=batch_size, validation_epochs=epochs)
    assert due == [0, *sorted({step for step in ends if step <= 30})]


@pytest.fixture(scope="module")
def published_decoder(models):
    """A decoder pipeline whose decoder has the published sizes, without weights."""
    with torch.device("meta"):
        decoder = script.wuerstchen.WuerstchenDiffNeXt(
            patch_size=2, c_hidden=[320, 640, 1280, 1280], blocks=[1, 1, 1, 1]
        )
    components = script.wuerstchen.WuerstchenDecoderPipeline.from_pretrained(models / "decoder").components
    return script.wuerstchen.WuerstchenDecoderPipeline(**components | {"decoder": decoder})


@pytest.mark.parametrize(("resolution", "size"), [(768, 1024), (512, 640)])
def test_images_have_the_size_that_the_trained_latents_stand_for(published_decoder, resolution, size):
    assert script.decoder_image_size(published_decoder, resolution) == size


@pytest.mark.parametrize("resolution", range(32, 1600, 96))
def test_every_resolution_has_a_nearby_size_that_the_decoder_can_generate(published_decoder, resolution):
    size = script.decoder_image_size(published_decoder, resolution)
    side = math.ceil(size / 42.67)  # of the latents, as in the prior's pipeline
    decoder_side = int(side * 10.67)  # of the decoder's latents, as in its pipeline
    assert decoder_side % 16 == 0, "patches of 2 are halved three times"
    assert decoder_side > 0
    assert size % 128 == 0
    assert abs(side - resolution / 32) <= 2.5, "three latents are 128 pixels"
