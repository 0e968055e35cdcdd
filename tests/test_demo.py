# SPDX-License-Identifier: Apache-2.0
"""The README's first command draws: at its end, each prompt's image is that of its own emoji."""

import json
import re
import shlex

import pytest
import tiny_models
import torch
from conftest import SCRIPT, sample_finely, script
from train_demo_decoder import SIDE, decode, load_pixels, nearest_images

README = SCRIPT.with_name("README.md")


@pytest.fixture(scope="module")
def pixels():
    return load_pixels(SIDE).float() / 255


@pytest.mark.slow
@torch.no_grad()
def test_the_decoder_draws_the_bundled_images(pixels):
    """Each of the 64 from its own latents, and nearly all of them also from latents that are a little off."""
    decoder, vqgan = tiny_models.load_demo_decoder()
    resolution = tiny_models.DEMO_RESOLUTION
    encoder = tiny_models.make_encoder(seed=4, resolution=resolution)
    latents = encoder(script.normalize_pixels(load_pixels(resolution)))
    assert nearest_images(decode(decoder, vqgan, latents), pixels).tolist() == list(range(64))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = latents + 0.25 * script.LATENT_MEAN * noise
    correct = nearest_images(decode(decoder, vqgan, noisy), pixels) == torch.arange(64)
    assert correct.sum() >= 60
    correct = nearest_images(torch.rand(8, 3, SIDE, SIDE), pixels) == torch.arange(8)
    assert correct.sum() < 4, "the test can fail"


def read_first_command(folder):
    """The script's arguments in the README's first command, with `folder` in place of demo/."""
    command = re.search(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    words = [word for word in shlex.split(command) if word != "\n"]
    arguments = words[words.index("train_text_to_image_prior.py") + 1 :]
    assert "python tests/tiny_models.py demo/models" in command
    folders = {"=demo/": f"={folder}/", "=tests/": f"={README.parent}/tests/"}
    for relative, absolute in folders.items():
        arguments = [word.replace(relative, absolute) for word in arguments]
    return arguments


@pytest.mark.slow
def test_the_first_command_of_the_readme_draws_its_prompts(tmp_path, train, images, pixels):
    tiny_models.make_demo_models(tmp_path / "models")
    arguments = [*read_first_command(tmp_path), "--validation_steps=2800"]  # images only at start and end
    run = train(sample_finely, argv=arguments, output_dir=tmp_path / "run", timeout=900)
    assert run.returncode == 0, run
    captions = [json.loads(line)["text"] for line in (images / "metadata.jsonl").read_text().splitlines()]
    expected = [captions.index(prompt) for prompt in script.parse_args(arguments).validation_prompts]
    samples, found = run.samples(), []
    for step in sorted({step for step, _ in samples}):
        drawn = torch.stack([torch.tensor(samples[step, prompt]) for prompt in range(len(expected))])
        nearest = nearest_images(drawn.permute(0, 3, 1, 2) / 255, pixels)
        found.append((nearest == torch.tensor(expected)).sum().item())
    assert len(expected) == 8 and len(found) == 2
    assert found[0] <= 2 and found[-1] == len(expected), found
