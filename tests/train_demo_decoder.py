# SPDX-License-Identifier: Apache-2.0
"""Trains the decoder of the README's first command, in half an hour on one core:

    python tests/train_demo_decoder.py FOLDER

First an autoencoder learns the 64 bundled images at 128 pixels: it becomes the decoder repo's `vqgan`, used
without its quantization. Then the decoder, a diffusion model, learns to generate the autoencoder's latents
from those of the seeded random encoder in tiny_models.py. FOLDER/*.safetensors, in half precision, belong in
tests/data/demo-decoder; FOLDER/autoencoder.png and FOLDER/decoder.png show what they make of the images.
"""

import argparse
import json
from pathlib import Path

import tiny_models
import torch
import torch.nn.functional as F
from diffusers import DDPMWuerstchenScheduler
from diffusers.utils import make_image_grid
from safetensors.torch import save_file
from tiny_models import DECODER_TEXT_WIDTH, DEMO_RESOLUTION, IMAGES, LATENT_MEAN
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import train_text_to_image_prior as script

SIDE = 128  # pixels of the images that DEMO_RESOLUTION stands for


def load_pixels(resolution):
    """The bundled images in the order of their rows, (64, 3, resolution, resolution) uint8."""
    rows = [json.loads(line) for line in (IMAGES / "metadata.jsonl").read_text().splitlines()]
    paths = [{"path": str(IMAGES / row["file_name"]), "bytes": None} for row in rows]
    image_transforms = script.make_image_transforms((resolution, resolution))
    return torch.stack([image_transforms(script.load_image(path)) for path in paths])


def make_optimizer(model, learning_rate, steps):
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)


def train_autoencoder(vqgan, pixels, steps, batch_size=8):
    """Teaches `vqgan` to reconstruct the images, also from latents that are a little off."""
    vqgan.train()
    optimizer, lr_scheduler = make_optimizer(vqgan, 3e-3, steps)
    for _ in (progress := tqdm(range(steps), "Autoencoder")):
        images = pixels[torch.randperm(len(pixels))[:batch_size]]
        latents = vqgan.encode(images, return_dict=False)[0]
        reconstructed = vqgan.decode(latents + 0.1 * torch.randn_like(latents)).sample
        loss = F.l1_loss(reconstructed, images) + 0.5 * F.mse_loss(reconstructed, images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        progress.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    vqgan.eval()


def train_decoder(decoder, conditions, targets, steps, batch_size=16):
    """Teaches `decoder` to denoise `targets`, the autoencoder's latents, given `conditions`, those of the
    encoder. Returns the average of its weights.

    Noise is added to the conditions, since a prior's latents are not exact. The squared error of the
    predicted noise is divided by alpha_bar: where there is much noise it says little about the image.
    """
    decoder.train()
    decoder.clip_mapper.weight.requires_grad_(False)
    average = AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer, lr_scheduler = make_optimizer(decoder, 2e-3, steps)
    noise_scheduler = DDPMWuerstchenScheduler()
    text, ones = torch.zeros(batch_size, 1, DECODER_TEXT_WIDTH), torch.ones(batch_size)
    for _ in (progress := tqdm(range(steps), "Decoder")):
        rows = torch.randint(len(targets), (batch_size,))
        deviation = 0.3 * LATENT_MEAN * torch.rand(batch_size, 1, 1, 1)
        condition = conditions[rows] + deviation * torch.randn_like(conditions[rows])
        noise, timesteps = torch.randn_like(targets[rows]), torch.rand(batch_size)
        noisy = noise_scheduler.add_noise(targets[rows], noise, timesteps)
        pred_noise = decoder(noisy, r=timesteps, effnet=condition, clip=text)
        alpha_bar = noise_scheduler.add_noise(ones, torch.zeros_like(ones), timesteps) ** 2
        losses = F.mse_loss(pred_noise, noise, reduction="none").mean(dim=(1, 2, 3))
        loss = (losses / alpha_bar.clamp(min=0.05)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        average.update_parameters(decoder)
        progress.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    return average.module.eval()


@torch.no_grad()
def decode(decoder, vqgan, conditions, seed=0):
    """Images for latents of the encoder or a prior, (N, 3, 128, 128), as by WuerstchenDecoderPipeline."""
    noise_scheduler = DDPMWuerstchenScheduler()
    noise_scheduler.set_timesteps(12)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(conditions), 4, SIDE // 4, SIDE // 4, generator=generator)
    text = torch.zeros(len(conditions), 1, DECODER_TEXT_WIDTH)
    for timestep in noise_scheduler.timesteps[:-1]:
        timesteps = timestep.expand(len(latents))
        pred_noise = decoder(latents, r=timesteps, effnet=conditions, clip=text)
        latents = noise_scheduler.step(pred_noise, timesteps, latents, generator=generator).prev_sample
    return vqgan.decode(vqgan.config.scale_factor * latents).sample.clamp(0, 1)


def nearest_images(images, pixels):
    """For each of the images, (N, 3, 128, 128), the row of the nearest of `pixels`, both in [0, 1]."""
    return torch.cdist(images.flatten(1), pixels.flatten(1)).argmin(1)


def report(name, images, pixels, folder):
    """Prints how many images are nearest to their own, and writes all of them."""
    correct = (nearest_images(images, pixels) == torch.arange(len(pixels))).sum().item()
    error = F.mse_loss(images, pixels).item()
    print(f"{name}: {correct} of {len(pixels)} images are nearest to their own, squared error {error:.4f}")
    make_image_grid([to_pil_image(image) for image in images], rows=4, cols=16).save(folder / f"{name}.png")


def save_half(model, file):
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, file)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--autoencoder_steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=10000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    decoder, vqgan = tiny_models.make_demo_decoder()
    pixels = load_pixels(SIDE).float() / 255
    train_autoencoder(vqgan, pixels, args.autoencoder_steps)
    save_half(vqgan, args.folder / "vqgan.safetensors")
    with torch.no_grad():
        targets = vqgan.encode(pixels, return_dict=False)[0]
        report("autoencoder", vqgan.decode(targets).sample.clamp(0, 1), pixels, args.folder)
        encoder = tiny_models.make_encoder(seed=4, resolution=DEMO_RESOLUTION)  # of `make_demo_models`
        conditions = encoder(script.normalize_pixels(load_pixels(DEMO_RESOLUTION)))
    decoder = train_decoder(decoder, conditions, targets, args.steps)
    save_half(decoder, args.folder / "decoder.safetensors")
    report("decoder", decode(decoder, vqgan, conditions), pixels, args.folder)


if __name__ == "__main__":
    main()
