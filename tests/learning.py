# SPDX-License-Identifier: Apache-2.0
"""Whether training teaches: a small prior learns captioned pictures by heart, from random weights, through the real
command; then each caption is sampled, and the picture whose latents are nearest should be its own.

    python tests/learning.py FOLDER --train_data_dir tests/data/emoji-64 --max_train_samples 16

makes the models in FOLDER, trains, and prints the recall after each checkpoint. Flags that it does not know go to the
script. With --look it also draws FOLDER/nearest.png: captions down, checkpoints across, and in each place the picture
nearest to what was sampled.

The models are those of tiny_models.py, but for two things: the text encoder's weights are larger, so that captions
that differ by a word have embeddings that differ, and the prior has no dropout. No decoder takes part.
"""

import argparse
import json
import textwrap
from pathlib import Path

import tiny_models
import torch
from PIL import Image, ImageDraw
from tiny_models import wuerstchen
from torch import nn

import modeling_efficient_net_encoder as encoding
import train_text_to_image_prior as script

# Found by trying: 1.00 of 16 captions on three seeds. Plain loss needs about three times the updates.
RECIPE = {
    "resolution": 64,
    "train_batch_size": 32,
    "max_train_steps": 600,
    "checkpointing_steps": 600,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 100,
    "loss_weighting": "p2",
    "report_to": "none",
    "seed": 0,
}
SAMPLING_STEPS = 30


def make_models(folder, *, seed=0, **prior):
    """Models to learn with, in `prior`, `decoder` and `encoder`. `prior` goes to the prior's constructor."""
    tiny_models.make_tiny_models(folder, seed=seed, **{"dropout": 0.0} | prior)
    text_encoder = tiny_models.make_text_encoder(tiny_models.make_tokenizer(), tiny_models.PRIOR_TEXT_WIDTH, seed=seed)
    with torch.no_grad():
        for name, module in text_encoder.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(4)
            elif name.endswith("token_embedding"):
                module.weight.mul_(2)
    text_encoder.save_pretrained(folder / "prior" / "text_encoder")


def flags(folder, output_dir, **more):
    """The command line."""
    names = {f"pretrained_{name}_model_name_or_path": folder / name for name in ("prior", "decoder")}
    names["pretrained_image_encoder_name_or_path"] = folder / "encoder"
    settings = RECIPE | names | {"output_dir": output_dir, "cache_dir": folder / "cache", "cache_latents": True} | more
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]


def rows_of(argv):
    """What the script trains on with these flags: pictures, captions, and their raw latents (N, 16, side, side)."""
    args = script.parse_args(argv)
    rows = script.load_train_dataset(args, args.seed)
    encoder = encoding.EfficientNetEncoder.load(args.pretrained_image_encoder_name_or_path)
    pictures = [encoding.decode_picture(row[args.image_column]) for row in rows]
    pixels = torch.stack([encoding.normalize_pixels(encoding.crop_square(p, args.resolution)) for p in pictures])
    with torch.no_grad():
        latents = torch.cat([encoder(batch) for batch in pixels.split(64)])
    return pictures, [row[args.caption_column] for row in rows], latents


@torch.no_grad()
def sample(prior_pipeline, captions, side, guidance_scale=1.0, seed=0):
    """One set of latents for each caption, by the saved pipeline: (N, 16, side, side)."""
    prior_pipeline.set_progress_bar_config(disable=True)
    draw, pixels, drawn = torch.Generator().manual_seed(seed), int(side * 42.67), []
    for start in range(0, len(captions), 256):
        settings = {"guidance_scale": guidance_scale, "num_inference_steps": SAMPLING_STEPS, "generator": draw}
        some = prior_pipeline(captions[start : start + 256], height=pixels, width=pixels, **settings)
        drawn.append(some.image_embeddings)
    return torch.cat(drawn)


def compare(drawn, latents):
    """For each sample the rank of its own picture among all (0: the nearest), and its distance to it, relative."""
    distances = torch.cdist(drawn.flatten(1).double(), latents.flatten(1).double())
    own = distances.diagonal()
    return (distances < own[:, None]).sum(1), own / (latents.double() + 1).flatten(1).norm(dim=1)


def recall(prior_pipeline, captions, latents, guidance_scale=1.0, draws=4):
    """The share of samples whose own picture is the nearest, among the five nearest, and the median relative error."""
    all_drawn = [sample(prior_pipeline, captions, latents.shape[-1], guidance_scale, seed) for seed in range(draws)]
    ranks, errors = zip(*(compare(drawn, latents) for drawn in all_drawn), strict=True)
    ranks, errors = torch.cat(ranks), torch.cat(errors)
    return {
        "top1": (ranks < 1).double().mean().item(),
        "top5": (ranks < 5).double().mean().item(),
        "error": errors.median().item(),
    }


def load_pipeline(output_dir, checkpoint=None):
    """The saved prior pipeline, with the prior of a checkpoint if one is named."""
    prior = {}
    if checkpoint is not None:
        prior["prior"] = wuerstchen.WuerstchenPrior.from_pretrained(checkpoint / "prior")
    return wuerstchen.WuerstchenPriorPipeline.from_pretrained(output_dir / "prior_pipeline", **prior)


def draw_nearest(file, pictures, captions, columns, latents, tile=64):
    """Captions down, checkpoints across, and the picture that is nearest to what was sampled; the last is its own."""
    shown = range(0, len(captions), max(1, len(captions) // 12))
    sheet = Image.new("RGB", (160 + tile * (len(columns) + 1), 20 + tile * len(shown)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, drawn) in enumerate([*columns.items(), ("its own", latents)]):
        pen.text((162 + tile * column, 4), str(title), "black")
        nearest = torch.cdist(drawn.flatten(1), latents.flatten(1)).argmin(1)
        for row, index in enumerate(shown):
            pen.text((4, 24 + tile * row), textwrap.fill(captions[index], 24), "black")
            sheet.paste(pictures[nearest[index]].resize((tile, tile)), (160 + tile * column, 20 + tile * row))
    sheet.save(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=64, help="channels of the prior")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="1 is none")
    parser.add_argument("--draws", type=int, default=4, help="samples a caption")
    parser.add_argument("--look", action="store_true", help="draw the nearest pictures")
    own, rest = parser.parse_known_args()
    make_models(own.folder, c=own.width, depth=own.depth)
    argv = [*flags(own.folder, own.folder / "run"), "--overwrite_output_dir", *rest]  # what comes later wins
    script.main(argv)
    pictures, captions, latents = rows_of(argv)
    drawn = {}
    for checkpoint in script.checkpoints_in(own.folder / "run"):
        update = int(checkpoint.name.removeprefix("checkpoint-"))
        pipeline = load_pipeline(own.folder / "run", checkpoint)
        for guidance in own.guidance:
            found = recall(pipeline, captions, latents, guidance, own.draws)
            print(json.dumps({"update": update, "guidance": guidance, **found}), flush=True)
        drawn[update] = sample(pipeline, captions, latents.shape[-1], own.guidance[0])
    if own.look:
        draw_nearest(own.folder / "nearest.png", pictures, captions, drawn, latents)


if __name__ == "__main__":
    main()
