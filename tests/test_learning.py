# SPDX-License-Identifier: Apache-2.0
"""Training teaches, and each piece of it matters: with one of them wrong, the pictures are not learned."""

from types import SimpleNamespace

import pytest
import torch
from conftest import PICTURES
from learning import flags, load_pipeline, make_models, recall, rows_of

import train_text_to_image_prior as script

PICTURE_COUNT = 16


@pytest.fixture(scope="module")
def pupil(tmp_path_factory):
    """A folder of models that know nothing."""
    folder = tmp_path_factory.mktemp("learning")
    make_models(folder)
    return folder


@pytest.fixture
def learn(pupil, run_main, tmp_path):
    """learn(**flags): what a run of the command has learned: recall and error of its saved pipeline."""

    def learn(guidance_scale=1.0, **more):
        settings = {"train_data_dir": PICTURES, "max_train_samples": PICTURE_COUNT} | more
        done = run_main(flags(pupil, tmp_path / "run", **settings))
        assert done.returncode == 0, done
        # What should have been learned; here and not in the run a test may have patched the script.
        _, captions, latents = rows_of(flags(pupil, tmp_path / "run", **settings))
        return recall(load_pipeline(tmp_path / "run"), captions, latents, guidance_scale)

    return learn


def has_learned(found):
    """Chance is 1 in 16, and an error of about 1.2. Three seeds gave recalls of 1.00 and errors of 0.17 to 0.21."""
    return found["top1"] >= 0.9 and found["error"] < 0.4


def test_captions_are_learned_by_heart(learn):
    found = learn()
    assert has_learned(found), found


# -------------------------------------------------------------------------------- with one of its pieces wrong


def other_layer(patch):
    """The last layer but one, as Stable Diffusion 2 takes it."""

    def embed_tokens(ids, mask, text_encoder):
        return text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]

    patch.setattr(script, "embed_tokens", embed_tokens)


def no_mask(patch):
    """Padding is attended to as if it were text."""

    def embed_tokens(ids, mask, text_encoder):
        return text_encoder(ids).last_hidden_state

    patch.setattr(script, "embed_tokens", embed_tokens)


def half_the_scale(patch):
    patch.setattr(script, "LATENT_MEAN", 84.0)


def twice_the_scale(patch):
    patch.setattr(script, "LATENT_MEAN", 21.0)


def unscaled(patch):
    patch.setattr(script, "LATENT_MEAN", 1.0)


def wrong_sign(patch):
    """The target is -noise."""
    functional = torch.nn.functional

    def mse_loss(prediction, target, **settings):
        return functional.mse_loss(prediction, -target, **settings)

    patch.setattr(script, "F", SimpleNamespace(mse_loss=mse_loss))


def reversed_times(patch):
    """The noise is that of t, and the prior is told 1 - t."""
    forward = script.wuerstchen.WuerstchenPrior.forward

    def reversed_forward(self, x, r, c):
        return forward(self, x, 1 - r, c)

    patch.setattr(script.wuerstchen.WuerstchenPrior, "forward", reversed_forward)


def swapped_schedule(patch):
    """Where all should be noise there is none, and the other way round."""
    add_noise = script.DDPMWuerstchenScheduler.add_noise

    def swapped(self, samples, noise, timesteps):
        return (
            add_noise(self, noise, samples, timesteps)
            if samples.dim() == 4
            else add_noise(self, samples, noise, timesteps)
        )

    patch.setattr(script.DDPMWuerstchenScheduler, "add_noise", swapped)


def other_captions(patch):
    """Every picture has the caption of another."""
    load = script.load_train_dataset

    def rolled(args, seed):
        rows = load(args, seed)
        captions = rows[args.caption_column][:]
        return rows.remove_columns(args.caption_column).add_column(args.caption_column, captions[1:] + captions[:1])

    patch.setattr(script, "load_train_dataset", rolled)


def mirrored(patch):
    """Pictures are learned mirrored."""
    normalize = script.encoding.normalize_pixels
    patch.setattr(script.encoding, "normalize_pixels", lambda image: normalize(image).flip(-1))


SLOW = [
    other_captions,
    other_layer,
    no_mask,
    half_the_scale,
    twice_the_scale,
    unscaled,
    reversed_times,
    swapped_schedule,
    mirrored,
]


@pytest.mark.parametrize("fault", [wrong_sign, *(pytest.param(fault, marks=pytest.mark.slow) for fault in SLOW)])
def test_with_one_piece_wrong_they_are_not(learn, pupil, run_main, tmp_path, fault):
    """Which faults this cannot find was tried, too: leaving out the + 1, s = 0.08 in the schedule, a linear one, alpha
    in place of its root, timesteps rounded to bf16. They train and sample by rules that are almost the same."""
    argv = flags(pupil, tmp_path / "run", train_data_dir=PICTURES, max_train_samples=PICTURE_COUNT)
    _, captions, latents = rows_of([*argv])
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        done = run_main([*argv, f"--cache_dir={tmp_path / 'cache'}"])
    assert done.returncode == 0, done
    found = recall(load_pipeline(tmp_path / "run"), captions, latents)
    assert not has_learned(found), found


@pytest.mark.slow
def test_caption_dropout_keeps_guidance_sane(learn):
    """Without it the empty caption means nothing, and guidance pulls the samples far off."""
    error = {share: learn(4.0, caption_dropout=share, overwrite_output_dir=True)["error"] for share in (0.0, 0.1)}
    assert error[0.1] < 1 < 2 < error[0.0], error
