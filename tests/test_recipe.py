# SPDX-License-Identifier: Apache-2.0
"""The original training's recipe: which timesteps, captions and squares are drawn, against closed forms."""

import functools
import json
import random

import numpy as np
import pytest
import torch
from conftest import PICTURES, TESTS, tiny_args
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizerFast

import modeling_efficient_net_encoder as encoding
import train_text_to_image_prior as script

ROWS = [json.loads(line) for line in (PICTURES / "metadata.jsonl").read_text().splitlines()]


def drawn(sampling, count=200_000, seed=0):
    torch.manual_seed(seed)
    return script.draw_timesteps(count, sampling, torch.device("cpu"))


def test_stretched_timesteps_reach_one_with_the_originals_share_and_mean():
    """(1 - u) * 1.08 + 0.001 is uniform on [0.001, 1.081]; what is above 1 becomes 1."""
    t = drawn("stretched").double()
    assert t.min() >= 0.001 and t.max() == 1
    share = 0.081 / 1.08
    assert (t == 1).double().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / len(t)) ** 0.5)
    mean = ((1 - 0.001**2) / 2 + 0.081) / 1.08
    assert t.mean().item() == pytest.approx(mean, abs=4 * t.std().item() / len(t) ** 0.5)
    below = t[t < 1]
    edges = torch.linspace(0.001, 1, 11, dtype=torch.float64)
    counts = torch.histogram(below, edges).hist
    assert (counts - len(below) / 10).abs().max() < 5 * (len(below) / 10) ** 0.5, "even below 1"


def test_uniform_timesteps_are_the_references_and_never_one():
    t = drawn("uniform")
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() < 1
    assert t.double().mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / len(t)) ** 0.5)
    torch.manual_seed(0)
    assert torch.equal(t, torch.rand(len(t)))


def arguments(**flags):
    settings = {"train_data_dir": PICTURES, "resolution": 64, "report_to": "none"} | flags
    return script.parse_args([f"--{name}" if v is True else f"--{name}={v}" for name, v in settings.items()])


def squares(positions=range(64), seed=0, **flags):
    """The pixels that samples are given, by the data set's row."""
    args = arguments(**flags)
    rows = script.load_train_dataset(args, seed)
    tokenizer = CLIPTokenizerFast.from_pretrained(TESTS / "data" / "clip-tokenizer", model_max_length=77)
    preprocess = functools.partial(script.preprocess_train, tokenizer=tokenizer, args=args)
    samples = encoding.TrainSamples(rows, preprocess, seed, False)
    read = [samples[position] for position in positions]
    return {sample["row"]: sample["effnet_pixel_values"] for sample in read}


@pytest.fixture(scope="module")
def plain():
    return squares()


def test_half_of_the_pictures_are_mirrored_and_nothing_else_is_done_to_them(plain):
    flipped = [squares(range(64 * epoch, 64 * epoch + 64), random_flip=True) for epoch in range(4)]
    mirrored = 0
    for epoch in flipped:
        for row, pixels in epoch.items():
            as_is, other = torch.equal(pixels, plain[row]), torch.equal(pixels, plain[row].flip(-1))
            assert as_is or other
            mirrored += not as_is
    assert 256 / 2 - 4 * 8 < mirrored < 256 / 2 + 4 * 8, "four deviations of a fair coin"
    again = squares(range(64), random_flip=True)
    assert all(torch.equal(again[row], flipped[0][row]) for row in again), "a function of seed and position"


def test_random_crops_are_places_of_the_resized_picture_spread_over_all_of_it():
    """In a picture whose colours say where they are."""
    across = np.arange(192, dtype=np.uint8)[None, :].repeat(64, 0)
    picture = Image.fromarray(np.stack([across] * 3, -1))
    lefts = []
    for seed in range(300):
        square = np.asarray(encoding.crop_square(picture, 64, random.Random(seed)))
        left = int(square[0, 0, 0])
        assert np.array_equal(square[..., 0], across[:, left : left + 64])
        lefts.append(left)
    assert (min(lefts), max(lefts)) == (0, 128)
    deviation = 129 / 12**0.5
    assert np.mean(lefts) == pytest.approx(64, abs=4 * deviation / 300**0.5)
    centre = np.asarray(encoding.crop_square(picture, 64))
    assert np.array_equal(centre[..., 0], across[:, 64:128])


def test_without_the_flags_every_epoch_sees_the_same_squares(plain):
    later = squares(range(128, 192))
    assert all(torch.equal(later[row], plain[row]) for row in plain)


def test_a_dropped_captions_embedding_is_the_encoded_empty_string(run_main, models, pictures, tmp_path, monkeypatch):
    """A sample at a time: of a batch some captions are dropped and some are not."""
    seen = tmp_path / "seen.pt"
    encode = script.encode_batch

    def watched(text_encoder, image_encoder, batch):
        prompt_embeds, latents = encode(text_encoder, image_encoder, batch)
        torch.save(prompt_embeds, seen)
        return prompt_embeds, latents

    monkeypatch.setattr(script, "encode_batch", watched)
    flags = {"caption_dropout": 0.5, "max_train_steps": 1, "train_batch_size": 16}
    done = run_main(tiny_args(models, pictures, tmp_path / "out", **flags))
    assert done.returncode == 0, done
    tokenizer = CLIPTokenizerFast.from_pretrained(models / "prior" / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(models / "prior" / "text_encoder")
    tokens = tokenizer([""], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        empty = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
    dropped = [(embeds - empty).abs().max().item() < 1e-5 for embeds in torch.load(seen)]
    assert 2 <= sum(dropped) <= 14
    assert len(dropped) == 16


EXACT = {
    "timestep_sampling": "stretched",
    "loss_weighting": "p2",
    "caption_dropout": 0.3,
    "random_crop": True,
    "random_flip": True,
    "caption_column": "captions",
    "validation_split": 8,
    "checkpointing_steps": 1,
    "max_train_steps": 4,
    "use_ema": True,
}


def test_a_run_with_all_of_the_recipe_resumes_exactly(run_main, models, pictures, tmp_path):
    whole = run_main(tiny_args(models, pictures, tmp_path / "whole", **EXACT))
    on = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-2"}
    resumed = run_main(tiny_args(models, pictures, tmp_path / "on", **EXACT, **on))
    assert whole.returncode == resumed.returncode == 0, (whole, resumed)
    for name in ("prior/diffusion_pytorch_model.safetensors", "prior_ema/diffusion_pytorch_model.safetensors"):
        files = [tmp_path / run / "checkpoint-4" / name for run in ("whole", "on")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    other = run_main(tiny_args(models, pictures, tmp_path / "other", **EXACT | {"timestep_sampling": "uniform"}))
    assert other.returncode == 0, other
    name = "checkpoint-4/prior/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "other" / name).read_bytes() != (tmp_path / "whole" / name).read_bytes()
