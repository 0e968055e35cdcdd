# SPDX-License-Identifier: Apache-2.0
"""Fine-tune the Würstchen prior, the diffusion model that generates an image's latents from its caption.

    accelerate launch train_text_to_image_prior.py --train_data_dir=images --output_dir=run   # as configured
    torchrun --nproc_per_node=8 train_text_to_image_prior.py --train_data_dir=images --output_dir=run
    python train_text_to_image_prior.py --train_data_dir=images --output_dir=run              # one device

To resume, run the same command again with --resume_from_checkpoint=latest. The README explains the flags.
Every rank runs `main`; training, validation and the cache are split among ranks; only rank 0 writes to
--output_dir and uploads.

Part 1 is the training, in the order in which it runs. Read `main` first:

    arguments      parse_args
    data           load_train_dataset, check_rows, load_image, make_augmentations, make_image_transforms,
                   list_captions, preprocess_train
    models         load_encoders, load_prior, save_prior, load_ema, update_ema, make_optimizer,
                   make_lr_scheduler
    diffusion      embed_captions, embed_images, encode_batch, sample_noise, sample_timesteps, diffusion_loss
    validation     is_validation_due, load_decoder, validation_images, log_validation
    main           main

Part 2 supports the training. Skip it on a first reading:

    folders        load_folder, read_image_folder, read_metadata
    samples        bucket_sizes, choose_sizes, order_rows, order_batches, SampleDataset, load_batches
    cache          cache_key, cache_latents, preprocess_cached
    checkpoints    lock_output_dir, find_checkpoint, check_output_dir, check_same_run, save_checkpoint
    processes      setup_accelerator, deferred_signals, kill_workers, explain_errors
    logging        log_metrics, log_images, save_contact_sheet, save_loss_curve
    publishing     check_destinations, save_pipeline, save_model_card, push_to_hub, log_summary
    compile        compile_prior

Where to edit: the loss in `diffusion_loss`, augmentation in `make_augmentations`, the text of captions in
`list_captions`, the choice among them in `choose_caption`, image sizes in `bucket_sizes`, data layouts in
`load_folder`, the optimizer in `make_optimizer`, its schedule in `make_lr_scheduler`, trainable parameters or
LoRA in `load_prior` and `save_prior`, trackers in `log_images_to_tracker`.

Where to look: what a stop signal does at each moment in `deferred_signals`, what a checkpoint holds in
`save_checkpoint`, what makes the cache anew in `cache_key`, what is uploaded in `push_to_hub`.

Sizes: an image of --resolution=768 pixels becomes 24 x 24 latents, since the image encoder's stride is 32.
The decoder turns 24 x 24 latents into 1024 x 1024 pixels, 42.67 per latent along each side: it was trained
on latents of downscaled images. The 42.0 in LATENT_MEAN is unrelated: it scales the values of the latents.
"""

import argparse
import atexit
import contextlib
import csv
import functools
import glob
import hashlib
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import sys
import textwrap
import time
import traceback
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's backend, which its commands inherit, may not be installed

import datasets
import diffusers
import filelock
import huggingface_hub as hub
import matplotlib
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
    send_to_device,
    tqdm,
)
from datasets.fingerprint import Hasher
from diffusers import DDPMWuerstchenScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from modeling_efficient_net_encoder import STRIDE, EfficientNetEncoder

try:
    from diffusers.pipelines import wuerstchen
except ImportError:  # diffusers 0.38 moved it, but published and saved pipelines refer to its old place
    from diffusers.pipelines.deprecated import wuerstchen

    diffusers.pipelines.wuerstchen = wuerstchen

logger = get_logger(__name__, log_level="INFO")

# The published prior pipeline ends with latents * LATENT_MEAN - LATENT_STD; training applies the inverse. The
# names are those of WuerstchenPriorPipeline's `latent_mean` and `latent_std`.
LATENT_MEAN, LATENT_STD = 42.0, 1.0
RESOLUTION_MULTIPLE = 42.67  # generated pixels per latent: WuerstchenPriorPipeline's `resolution_multiple`
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the image encoder's training
GUIDANCE_SCALE = 4.0  # of validation images: the guide's `prior_guidance_scale`
# Formats that are opened, whatever a file's name says. (Others run programs: EPS starts Ghostscript.)
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000"]
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # an editor's history can be longer than 1 MB
# Longer images are cropped first: resizing 60000 x 1 pixels to height 512 would fill the memory.
MAX_ASPECT_RATIO = 8
PRIOR_FLAG = "pretrained_prior_model_name_or_path"  # of the prior, its tokenizer and its text encoder
MIN_LOSS_SCALE = 2.0**-20  # fp16's loss scale is halved at each overflow; below this the run has diverged
PATH_FLAGS = ("_dir", "_path", "dataset_name", "checkpoint")  # ends of the names of flags for local paths
LFS_POINTER = b"version https://git-lfs"  # the first bytes of a file that `git lfs pull` has not fetched

# =========================================================================================== Part 1: training


# -------------------------------------------------------------------------------------------------- arguments
def bounded(number_type: type, minimum: float, below: float = math.inf) -> Callable[[str], float]:
    """Returns an argparse type: an int or a float in [minimum, below)."""

    def convert(text: str) -> float:
        value = number_type(text)
        if not minimum <= value < below:
            raise argparse.ArgumentTypeError(f"must be at least {minimum} and below {below}, not {text}")
        return value

    convert.__name__ = number_type.__name__  # for argparse's message "invalid int value"
    return convert


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line and rejects contradictory flags before anything is loaded."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def flag(name, text, default=None, kind=str, **settings):
        group.add_argument(name, type=kind, default=default, help=text, **settings)

    def switch(name, text):
        group.add_argument(name, action="store_true", help=text)

    def choice(name, choices, text):  # the first is the default
        group.add_argument(name, choices=choices, default=choices[0], help=text)

    positive_int, natural = bounded(int, 1), bounded(int, 0)
    fraction, non_negative = bounded(float, 0, 1), bounded(float, 0)

    group = parser.add_argument_group("models, each a Hub repo or a local folder")
    flag("--pretrained_prior_model_name_or_path", "to fine-tune", "warp-ai/wuerstchen-prior")
    flag("--pretrained_decoder_model_name_or_path", "latents to images", "warp-ai/wuerstchen")
    flag("--pretrained_image_encoder_name_or_path", "images to latents", "dome272/wuerstchen")
    flag("--cache_dir", "folder for downloaded models, prepared data sets and encoded images")

    group = parser.add_argument_group("data (requires --dataset_name or --train_data_dir)")
    flag("--dataset_name", "a data set on the Hub, or a local copy of one")
    flag("--train_data_dir", "folder of captioned images, or of Parquet, Arrow or .tar files")
    flag("--dataset_config_name", "configuration of the data set")
    flag("--image_column", "column of the images", "image")
    flag("--caption_column", "column of the captions, strings or lists of strings", "text")
    flag("--max_train_samples", "number of rows to use, selected with the seed", None, positive_int)
    flag("--validation_split", "rows to hold out; a fraction if below 1", None, bounded(float, 1e-9))
    flag("--resolution", "side of the square crop, in pixels", 512, bounded(int, STRIDE))
    switch("--aspect_ratio_buckets", "train on sizes near the images' own shapes")
    switch("--random_crop", "crop at a random position instead of the center")
    switch("--random_flip", "mirror half of the images, left to right")
    switch("--skip_bad_rows", "replace unreadable rows by others instead of stopping")
    flag("--dataloader_num_workers", "processes that read images; 0: none", 0, natural)
    switch("--cache_latents", "encode all rows once, to disk: 215 KB a row at 768")

    group = parser.add_argument_group("training (a step is one update of the weights)")
    flag("--seed", "random seed; the default is chosen and logged", None, natural)
    flag("--train_batch_size", "images per device and micro-step", 1, positive_int)
    flag("--gradient_accumulation_steps", "micro-steps per step", 1, positive_int)
    flag("--num_train_epochs", "passes over the data", 100, positive_int)
    flag("--max_train_steps", "total number of steps; overrides --num_train_epochs", None, positive_int)
    switch("--gradient_checkpointing", "use less memory, with a slower backward pass")
    choice("--mixed_precision", [None, "no", "fp16", "bf16"], "the default is Accelerate's configuration")
    switch("--allow_tf32", "use TF32 for float32 matrix products on CUDA")
    switch("--use_ema", "validate and save an average (EMA) of the weights")
    switch("--offload_ema", "keep the average in main memory; steps are slower")
    choice("--loss_weighting", ["none", "p2"], "p2: as in the original training")
    choice("--timestep_sampling", ["uniform", "stretched"], "stretched: as in the original training")
    flag("--caption_dropout", "fraction of captions that are replaced by the empty one", 0.0, fraction)
    switch("--compile", "compile the prior and replay it as CUDA graphs")

    group = parser.add_argument_group("optimizer")
    choice("--optimizer", ["adamw", "adamw8bit", "adafactor"], "the last two need less memory")
    alias = {"action": "store_const", "const": "adamw8bit", "help": "an alias of --optimizer=adamw8bit"}
    group.add_argument("--use_8bit_adam", dest="optimizer", **alias)
    flag("--learning_rate", "peak learning rate", 1e-4, non_negative)
    # The default is the first: sorted, "constant".
    choice("--lr_scheduler", sorted(schedule.value for schedule in SchedulerType), "learning rate schedule")
    flag("--lr_warmup_steps", "warm-up steps of the schedule", 500, natural)
    flag("--lr_step_rules", "rules for piecewise_constant, multiplier:until_step, 1:100,0.1:200,0.01")
    flag("--adam_beta1", "AdamW's decay of the average of gradients", 0.9, fraction)
    flag("--adam_beta2", "AdamW's decay of the average of squared gradients", 0.999, fraction)
    flag("--adam_weight_decay", "decoupled, for all optimizers", 0.0, non_negative)
    flag("--adam_epsilon", "added to AdamW's divisor", 1e-8, non_negative)
    flag("--max_grad_norm", "gradients are clipped to this norm", 1.0, bounded(float, 1e-8))

    group = parser.add_argument_group("output")
    flag("--output_dir", "folder for checkpoints, logs, samples and the result", "wuerstchen-model-finetuned")
    switch("--overwrite_output_dir", "replace another run's files in --output_dir")
    flag("--checkpointing_steps", "steps between checkpoints", 500, positive_int)
    flag("--checkpoints_total_limit", "number of checkpoints to keep, or all", None, positive_int)
    flag("--resume_from_checkpoint", "'latest' or the path of a checkpoint")
    flag("--validation_prompts", "prompts for validation images", nargs="+")
    flag("--validation_epochs", "epochs between validations", 5, positive_int)
    flag("--validation_steps", "steps between validations, instead of epochs", None, positive_int)
    flag(
        "--validation_size", "WIDTH HEIGHT ... of additional images, in pixels", None, positive_int, nargs="+"
    )
    flag("--logging_dir", "folder of the trackers' files, relative to --output_dir", "logs")
    flag("--report_to", "trackers: tensorboard, wandb, comet_ml, ..., all, none", "tensorboard")
    flag("--tracker_project_name", "project that trackers log to", "text2image-fine-tune")
    switch("--push_to_hub", "upload the result at the end")
    flag("--hub_model_id", "repo to upload to; default: the name of --output_dir")
    switch("--hub_private_repo", "make the repo private, if it does not exist yet")
    flag("--hub_token", "sent to the Hub only; `hf auth login` is safer", None, str.strip)
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="not used by Accelerate")

    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, str) and name.endswith(PATH_FLAGS):
            setattr(args, name, os.path.expanduser(value))
    trackers = [*map(str, get_available_trackers()), "all", "none"]
    for is_wrong, message in (
        (not args.dataset_name and not args.train_data_dir, "give --dataset_name or --train_data_dir"),
        (len(args.validation_size or []) % 2, "--validation_size needs pairs of WIDTH and HEIGHT"),
        (
            (args.lr_scheduler == "piecewise_constant") != (args.lr_step_rules is not None),
            "--lr_scheduler=piecewise_constant and --lr_step_rules need each other",
        ),
        (
            args.compile and args.aspect_ratio_buckets,
            "--compile records one size of images, --aspect_ratio_buckets makes several: leave out one",
        ),
        (
            args.cache_latents and make_augmentations(args, (args.resolution, args.resolution)),
            "--cache_latents encodes each image once, but --random_crop, --random_flip and whatever else "
            "make_augmentations returns change it every epoch: leave out one or the other",
        ),
        (args.offload_ema and not args.use_ema, "--offload_ema needs --use_ema"),
        (
            args.optimizer == "adamw8bit" and not importlib.util.find_spec("bitsandbytes"),
            "--optimizer=adamw8bit needs bitsandbytes: `pip install bitsandbytes`",
        ),
        (
            not {*args.report_to.split(",")}.issubset(trackers),
            f"--report_to={args.report_to}: available are only {', '.join(trackers)}",
        ),
    ):
        if is_wrong:
            parser.error(message)
    return args


# ------------------------------------------------------------------------------------------------------- data
def load_train_dataset(args: argparse.Namespace) -> datasets.Dataset:
    """Loads the rows to train on: images, still encoded (`load_image` decodes them), and captions."""
    with explain_errors(args, "dataset_name" if args.dataset_name else "train_data_dir"):
        dataset = load_folder(args.dataset_name or args.train_data_dir, args).with_format(None)
    with explain_errors(args, "image_column"):
        kind = dataset.select_columns(args.image_column).features[args.image_column]
        if not re.search("^Image|^Value.*binary|'bytes'|'path'", str(kind)):
            raise ValueError(f"it holds {kind}, not images")
        dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    with explain_errors(args, "caption_column"):
        dataset = dataset.select_columns([args.image_column, args.caption_column])
    if args.max_train_samples is not None:
        num_rows = min(args.max_train_samples, len(dataset))
        dataset = dataset.shuffle(seed=args.seed, keep_in_memory=True).select(range(num_rows))
    return dataset


def check_rows(
    dataset: datasets.Dataset, args: argparse.Namespace
) -> tuple[datasets.Dataset, list[str], str]:
    """Ends the run if images are missing or captions are not text or, with --skip_bad_rows, leaves out such
    rows. Images are not decoded. Returns the rows, all their captions, and a hash of the captions and of the
    images' names and sizes in bytes, with which a run can be resumed."""
    # An image file lies in one of these folders: neither /etc/passwd nor a URL does.
    places = [args.dataset_name or args.train_data_dir, args.cache_dir]
    places = filter(None, [*places, datasets.config.HF_DATASETS_CACHE, hub.constants.HF_HUB_CACHE])
    roots = tuple(path(place) + os.sep for place in places for path in (os.path.abspath, os.path.realpath))

    digest, good_rows, errors, all_captions = hashlib.sha256(), [], [], []
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        images, captions = table[args.image_column], table[args.caption_column].to_pylist()
        paths = pc.struct_field(images, "path").to_pylist()
        sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
        for path, size, caption in zip(paths, sizes, captions, strict=True):
            row = len(good_rows) + len(errors)
            try:
                if size is None and path:
                    if not os.path.abspath(path).startswith(roots):
                        raise ValueError("the image lies outside the data set's folder: move or embed it")
                    size = os.path.getsize(path)
                if not size:
                    raise ValueError("the image is missing or empty")
                texts = list_captions({args.image_column: {"path": path}, args.caption_column: caption}, args)
                digest.update(repr((os.path.basename(path or ""), size, texts)).encode())
                all_captions += texts
                good_rows.append(row)
            except (OSError, ValueError) as error:
                errors.append(f"row {row} ({path}): {error}")
    if errors or not good_rows:
        message = f"{len(errors)} of {len(dataset)} rows cannot be used, the first: {''.join(errors[:1])}"
        if not args.skip_bad_rows or not good_rows:
            raise SystemExit(f"{printable(message)}; fix them, or skip such rows with --skip_bad_rows")
        logger.warning(printable(message))
        dataset = dataset.select(good_rows, keep_in_memory=True)
    return dataset, all_captions, digest.hexdigest()


def load_image(value: dict) -> Image.Image:
    """Decodes an image of a data set, {"bytes", "path"}, to 8-bit RGB. EXIF orientation is applied, 16-bit
    grayscale is scaled, and transparency is composited on white. Images longer than 8:1 are cropped to 8:1.

    Raises:
        ValueError: with the file's name, if it cannot be decoded.
    """
    try:
        data = value["bytes"] or Path(value["path"]).read_bytes()
        if data.startswith(LFS_POINTER):
            raise ValueError("it is a Git LFS pointer: run `git lfs pull`")
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("the range of its pixel values is unknown: save it with 8 or 16 bits")
        image.load()
        with contextlib.suppress(Exception):  # an orientation that cannot be read is upright
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grayscale, which convert() would clip to white
            gray = np.asarray(image).clip(0, 65535)
            image = Image.fromarray((gray / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        longest = MAX_ASPECT_RATIO * min(image.size)
        if max(image.size) > longest:
            size = (min(image.height, longest), min(image.width, longest))
            image = transforms.functional.center_crop(image, size)
        return image.convert("RGB")
    except Exception as error:  # decoders raise many types; one raised by this file's code is a bug
        if isinstance(error, BUGS) and traceback.extract_tb(error.__traceback__)[-1].filename == __file__:
            raise
        reason = re.sub(" <_io.*", "", str(error))  # an address would make each message unique
        message = f"the image ({value['path']}) cannot be read: {type(error).__name__}: {reason}"
        raise ValueError(printable(message)) from error


def make_augmentations(args: argparse.Namespace, size: tuple[int, int]) -> list[Callable]:
    """The random transforms of training images, from PIL image to PIL image. Add yours here.

    Their input is at least as large as `size`, (height, width): the square of --resolution, or the bucket's
    size. Their output is center-cropped to `size`. They may use the default generators of torch, Python and
    numpy, which are seeded for each sample. Held-out rows are not augmented, and --cache_latents is rejected
    if there is any augmentation.
    """
    augmentations = []
    if args.random_crop:
        augmentations.append(transforms.RandomCrop(size))
    if args.random_flip:
        augmentations.append(transforms.RandomHorizontalFlip())
    return augmentations


def make_image_transforms(
    size: tuple[int, int], augmentations: Sequence[Callable] = ()
) -> transforms.Compose:
    """Resizes a PIL image to cover `size`, (height, width), and crops it: (3, height, width) uint8.
    `load_image` has cropped images longer than 8:1 before."""
    height, width = size

    def resize_to_cover(image: Image.Image) -> Image.Image:
        if image.height * width > image.width * height:
            resized = (image.height * width // image.width, width)
        else:
            resized = (height, image.width * height // image.height)
        return transforms.functional.resize(image, resized, antialias=True)  # bilinear

    return transforms.Compose(
        [resize_to_cover, *augmentations, transforms.CenterCrop(size), transforms.PILToTensor()]
    )


def list_captions(row: dict, args: argparse.Namespace) -> list[str]:
    """A row's captions, a string or a list of strings, as a list. Change their text here: the result is
    trained on, cached, and compared on resuming, which is refused if it differs. Validation prompts are not
    changed. A row has only the columns that `load_train_dataset` selects.

    Raises:
        ValueError: if they are neither.
    """
    captions = row[args.caption_column]
    captions = [captions] if isinstance(captions, str) else captions
    if not captions or not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"the caption is {captions!r}, not a string or a list of strings")
    return captions


def choose_caption(captions: Sequence, caption_dropout: float, empty):
    """One of a row's captions, at random, or with the probability `caption_dropout` the empty one.

    With --cache_latents these are embeddings: change the captions' text in `list_captions`.
    """
    caption = random.choice(captions)
    return empty if random.random() < caption_dropout else caption


def tokenize_captions(captions: list[str], tokenizer: CLIPTokenizerFast) -> dict[str, torch.Tensor]:
    """CLIP tokens and their mask, (B, 77) int64 and bool, padded and truncated to the model's length."""
    inputs = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return {"text_input_ids": inputs.input_ids, "text_mask": inputs.attention_mask.bool()}


def preprocess_train(
    row: dict, size: tuple[int, int], train: bool, args: argparse.Namespace, tokenizer: CLIPTokenizerFast
) -> dict[str, torch.Tensor]:
    """A row as tensors: pixels (3, height, width) uint8, tokens and mask (77,) of one caption. Held-out rows
    (`train=False`) are not augmented, and keep their captions."""
    image_transforms = make_image_transforms(size, make_augmentations(args, size) if train else ())
    pixels = image_transforms(load_image(row[args.image_column]))
    caption = choose_caption(list_captions(row, args), args.caption_dropout if train else 0.0, empty="")
    tokens = tokenize_captions([caption], tokenizer)
    return {"effnet_pixel_values": pixels} | {name: tensor[0] for name, tensor in tokens.items()}


def split_held_out(num_rows: int, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the rows to train on and of the rows to hold out, a number or, below 1, a fraction.
    (`train_test_split` of `datasets` would write into the data set's folder.)"""
    num_held_out = math.ceil(held_out * num_rows) if held_out < 1 else held_out
    if num_held_out % 1 or num_held_out >= num_rows:
        raise SystemExit(
            f"--validation_split={held_out}: there are {num_rows} rows; "
            "give a smaller whole number, or a fraction below 1"
        )
    permutation = np.random.default_rng(seed).permutation(num_rows) if held_out else np.arange(num_rows)
    return permutation[int(num_held_out) :], permutation[: int(num_held_out)]


# ----------------------------------------------------------------------------------------------------- models
def load_model(
    args: argparse.Namespace, flag: str, model_class: type, subfolder: str, checkpoint=None, **settings
):
    """Loads the part in `subfolder` of the model that a flag names, or of a checkpoint."""
    with explain_errors(args, "resume_from_checkpoint" if checkpoint else flag):
        return model_class.from_pretrained(
            checkpoint or getattr(args, flag), subfolder=subfolder, cache_dir=args.cache_dir, **settings
        )


def load_encoders(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[CLIPTextModel, EfficientNetEncoder]:
    """The text encoder and the image encoder, frozen, in the dtype of mixed precision where the device
    supports it."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16} if accelerator.native_amp else {}
    dtype = half.get(accelerator.mixed_precision, torch.float32)
    text_encoder = load_model(args, PRIOR_FLAG, CLIPTextModel, "text_encoder", dtype=dtype)
    with explain_errors(args, flag := "pretrained_image_encoder_name_or_path"):
        try:
            image_encoder = EfficientNetEncoder.load(getattr(args, flag), args.cache_dir)
        except KeyError as error:
            raise ValueError(f"the file has no {error}") from None
    for encoder in (text_encoder, image_encoder):
        encoder.requires_grad_(False).eval().to(accelerator.device, dtype)
    return text_encoder, image_encoder


def load_prior(
    args: argparse.Namespace,
    checkpoint: Path | None,
    text_encoder: CLIPTextModel,
    image_encoder: EfficientNetEncoder,
) -> wuerstchen.WuerstchenPrior:
    """The prior in float32, pretrained or as `save_prior` wrote it to the checkpoint. Freeze parameters or
    add LoRA at the end.

    With LoRA, load the pretrained prior also on resuming, and then the checkpoint's adapter. `save_prior`
    must write both the adapter and a copy of the prior with the adapter merged, for checkpoints as for
    pipelines. --use_ema must be refused, since `load_ema` does not call this function. Nothing else changes:
    the README has the diff.
    """
    prior = load_model(
        args, PRIOR_FLAG, wuerstchen.WuerstchenPrior, "prior", checkpoint, torch_dtype=torch.float32
    )
    with explain_errors(args, PRIOR_FLAG):
        needed = [prior.config.c_in, prior.config.c_cond]
        widths = [image_encoder.config.c_latent, text_encoder.config.hidden_size]
        if needed != widths:
            raise ValueError(f"its inputs have {needed} channels, but the encoders' outputs {widths}")
    prior.set_attn_processor(AttnProcessor2_0())  # the same attention, by PyTorch's memory-efficient kernel
    if args.gradient_checkpointing:
        prior.enable_gradient_checkpointing()
    return prior


def save_prior(prior: wuerstchen.WuerstchenPrior, folder: Path):
    """Writes the prior, for checkpoints and the result, without the local path it was loaded from."""
    prior.register_to_config(_name_or_path="")
    prior.save_pretrained(folder)


def load_ema(
    args: argparse.Namespace, prior: wuerstchen.WuerstchenPrior, checkpoint: Path | None
) -> EMAModel | None:
    """The average of the prior's weights (decay 0.9999, ramp-up) on every rank: the checkpoint's or, if there
    is none, a new one. It is in main memory until `update_ema` moves it."""
    if not args.use_ema:
        return None
    model = {"model_cls": type(prior), "foreach": True}
    if checkpoint and (checkpoint / "prior_ema").is_dir():
        return EMAModel.from_pretrained(checkpoint / "prior_ema", **model)
    return EMAModel(prior.parameters(), model_config=prior.config, **model)


def update_ema(ema_prior: EMAModel | None, prior: wuerstchen.WuerstchenPrior, args: argparse.Namespace):
    """Averages the weights after a step. With --offload_ema this uses the memory of the freed gradients."""
    if ema_prior is not None:
        ema_prior.to(prior.device)
        ema_prior.step(prior.parameters())
        ema_prior.to("cpu" if args.offload_ema else prior.device)


@contextlib.contextmanager
def ema_weights(prior: wuerstchen.WuerstchenPrior, ema_prior: EMAModel | None) -> Iterator[None]:
    """Replaces the prior's weights by their average, if there is one, and restores them afterwards."""
    if ema_prior is None:
        yield
        return
    ema_prior.store(prior.parameters())
    ema_prior.copy_to(prior.parameters())
    try:
        yield
    finally:
        ema_prior.restore(prior.parameters())


def make_optimizer(prior: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer of the trainable parameters, with decoupled weight decay. Parameter groups may have
    learning rates and decays of their own: the schedule scales each group's rate."""
    settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as optimizer_cls
    elif args.optimizer == "adafactor":
        from transformers import Adafactor as optimizer_cls

        # Turn off Adafactor's own learning rate schedule.
        settings = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    else:
        optimizer_cls = torch.optim.AdamW
        settings["fused"] = True
    parameters = [parameter for parameter in prior.parameters() if parameter.requires_grad]
    settings |= {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    return optimizer_cls(parameters, **settings)


def make_lr_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace, first_step: int):
    """The schedule, which multiplies each parameter group's learning rate by a factor that depends on the
    step, from `first_step` on. A new one must depend on the step alone. Append its name to the choices of
    --lr_scheduler in `parse_args`, after `sorted`, since the first choice is the default."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    # Skipped fp16 steps still advance the schedule. PyTorch warns if the first one is skipped.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        step_rules=args.lr_step_rules,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        last_epoch=first_step - 1,
    )


# -------------------------------------------------------------------------------------------------- diffusion
@torch.no_grad()
def embed_captions(tokens: dict[str, torch.Tensor], text_encoder: CLIPTextModel) -> torch.Tensor:
    """Embeds tokenized captions, (B, 77) to (B, 77, width): the text encoder's last hidden state."""
    input_ids, mask = (tokens[name].to(text_encoder.device) for name in ("text_input_ids", "text_mask"))
    return text_encoder(input_ids, attention_mask=mask).last_hidden_state


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Normalizes (B, 3, H, W) uint8 RGB by ImageNet's mean and deviation, to float32. With scalars, since
    torchvision's function copies tensors of three numbers to the device, a host sync per call."""
    channels = zip(pixels.unbind(dim=1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel.float() / 255 - mean) / std for channel, mean, std in channels], dim=1)


@torch.no_grad()
def embed_images(pixels: torch.Tensor, image_encoder: EfficientNetEncoder) -> torch.Tensor:
    """The latents of images, (B, 3, H, W) uint8 to (B, 16, H / 32, W / 32)."""
    pixels = normalize_pixels(pixels.to(image_encoder.device))
    return image_encoder(pixels.to(image_encoder.dtype))


def encode_batch(batch: dict, text_encoder, image_encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """The images' latents, (B, 16, H / 32, W / 32), and the embeddings of the captions, (B, 77, width)."""
    if "latents" in batch:  # --cache_latents
        return batch["latents"], batch["prompt_embeds"]
    return embed_images(batch["effnet_pixel_values"], image_encoder), embed_captions(batch, text_encoder)


def derive_seed(*key) -> int:
    """A well-mixed 63-bit seed for a purpose: derive_seed(seed, "epoch", 3)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def sample_noise(
    positions: list[int], shape: Sequence[int], device: torch.device, *key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal noise, (B, *shape), and uniform random numbers in [0, 1), (B,), both float32.

    Both are drawn on the CPU, with a seed from `key`, (args.seed, "noise") or (args.seed, "held out"), and a
    sample's position, its index among all samples of the run (`order_batches`) or among the held-out rows: on
    any device and any number of processes they are the same. Without --seed, args.seed is the checkpoint's,
    or chosen at random in a new run.
    """
    noise, uniform = [], []
    for position in positions:
        generator = torch.Generator().manual_seed(derive_seed(*key, position))
        noise.append(torch.randn(shape, generator=generator))
        uniform.append(torch.rand((), generator=generator))
    tensors = torch.stack(noise), torch.stack(uniform)
    if device.type == "cuda":  # or the copies would wait for the GPU
        tensors = [tensor.pin_memory() for tensor in tensors]
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def sample_timesteps(u: torch.Tensor, sampling: str) -> torch.Tensor:
    """Timesteps, (B,) float32, of u in [0, 1): u itself, or "stretched", (1 - u) * 1.08 + 0.001, at most 1.

    With the latter, from train_stage_C.py of dome272/Wuerstchen, 7.5 % are 1, where generation starts.
    """
    return u if sampling == "uniform" else ((1 - u) * 1.08 + 0.001).clamp(0.001, 1.0)


def diffusion_loss(
    prior: torch.nn.Module,
    noise_scheduler: DDPMWuerstchenScheduler,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    weighting: str,
) -> torch.Tensor:
    """The per-sample MSE between predicted and added noise, (B,) float32, for training and held-out rows.

    Latents and noise are (B, 16, H, W), prompt_embeds (B, 77, width), timesteps (B,) in [0, 1]. "p2" weights
    it by 1 / (1 + SNR) = 1 - alpha_bar(t): P2 weighting (arXiv:2204.00227) with k = gamma = 1, as in
    Würstchen's original training.
    """
    # Scale the latents, and add noise according to the timesteps: the forward diffusion process.
    image_embeds = (latents.float() + LATENT_STD) / LATENT_MEAN
    noisy_latents = noise_scheduler.add_noise(image_embeds, noise, timesteps)
    # Predict the noise residual and compute the loss.
    pred_noise = prior(noisy_latents, timesteps, prompt_embeds)
    losses = F.mse_loss(pred_noise.float(), noise, reduction="none").mean(dim=(1, 2, 3))
    if weighting == "p2":
        zeros, ones = torch.zeros_like(timesteps), torch.ones_like(timesteps)
        losses = losses * noise_scheduler.add_noise(zeros, ones, timesteps) ** 2  # 1 - alpha_bar(t)
    return losses


def check_finite(accelerator: Accelerator, loss: float, grad_norm: float, step: int, rows: list[int]):
    """Ends the run before a loss or gradient that is not finite reaches the weights.

    In fp16 an overflow skips the step and halves the loss scale; the run ends below MIN_LOSS_SCALE.
    """
    if accelerator.scaler is None:
        diverged = not math.isfinite(loss + grad_norm)
    else:
        diverged = accelerator.scaler.get_scale() < MIN_LOSS_SCALE
    if diverged:
        raise SystemExit(
            f"stopped before step {step}: loss {loss}, gradient norm {grad_norm}, rows {rows}; "
            f"the last checkpoint in {accelerator.project_dir}, if any, is good"
        )


# ------------------------------------------------------------------------------------------------- validation
def is_validation_due(
    global_step: int, args: argparse.Namespace, samples_per_step: int, num_rows: int
) -> bool:
    """Whether to validate: before the first step, and then every --validation_steps, or after the first epoch
    and every --validation_epochs from there. (After the last step `main` validates as soon as the result is
    saved, and does so again if a finished run is resumed; other validations are not repeated on resuming.)"""
    if global_step == 0 or args.validation_steps is not None:
        return global_step % (args.validation_steps or 1) == 0
    epochs = [step * samples_per_step // num_rows for step in (global_step - 1, global_step)]
    return any(epoch % args.validation_epochs == 0 for epoch in range(*epochs))


def load_decoder(args: argparse.Namespace, dtype: torch.dtype) -> wuerstchen.WuerstchenDecoderPipeline:
    """The pipeline that decodes the prior's latents to images."""
    with explain_errors(args, flag := "pretrained_decoder_model_name_or_path"):
        source = getattr(args, flag)
        if any(Path(source).rglob("*.py")):  # diffusers asks for trust in code on the Hub only
            raise ValueError("the folder contains code, which loading would run: delete it")
        return wuerstchen.WuerstchenDecoderPipeline.from_pretrained(
            source, cache_dir=args.cache_dir, torch_dtype=dtype
        )


def decoder_image_size(decoder: wuerstchen.WuerstchenDecoderPipeline, resolution: float) -> int:
    """The side in pixels of an image generated after training at `resolution`: 1024 for 768.

    The decoder scales latents by `latent_dim_scale` and halves them at each level, which not every side
    allows. Returns the nearest possible side.
    """
    config, scale = decoder.decoder.config, decoder.config.latent_dim_scale
    divisor = config.patch_size * 2 ** (len(config.c_hidden) - 1)
    trained_side = math.ceil(resolution / STRIDE)
    sides = [side for side in range(1, trained_side + 2 * divisor) if int(side * scale) % divisor == 0]
    return int(min(sides, key=lambda side: abs(side - trained_side)) * RESOLUTION_MULTIPLE)


def validation_images(args: argparse.Namespace) -> list[tuple[str, str, tuple[float, float]]]:
    """The images to generate: each one's prompt, the end of its file's name, and the training resolutions of
    its width and height. Images at --resolution come first."""
    pixels, sizes = args.validation_size or [], [("", [args.resolution] * 2)]
    for size in zip(pixels[::2], pixels[1::2], strict=True):
        sizes.append((f"-{size[0]}x{size[1]}", [side * STRIDE / RESOLUTION_MULTIPLE for side in size]))
    prompts = list(enumerate(args.validation_prompts or []))
    return [(prompt, f"prompt-{i}{name}", size) for name, size in sizes for i, prompt in prompts]


def log_validation(
    accelerator: Accelerator,
    args: argparse.Namespace,
    models: tuple,
    load_held_out: Callable[[], Iterable[dict]],
    num_held_out: int,
    global_step: int,
):
    """Generates images for the validation prompts and computes the held-out loss, and logs them: without
    dropout, with averaged weights if there are any, and with the same noise every time, independent of the
    training noise. All ranks take part; `load_held_out` gives a rank's share of the held-out rows."""
    prior, ema_prior, decoder, noise_scheduler, encoders, prompt_embeds = models
    images, losses = [], {}
    prior.eval()
    with ema_weights(prior, ema_prior), torch.no_grad():
        if args.validation_prompts:
            images = generate_images(accelerator, args, prior, decoder, noise_scheduler, prompt_embeds)
        if num_held_out:
            batches = load_held_out()
            losses = compute_held_out_loss(
                accelerator, args, prior, noise_scheduler, encoders, batches, num_held_out
            )
    prior.train()
    log_metrics(accelerator, losses, global_step)
    if accelerator.is_main_process:
        log_images(accelerator, args, images, global_step)
        save_loss_curve(args.output_dir)


def generate_images(
    accelerator: Accelerator, args: argparse.Namespace, prior, decoder, noise_scheduler, prompt_embeds: dict
) -> list[Image.Image]:
    """Generates `validation_images`, split among the ranks. If one fails, warns and returns [].

    They are generated as the published pipelines do, in the nearest size that the decoder supports.
    """
    # Pass the prior as text encoder: the pipeline reads only its dtype, and half-precision timesteps would
    # differ from training.
    pipeline = wuerstchen.WuerstchenPriorPipeline(None, prior, prior, noise_scheduler)
    pipeline.set_progress_bar_config(disable=True)
    decoder.set_progress_bar_config(disable=True)
    wanted, images = validation_images(args), []

    def generate_image(prompt: str, resolutions: Sequence[float]) -> Image.Image:
        width, height = (decoder_image_size(decoder, resolution) for resolution in resolutions)
        generator = torch.Generator().manual_seed(args.seed)
        latents = pipeline(
            height=height,
            width=width,
            prompt_embeds=prompt_embeds[prompt],
            negative_prompt_embeds=prompt_embeds[""],
            timesteps=wuerstchen.DEFAULT_STAGE_C_TIMESTEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generator,
        ).image_embeddings
        return decoder(latents, prompt, guidance_scale=0.0, generator=generator).images[0]

    with only_warn("Generating validation images"):  # no collectives in this block
        decoder.to(accelerator.device)
        with accelerator.split_between_processes(wanted) as own_share, accelerator.autocast():
            for prompt, _, resolutions in tqdm(own_share, "Images", leave=False):
                images.append(generate_image(prompt, resolutions))
    decoder.to("cpu")
    torch.cuda.empty_cache()
    images = gather_object(images)
    return images if len(images) == len(wanted) else []


def compute_held_out_loss(
    accelerator: Accelerator,
    args: argparse.Namespace,
    prior,
    noise_scheduler,
    encoders,
    batches,
    num_rows: int,
) -> dict[str, float]:
    """The mean loss of the held-out rows, in total and for each quarter of the timesteps. A row's noise and
    timestep are the same each time; the timesteps are evenly spaced in [0, 1)."""
    device, samples = accelerator.device, []
    for batch in tqdm(batches, "Held-out loss", leave=False):
        latents, prompt_embeds = encode_batch(batch, *encoders)
        noise, _ = sample_noise(batch["position"], latents.shape[1:], device, args.seed, "held out")
        timesteps = (torch.tensor(batch["position"], device=device) + 0.5) / num_rows
        inputs = (prior, noise_scheduler, latents, prompt_embeds, noise, timesteps)
        with accelerator.autocast():
            losses = diffusion_loss(*inputs, args.loss_weighting)
        samples += zip(timesteps.tolist(), losses.tolist(), strict=True)
    metrics = defaultdict(list)
    for timestep, loss in sorted(gather_object(samples)):  # in the same order for any number of ranks
        for name in ("val_loss", f"val_loss_t{math.floor(timestep * 4) / 4}"):
            metrics[name].append(loss)
    return {name: sum(losses) / len(losses) for name, losses in metrics.items()}


# ------------------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None):  # noqa: C901  the training loop is not split up
    args = parse_args(argv)
    accelerator = setup_accelerator(args)  # all ranks run `main`; `is_main_process` is rank 0
    device, is_main_process = accelerator.device, accelerator.is_main_process

    # Start at step 0, or at a checkpoint and with its seed.
    lock = lock_output_dir(accelerator, args)  # noqa: F841  held until `main` returns
    checkpoint = find_checkpoint(args)
    stale_checkpoints = check_output_dir(args, checkpoint)
    state = read_state(checkpoint) if checkpoint else {"global_step": 0, "validated_step": -1}
    if not checkpoint or stale_checkpoints or checkpoint.parent != args.output_dir.resolve():
        state["wandb_run_id"] = secrets.token_hex(5)  # a branch needs a new run, since wandb has its steps
    global_step = first_step = state["global_step"]
    if args.seed is None:
        args.seed = state["plan"]["seed"] if checkpoint else secrets.randbelow(2**31)
    if is_main_process:
        args.hub_model_id = check_destinations(args)
    args.seed, args.hub_model_id = broadcast_object_list([args.seed, args.hub_model_id])

    # The data: rows of images and captions, the size of each row's pixels, and the plan, with which a resumed
    # run continues with the same samples.
    load_model(args, PRIOR_FLAG, CLIPTextConfig, "text_encoder")  # transformers 4 reports errors only here
    tokenizer = load_model(args, PRIOR_FLAG, CLIPTokenizerFast, "tokenizer")
    dataset, captions, rows_hash = check_rows(load_train_dataset(args), args)
    prompts = ["", *(args.validation_prompts or [])]
    if is_main_process:
        report_captions(captions + prompts[1:], tokenizer)
    train_rows, held_out_rows = split_held_out(len(dataset), args.validation_split or 0, args.seed)
    sizes = choose_sizes(dataset, train_rows, args, accelerator)
    num_rows = len(train_rows)
    samples_per_step = accelerator.num_processes * args.train_batch_size * args.gradient_accumulation_steps
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * num_rows / samples_per_step)
    plan = {"seed": args.seed, "num_rows": num_rows, "rows_hash": rows_hash, "optimizer": args.optimizer}
    plan["samples_per_step"] = samples_per_step
    plan["buckets"] = args.aspect_ratio_buckets and [args.train_batch_size, np.unique(sizes, axis=0).tolist()]
    check_same_run(args, plan, state, checkpoint)
    state["plan"] = plan

    # The models. The encoders are frozen, in half precision under mixed precision; the prior is float32.
    encoders = load_encoders(args, accelerator)
    prior = unwrapped_prior = load_prior(args, checkpoint, *encoders)
    ema_prior = load_ema(args, prior, checkpoint)
    prior.to(device)
    with torch.device(device):  # a constant on the CPU would cost a host sync per call
        noise_scheduler = DDPMWuerstchenScheduler()
    decoder = load_decoder(args, encoders[0].dtype)  # also without prompts, since `save_pipeline` needs it
    if not args.validation_prompts:
        decoder = None
    prompt_embeds = {p: embed_captions(tokenize_captions([p], tokenizer), encoders[0]) for p in prompts}
    stop, saved, signals = False, True, []  # signals to stop, from `deferred_signals`
    load = functools.partial(load_batches, args, device, signals)
    preprocess = functools.partial(preprocess_train, args=args, tokenizer=tokenizer)
    if args.cache_latents:
        folder = cache_latents(load, dataset, sizes, rows_hash, args, accelerator, tokenizer, *encoders)
        cached = {"dataset": dataset, "folder": folder, "empty_embeds": prompt_embeds[""][0].cpu()}
        preprocess = functools.partial(preprocess_cached, args=args, **cached)
        dataset, encoders = range(len(dataset)), [None, None]  # the encoders' memory is freed

    # The optimizer and the schedule. The prior's weights are the checkpoint's already.
    if args.compile:
        compile_prior(prior, accelerator, args, prompt_embeds[""])
    with explain_errors(args, "optimizer"):
        optimizer = make_optimizer(prior, args)
    prior, optimizer = accelerator.prepare(prior, optimizer)
    if checkpoint:
        load_optimizer_state(accelerator, optimizer, checkpoint, args)
    with explain_errors(args, "lr_scheduler"):
        lr_scheduler = make_lr_scheduler(optimizer.optimizer, args, first_step)

    # The batches: this rank's share of the samples from `first_step` on, and of the held-out rows.
    load = functools.partial(load, dataset, sizes, preprocess)
    train_batches = load(
        train_rows, order_batches(train_rows, sizes, args, accelerator, first_step), train=True
    )
    held_out = group_by_size(held_out_rows.tolist(), sizes, args.train_batch_size)
    own_share = held_out[accelerator.process_index :: accelerator.num_processes]
    load_held_out = functools.partial(load, held_out_rows, own_share, train=False)
    models = (unwrapped_prior, ema_prior, decoder, noise_scheduler, encoders, prompt_embeds)
    validate = functools.partial(log_validation, accelerator, args, models, load_held_out, len(held_out_rows))
    if is_main_process:
        init_trackers(accelerator, args, state)  # they continue at the checkpoint's step
        truncate_logs(args, state)

    logger.info(
        f"Training from step {first_step} to {args.max_train_steps} with seed {args.seed}: {num_rows} rows, "
        f"{samples_per_step} samples per step, {accelerator.num_processes} x {device.type}"
    )
    prior.train()
    progress = tqdm(total=args.max_train_steps, initial=first_step, desc="Steps")  # on rank 0 only
    with deferred_signals(signals), progress, logging_redirect_tqdm():
        # A new run first validates the prior as loaded; the last iteration only saves a checkpoint.
        while True:
            # ---- Once in a while: validate (all ranks), save a checkpoint (rank 0 writes, all wait), stop
            is_done = global_step >= args.max_train_steps
            may_validate = not is_done and not stop and state["validated_step"] != global_step
            if may_validate and is_validation_due(global_step, args, samples_per_step, num_rows):
                validate(global_step)
                state["validated_step"] = global_step
            if global_step > first_step and (stop or is_done or global_step % args.checkpointing_steps == 0):
                state["global_step"] = global_step
                saved = save_checkpoint(accelerator, args, state, unwrapped_prior, ema_prior, optimizer)
            if stop or is_done:
                break

            # ---- One training step (all ranks); random numbers follow from seed and samples' positions
            started = time.perf_counter()
            train_loss, rows = torch.zeros((), device=device), []
            for _ in range(args.gradient_accumulation_steps):
                batch = next(train_batches)
                with accelerator.accumulate(prior):
                    # Convert images to latents, and captions to embeddings
                    latents, embeds = encode_batch(batch, *encoders)
                    # Sample noise and a timestep for each image
                    noise, u = sample_noise(batch["position"], latents.shape[1:], device, args.seed, "noise")
                    timesteps = sample_timesteps(u, args.timestep_sampling)
                    # Add the noise, predict the noise residual and compute the loss (dropout is seeded)
                    torch.manual_seed(derive_seed(args.seed, "dropout", batch["position"][0]))
                    inputs = (prior, noise_scheduler, latents, embeds, noise, timesteps)
                    loss = diffusion_loss(*inputs, args.loss_weighting).mean()
                    accelerator.backward(loss)
                train_loss += loss.detach() / args.gradient_accumulation_steps
                rows += batch["row"]

            # Clip the gradients; average loss, norm and signals over the ranks: all stop if one has a signal
            grad_norm = accelerator.clip_grad_norm_(prior.parameters(), args.max_grad_norm)
            values = [train_loss, grad_norm.to(train_loss), torch.full_like(train_loss, len(signals))]
            train_loss, grad_norm, stop = accelerator.reduce(torch.stack(values), "mean").tolist()
            check_finite(accelerator, train_loss, grad_norm, global_step + 1, rows)
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
            update_ema(ema_prior, unwrapped_prior, args)
            global_step += 1

            # ---- Logging (rank 0)
            metrics = {"train_loss": train_loss, "lr": lr_scheduler.get_last_lr()[0], "grad_norm": grad_norm}
            metrics["images_per_second"] = samples_per_step / (time.perf_counter() - started)
            metrics["epoch"] = global_step * samples_per_step / num_rows
            if device.type == "cuda":
                metrics["memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
            log_metrics(accelerator, metrics, global_step)
            while stale_checkpoints and is_main_process:  # not before a step has succeeded
                delete(stale_checkpoints.pop())
            progress.set_postfix(metrics, refresh=False)
            progress.update()
    # A signal after the ranks' last agreement ends its rank alone, and the launcher then ends the others.
    if stop or signals:
        if saved:
            logger.info("Stopped; the same command with --resume_from_checkpoint=latest continues")
        if stop:
            end_training(accelerator)
        sys.exit(128 + max(signals, default=signal.SIGTERM) if saved else 74)  # EX_IOERR
    # The result is on disk before anything is validated or uploaded.
    if is_main_process:
        with ema_weights(unwrapped_prior, ema_prior):
            image_size = save_pipeline(args, unwrapped_prior, tokenizer, noise_scheduler)
    validate(global_step)
    if is_main_process:
        with only_warn("Writing README.md"):
            save_model_card(args, image_size, global_step, plan, accelerator)
        log_summary(args, global_step)
        if args.push_to_hub:
            push_to_hub(args, global_step)
    end_training(accelerator)


# ================================================= Part 2: supporting code. Skip it on a first reading


# ---------------------------------------------------------------------------------------------------- folders
# Finds the captioned images or the data files in a folder, and reports captions that are cut.
# Includes formats that are not opened, so that a captioned image never disappears silently.
IMAGE_SUFFIXES = (*Image.registered_extensions(), ".avif", ".heic", ".heif", ".jxl")
# Suffixes and `datasets` builders of data files. The first suffix found is read: img2dataset writes a Parquet
# file without images beside each tar.
BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}
csv.field_size_limit(2**31 - 1)


def load_folder(source: str, args: argparse.Namespace) -> datasets.Dataset:
    """Loads the split train of a data set on the Hub or in a folder: captioned images or, if there are none,
    data files. Add layouts here.

    A --dataset_name folder with a README.md is a copy of a Hub repo; the README may configure the data.
    """
    folder = Path(source)
    saved = folder / "train" if (folder / "dataset_dict.json").is_file() else folder
    if (saved / "state.json").is_file():
        return datasets.load_from_disk(saved)  # what `save_to_disk` wrote
    if args.dataset_name and (not folder.is_dir() or (folder / "README.md").is_file()):
        return datasets.load_dataset(
            source, args.dataset_config_name, cache_dir=args.cache_dir, split="train"
        )
    root = str(folder.resolve())
    files = sorted(list_files(root))
    rows = read_image_folder(root, files, args.caption_column)
    if not rows:
        return load_data_files(root, files, args)
    columns = {
        "image": [{"path": path} for path, _ in rows],
        args.caption_column: [captions for _, captions in rows],
        # Changes the fingerprint: an edited file is encoded again.
        "modified": [os.path.getmtime(path) if os.path.exists(path) else None for path, _ in rows],
    }
    return datasets.Dataset.from_dict(columns)


def list_files(folder: str, parents: tuple[str, ...] = ()) -> list[str]:
    """All files in a folder, except hidden ones (.* and __*). Links are followed, except cycles."""
    files, parents = [], (*parents, os.path.realpath(folder))
    for entry in os.scandir(folder):
        if entry.name.startswith((".", "__")):
            continue
        if not entry.is_dir():
            files.append(entry.path)
        elif os.path.realpath(entry) not in parents:
            files += list_files(entry.path, parents)
    return files


def select_train_files(files: list[str], root: str) -> list[str]:
    """The files in the split train or, if there are none, in no split. An image's split is its top-level
    folder; a data file's is any folder or its name, such as test-00000-of-00001.parquet."""
    splits = defaultdict(list)
    for file in files:
        is_data_file = file.lower().endswith(tuple(BUILDERS))
        pattern = r"(?:.*/)?%s(/|(-\d{5}-of-\d{5})?\.\w+$)" if is_data_file else "%s/"
        match = re.match(pattern % "(train|validation|test)", Path(os.path.relpath(file, root)).as_posix())
        splits[match and match[1]].append(file)
    wanted = "train" if "train" in splits else None
    if files and wanted not in splits:
        raise ValueError(f"there are no rows in a split named train, only in {', '.join(sorted(splits))}")
    return splits[wanted]


def read_image_folder(root: str, files: list[str], caption_column: str) -> list[tuple[str, list[str] | None]]:
    """Path and captions of each image in the split train that a metadata file names or that has a .txt file.

    The builder "imagefolder" of `datasets` reads no .txt files, takes the caption "NA" for a missing one and
    "a::b.jpg" for a URL, and reads several metadata files in an order that changes.
    """

    def as_text(caption) -> list[str] | None:
        """A caption or captions as a list that Arrow can store, or None, which `check_rows` reports."""
        captions = [caption] if isinstance(caption, str) else caption
        with contextlib.suppress(TypeError, ValueError):  # not strings, or half an emoji
            "".join(captions).encode()
            return captions if isinstance(captions, list) else None

    rows, named_in = [], {}
    for file in files:
        for path, caption in read_metadata(file, caption_column):
            if named_in.setdefault(path, file) != file:
                raise ValueError(f"{named_in[path]} and {file} both name {path}; remove it from one of them")
            rows.append((path, caption))
    text_files = {os.path.splitext(file)[0]: file for file in files if file.lower().endswith(".txt")}
    uncaptioned = []
    for image in files:
        if image.lower().endswith(IMAGE_SUFFIXES) and image not in named_in:
            text_file = text_files.get(os.path.splitext(image)[0])
            if text_file:
                text = Path(text_file).read_text(encoding="utf-8-sig", errors="surrogateescape").strip()
                rows.append((image, text.replace("\n", " ") or None))
            else:
                uncaptioned.append(image)
    used = set(select_train_files([path for path, _ in rows], root))
    if rows and uncaptioned:
        logger.warning(
            f"{len(uncaptioned)} images without captions are not used: {printable(uncaptioned[0])}"
        )
    return [
        (path.encode(errors="replace").decode(), as_text(caption)) for path, caption in rows if path in used
    ]


def read_metadata(file: str, caption_column: str) -> Iterator[tuple[str, object]]:
    """Yields the path and the caption of each image that a metadata file names; none for other files. CSV is
    text as written.

    Raises:
        ValueError: with the file and the line, if a row cannot be read.
    """
    if os.path.basename(file) not in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
        return
    line, columns = 1, {}
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as source:
            if file.endswith(".parquet"):
                rows = pq.ParquetFile(file).read().to_pylist()
            elif file.endswith(".csv"):
                separator = max(",;\t", key=source.readline().count)
                source.seek(0)
                rows = csv.DictReader(source, delimiter=separator, strict=True)
            else:
                rows = (json.loads(text) if text.strip() else None for text in source)
            for row in rows:
                line = getattr(rows, "line_num", line)
                if row is not None:  # a blank line
                    if None in row:
                        raise ValueError("it has more values than the header: quote captions with commas")
                    # Windows writes backslashes, and macOS another Unicode normalization.
                    name, forms = row["file_name"], ("NFC", "NFD")
                    names = [name, *(unicodedata.normalize(f, name.replace("\\", "/")) for f in forms)]
                    paths = [os.path.normpath(os.path.join(os.path.dirname(file), name)) for name in names]
                    yield next(filter(os.path.exists, paths), paths[0]), row.get(caption_column)
                    columns.update(row)
                line += 1
            if columns and caption_column not in columns:
                raise ValueError(f"there is no column {caption_column}, only {', '.join(columns)}")
    except (ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        raise ValueError(f"{file}, line {line}: {type(error).__name__}: {error}") from None


def load_data_files(root: str, files: list[str], args: argparse.Namespace) -> datasets.Dataset:
    """Loads data files by `datasets`. Other columns may differ between files."""
    suffix = next(
        (suffix for suffix in BUILDERS if any(file.lower().endswith(suffix) for file in files)), None
    )
    if suffix is None:
        raise ValueError(
            "it has no captioned images, WebDataset (.tar), Parquet or Arrow files. Write captions to "
            'metadata.jsonl, a line {"file_name": "cat.jpg", "text": "a cat"} for each image, or to cat.txt'
        )
    files = select_train_files([file for file in files if file.lower().endswith(suffix)], root)
    # Each file is given, escaped: `datasets` takes words in names for splits and [brackets] for patterns.
    data_files = {"train": [glob.escape(file) for file in files]}
    load = functools.partial(datasets.load_dataset, BUILDERS[suffix], data_files=data_files, split="train")
    columns = [args.image_column, args.caption_column]
    rows = load(streaming=True).select_columns(columns)  # from the first file, before all are copied
    settings = {".tar": {"features": rows.features}, ".parquet": {"columns": columns}, ".arrow": {}}
    return load(cache_dir=args.cache_dir, **settings[suffix])


def report_captions(captions: list[str], tokenizer: CLIPTokenizerFast):
    """Warns of captions that are empty, or longer than the text encoder's input. 10,000 take a second."""
    limit = tokenizer.model_max_length
    lengths = [len(tokenizer(caption, verbose=False).input_ids) for caption in captions]
    num_cut, num_empty = sum(length > limit for length in lengths), lengths.count(2)  # start and end tokens
    if num_cut or num_empty:
        logger.warning(
            f"Of {len(captions)} captions and prompts {num_cut} are cut to {limit} tokens, {num_empty} empty"
        )


# ---------------------------------------------------------------------------------------------------- samples
# Chooses each row's size, puts the rows in random order, and reads them in batches.
# Long side / short side of the buckets: the shapes of common cameras and screens.
ASPECT_RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)
MAX_BAD_ROWS = 12  # unreadable rows drawn in succession, after which the data set is considered broken
BATCH_TIMEOUT = 10  # seconds without a batch, after which slow storage is reported and a signal is handled


def bucket_sizes(resolution: int) -> np.ndarray:
    """The sizes of --aspect_ratio_buckets, (height, width) in pixels, (num_sizes, 2): of all ASPECT_RATIOS,
    multiples of 32 with about as many latents as the square of `resolution`. At 768 that is 567 to 588.
    Return sizes of your own here, also multiples of 32. `choose_sizes` chooses among them by shape alone, so
    two sizes of one shape need an edit there."""
    roots = np.sqrt([ratio**sign for ratio in ASPECT_RATIOS for sign in (1, -1)])
    sides = math.ceil(resolution / STRIDE) * np.stack([1 / roots, roots], axis=1)
    return STRIDE * np.unique(sides.round().clip(1).astype(int), axis=0)


def read_ratio(value: dict) -> float:
    """An image's height / width, from its header, or NaN. A wrong value only crops more."""
    with contextlib.suppress(Exception):
        file = io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            # Without "exif" in `info`, getexif() may decode the image. Pillow turns the size of TIFF itself.
            turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return (image.height / image.width) ** (-1 if turned else 1)
    return math.nan


def choose_sizes(
    dataset: datasets.Dataset, train_rows: np.ndarray, args: argparse.Namespace, accelerator: Accelerator
) -> np.ndarray:
    """The height and width of each row's pixels, (num_rows, 2): the square of --resolution or, with
    --aspect_ratio_buckets, the nearest shape with enough rows for a batch. More than one size needs
    --aspect_ratio_buckets, so that the rows of a micro-batch have one size."""
    if not args.aspect_ratio_buckets:
        return np.full((len(dataset), 2), args.resolution)
    ratios, sizes = [], bucket_sizes(args.resolution)
    if accelerator.is_main_process:  # 100,000 headers take 7 seconds
        images = tqdm(dataset.select_columns(args.image_column), "Reading image sizes")
        ratios = [read_ratio(row[args.image_column]) for row in images]
    ratios = np.array(broadcast_object_list([ratios])[0])
    # On a logarithmic scale 1:2 is as far from 1:1 as 2:1.
    distances = np.abs(np.log(ratios)[:, None] - np.log(sizes[:, 0] / sizes[:, 1]))
    known = train_rows[np.isfinite(ratios[train_rows])]
    counts = np.bincount(distances.argmin(axis=1)[known], minlength=len(sizes))
    is_used = (counts >= args.train_batch_size) | (counts == counts.max())
    nearest = np.where(is_used, distances, np.inf).argmin(axis=1)
    # Unreadable rows get the most frequent size. They fail later, or rows of that size replace them.
    nearest[np.isnan(ratios)] = counts.argmax()
    num_rows = Counter(f"{width}x{height}" for height, width in sizes[nearest].tolist())
    logger.info(f"Rows of each WIDTHxHEIGHT: {dict(num_rows)}; rarer shapes are cropped to these")
    return sizes[nearest]


def order_rows(rows: np.ndarray, sizes: np.ndarray, args: argparse.Namespace) -> Iterator[int]:
    """Yields the rows of one epoch after another, endlessly, as follows from the seed.

    A bucket is the rows of one size, and a micro-batch is of one bucket. In each epoch a bucket's rows, in
    random order, fill batches, which are mixed with the batches of other buckets. Leftover rows are used in
    the next epoch, so that no row is left out and no batch is smaller.
    """
    # Without --aspect_ratio_buckets all sizes must be the same. A batch here is one row, so that a resumed
    # run may use another batch size.
    size = args.train_batch_size if args.aspect_ratio_buckets else 1
    buckets = defaultdict(list)
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "epoch", epoch))
        batches = []
        for row in rows[torch.randperm(len(rows), generator=generator).numpy()].tolist():
            bucket = buckets[tuple(sizes[row])]
            bucket.append(row)
            if len(bucket) == size:
                batches.append([*bucket])
                bucket.clear()
        if args.aspect_ratio_buckets:
            np.random.default_rng(derive_seed(args.seed, "batches", epoch)).shuffle(batches)
        yield from itertools.chain.from_iterable(batches)


def order_batches(
    rows: np.ndarray, sizes: np.ndarray, args: argparse.Namespace, accelerator: Accelerator, first_step: int
) -> Iterator[list[tuple[int, int]]]:
    """A rank's micro-batches from a step on, endlessly: pairs of a position and its row. To resume, the
    sequence is run through from the start, a million rows a second."""
    samples = enumerate(order_rows(rows, sizes, args))
    batches = iter(lambda: list(itertools.islice(samples, args.train_batch_size)), [])
    per_step = args.gradient_accumulation_steps * accelerator.num_processes
    first = first_step * per_step + accelerator.process_index
    return itertools.islice(batches, first, None, accelerator.num_processes)


def group_by_size(rows: Sequence[int], sizes: np.ndarray, batch_size: int) -> list[list[tuple[int, int]]]:
    """Rows in batches of one size; the last batch of each size may be smaller. Positions are indices."""
    groups = defaultdict(list)
    for sample in enumerate(rows):
        groups[tuple(sizes[sample[1]])].append(sample)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


@dataclass
class SampleDataset(Dataset):
    """Reads samples: pairs of a position, from which all random numbers follow, and a row.

    An unreadable row gives {"error": message} or, with --skip_bad_rows, a random one of `rows` of its size in
    its place, or of any size if no other has that size, since the row is then a batch of its own. The error
    is a value, since a DataLoader wraps an exception in its worker's traceback.
    """

    dataset: datasets.Dataset
    sizes: np.ndarray
    rows: np.ndarray
    preprocess: Callable
    args: argparse.Namespace

    def __getitem__(self, sample: tuple[int, int]) -> dict:
        position, row = sample
        seed = derive_seed(self.args.seed, "sample", position)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # Only the CPU's generator, since torch.manual_seed takes 1 ms where CUDA is not initialized.
        torch.default_generator.manual_seed(seed)
        skipped = []
        for _ in range(MAX_BAD_ROWS):
            try:
                tensors = self.preprocess(self.dataset[row], tuple(self.sizes[row].tolist()))
                return {"position": position, "row": row, "skipped": skipped} | tensors
            except ValueError as error:  # from `load_image` or `list_captions`
                skipped.append(f"row {row}: {error}")
            if not self.args.skip_bad_rows:
                return {"error": f"{skipped[0]}; fix it, or skip such rows with --skip_bad_rows"}
            fits = (self.sizes[self.rows] == self.sizes[row]).all(axis=1)
            row = int(random.choice(self.rows[fits] if fits.sum() > 1 else self.rows))
        return {"error": f"{MAX_BAD_ROWS} rows in succession cannot be read: {skipped[-1]}"}


def collate_fn(samples: list[dict]) -> dict:
    """Stacks the tensors of samples; other values are lists. A sample with an error is returned alone.

    In a worker, `default_collate` allocates the shared memory, so that `load_batches` gets its error.
    """
    for sample in samples:
        if "error" in sample:
            return sample
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {
        name: default_collate(values) if torch.is_tensor(values[0]) else values
        for name, values in batch.items()
    }


def load_batches(
    args: argparse.Namespace,
    device: torch.device,
    signals: list[int],
    dataset: datasets.Dataset,
    sizes: np.ndarray,
    preprocess: Callable,
    rows: np.ndarray,
    batches: Iterable[list[tuple[int, int]]],
    train: bool,
) -> Iterator[dict]:
    """Yields batches on the device; `batches` has the positions and rows of each. An unreadable row, a dead
    worker, or a signal in `signals` while workers wait for storage, ends the run."""
    num_workers = args.dataloader_num_workers
    dataloader = DataLoader(
        SampleDataset(dataset, sizes, rows, functools.partial(preprocess, train=train), args),
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        worker_init_fn=prepare_worker,
        pin_memory=device.type == "cuda",
        timeout=BATCH_TIMEOUT if num_workers else 0,
        generator=torch.Generator(),  # not the default one, which makes dropout's masks
    )
    iterator = None
    while True:
        try:
            iterator = iter(dataloader) if iterator is None else iterator
            batch = next(iterator, None)
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            has_timed_out = "DataLoader timed out" in reason
            if has_timed_out and not signals:
                logger.warning_once(
                    f"Waiting for a batch for {BATCH_TIMEOUT} seconds: is the data set's storage slow?"
                )
                continue
            kill_workers()  # or PyTorch would wait 5 seconds for each
            if has_timed_out:
                logger.error("Stopped without a checkpoint, since no batch came", main_process_only=False)
                raise SystemExit(128 + signals[-1]) from None
            # "</torch_" begins the name of a file in /dev/shm
            if iterator is None or "DataLoader worker (pid" in reason or "</torch_" in reason:
                raise SystemExit(
                    f"--dataloader_num_workers={num_workers}: {printable(reason)}; each worker needs memory "
                    "and /dev/shm (docker run --shm-size=1g): use fewer, or a smaller --train_batch_size"
                ) from None
            raise
        if batch is None:
            return
        if "error" in batch:
            raise SystemExit(batch["error"])
        for message in itertools.chain.from_iterable(batch.pop("skipped")):
            logger.warning_once(f"Skipped {message}", main_process_only=False)
        yield send_to_device(batch, device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------ cache
# Encodes each row once and keeps the encoders' outputs on disk, for --cache_latents.
CACHE_BATCH_SIZE = 32  # rows that are encoded at once


def cache_key(dataset, sizes, rows_hash: str, args: argparse.Namespace, tokenizer, *encoders) -> str:
    """A hash of what the cache depends on: the rows in use, with captions, files (by the fingerprint of
    `datasets`) and sizes in pixels; the encoders' dtype and weights; tokens and pixels of 8 rows as
    preprocessed now; and the source of `embed_captions`, `embed_images` and `normalize_pixels`. After an edit
    that these do not show, for example of the image encoder's code or of `load_image` for few images, delete
    the cache."""
    sources = [inspect.getsource(function) for function in (embed_captions, embed_images, normalize_pixels)]
    tensors = [tensor for encoder in encoders for tensor in encoder.state_dict().values()]
    for row in np.linspace(0, len(dataset) - 1, 8).astype(int).tolist():
        with contextlib.suppress(ValueError):  # a bad row
            sample = preprocess_row(dataset[row], sizes[row].tolist(), False, args)
            tokens = tokenize_captions(sample["captions"], tokenizer)
            tensors += [sample["effnet_pixel_values"], *tokens.values()]
    # Arrays, since hashing a tensor takes 4 ms. A model's `repr` has its activations and strides.
    hashes = [Hasher.hash(tensor.cpu().float().numpy()) for tensor in tensors]
    return Hasher.hash(
        repr([rows_hash, dataset._fingerprint, sizes.tolist(), sources, encoders, encoders[0].dtype, hashes])
    )


def cache_file(folder: Path, row: int) -> Path:
    """The file of a row's `latents`, (16, height / 32, width / 32), and `prompt_embeds`, (num_captions, 77,
    width), as the encoders return them."""
    return folder / f"{row}.safetensors"


def is_cached(folder: Path, row: int) -> bool:
    """Whether a row has a `cache_file`. A power failure can empty files: those do not count."""
    file = cache_file(folder, row)
    return file.exists() and file.stat().st_size > 0


def preprocess_row(row: dict, size: tuple[int, int], train: bool, args: argparse.Namespace) -> dict:
    """A row as pixels, (3, height, width) uint8, and all its captions."""
    pixels = make_image_transforms(size)(load_image(row[args.image_column]))
    return {"effnet_pixel_values": pixels, "captions": list_captions(row, args)}


def cache_latents(
    load: Callable,
    dataset: datasets.Dataset,
    sizes: np.ndarray,
    rows_hash: str,
    args: argparse.Namespace,
    accelerator: Accelerator,
    tokenizer: CLIPTokenizerFast,
    text_encoder: CLIPTextModel,
    image_encoder: EfficientNetEncoder,
) -> Path:
    """Encodes the rows that have no `cache_file`, each rank its share, and returns the folder of the files.
    With --skip_bad_rows an unreadable image gets none, so that the next run tries it again."""
    folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "wuerstchen_latents")
    folder /= cache_key(dataset, sizes, rows_hash, args, tokenizer, text_encoder, image_encoder)
    load = functools.partial(load, dataset, sizes, functools.partial(preprocess_row, args=args))
    share = (accelerator.process_index, accelerator.num_processes)
    local_share = (accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with explain_errors(args, "cache_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        for index, count in dict.fromkeys([share, local_share]):  # the latter if nodes share no folder
            missing = [row for row in range(index, len(dataset), count) if not is_cached(folder, row)]
            groups = group_by_size(missing, sizes, CACHE_BATCH_SIZE)
            batches = load(np.arange(len(dataset)), groups, train=False)
            for batch in tqdm(batches, f"Encoding {len(missing)} rows", len(groups)):
                latents = embed_images(batch["effnet_pixel_values"], image_encoder).cpu()
                texts = list(itertools.chain.from_iterable(batch["captions"]))
                embeds = embed_captions(tokenize_captions(texts, tokenizer), text_encoder).cpu()
                embeds = embeds.split([len(captions) for captions in batch["captions"]])
                for row, row_latents, row_embeds in zip(batch["row"], latents, embeds, strict=True):
                    if not is_cached(folder, row):  # a row that stands in for an unreadable one may be
                        file = cache_file(folder, row)
                        tensors = {"latents": row_latents, "prompt_embeds": row_embeds}
                        partial = file.with_suffix(f".{secrets.token_hex(4)}")  # of this process alone
                        partial.write_bytes(safetensors.torch.save(tensors))
                        partial.replace(file)
            accelerator.wait_for_everyone()
    return folder


def preprocess_cached(
    row: int,
    size: tuple[int, int],
    train: bool,
    args: argparse.Namespace,
    dataset: datasets.Dataset,
    folder: Path,
    empty_embeds: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """As `preprocess_train`, from a row's `cache_file`: latents, (16, height / 32, width / 32), and the
    embeddings of one caption, (77, width), or `empty_embeds`."""
    file = cache_file(folder, row)
    try:
        cached = safetensors.torch.load(file.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        load_image(dataset[row][args.image_column])  # raises the reason if the image is unreadable
        raise ValueError(f"{file} cannot be read ({error}): delete it and start again") from None
    caption_dropout = args.caption_dropout if train else 0.0
    embeds = choose_caption(cached["prompt_embeds"], caption_dropout, empty_embeds)
    return {"latents": cached["latents"], "prompt_embeds": embeds}


# ------------------------------------------------------------------------------------------------ checkpoints
# Locks the output folder, and writes, finds and compares checkpoints in it.
STATE_FILE = "trainer_state.json"  # written last


def lock_output_dir(accelerator: Accelerator, args: argparse.Namespace) -> filelock.FileLock:
    """Locks the folder against other processes until the returned lock is deleted. All ranks must see the
    same folder."""
    file = args.output_dir / ".lock"
    # A singleton, so that a notebook can start again when a run was interrupted.
    lock = filelock.FileLock(file, timeout=0, is_singleton=True)
    with explain_errors(args, "output_dir"):
        if accelerator.is_main_process:
            try:
                lock.acquire()
            except filelock.Timeout:
                raise ValueError("another run is writing to this folder; choose another one") from None
        accelerator.wait_for_everyone()
        if not file.exists():
            raise ValueError("rank 0 has another folder of that name; share it between the nodes")
    return lock


def read_state(checkpoint: Path) -> dict | None:
    """Reads trainer_state.json: global_step, validated_step, the plan of samples, wandb_run_id and the
    sizes of all files. None if a file is missing or has another size, as in a partial copy."""
    with contextlib.suppress(Exception):  # whatever lies in the folder
        state = json.loads((checkpoint / STATE_FILE).read_text())
        if all((checkpoint / name).stat().st_size == size for name, size in state["files"].items()):
            return state


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = filter(read_state, output_dir.resolve().glob("checkpoint-*"))
    return sorted(found, key=lambda path: read_state(path)["global_step"])


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to resume: the newest complete one for "latest", or that path. None starts a new run."""
    source = args.resume_from_checkpoint
    if source is None:
        return None
    if source == "latest":
        return next(reversed(list_checkpoints(args.output_dir)), None)
    for path in (Path(source), args.output_dir / source):
        if read_state(path):
            return path.resolve()
    raise SystemExit(f"--resume_from_checkpoint={source}: there is no complete checkpoint there")


def check_output_dir(args: argparse.Namespace, checkpoint: Path | None) -> list[Path]:
    """Refuses to replace files of another run: a new run any file, a run with `latest` that finds no
    checkpoint only checkpoints and results, and a resumed run only checkpoints newer than its own. Returns
    the checkpoints to delete."""
    stale = list_checkpoints(args.output_dir)
    names = {path.name for path in args.output_dir.glob("[!.]*")}
    if args.resume_from_checkpoint == "latest":
        names = {
            name for name in names if re.match("checkpoint-|model_index.json|prior_pipeline|README.md", name)
        }
    if checkpoint in stale:
        stale = stale[stale.index(checkpoint) + 1 :]
        names = {path.name for path in stale}
    if names and not args.overwrite_output_dir:
        raise SystemExit(
            f"--output_dir={args.output_dir} contains {', '.join(sorted(names)[:9])}: choose another folder, "
            "--resume_from_checkpoint=latest to continue a run with checkpoints there, or "
            "--overwrite_output_dir to replace it"
        )
    return stale


def check_same_run(args: argparse.Namespace, plan: dict, state: dict, checkpoint: Path | None):
    """Refuses to resume with other samples or another optimizer."""
    starts = gather_object([(state["global_step"], plan)])
    if any(start != starts[0] for start in starts):
        raise SystemExit("processes found other rows or checkpoints: share data and --output_dir among nodes")
    saved = state.get("plan", plan)
    for name, value in plan.items():
        if saved.get(name) != value:
            raise SystemExit(
                f"{checkpoint} cannot be resumed exactly: its run had {name}={saved.get(name)}, not {value}"
            )
    if args.lr_warmup_steps >= args.max_train_steps and not args.lr_scheduler.endswith("constant"):
        logger.warning(f"--lr_warmup_steps={args.lr_warmup_steps} is not shorter than the run: lower it")


def load_optimizer_state(accelerator: Accelerator, optimizer, checkpoint: Path, args: argparse.Namespace):
    """Loads the optimizer's moments and fp16's loss scale. Learning rates, decays and other settings of the
    parameter groups stay as the flags and `make_optimizer` gave them."""
    groups = [dict(group) for group in optimizer.param_groups]
    with explain_errors(args, "resume_from_checkpoint"):
        saved = torch.load(checkpoint / "optimizer.bin", map_location="cpu", weights_only=True, mmap=True)
        optimizer.load_state_dict(saved["optimizer"])
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)
    if accelerator.scaler and saved["scaler"]:
        accelerator.scaler.load_state_dict(saved["scaler"])


def save_checkpoint(
    accelerator: Accelerator, args: argparse.Namespace, state: dict, prior, ema_prior, optimizer
) -> bool:
    """Writes checkpoint-N: prior, with --use_ema prior_ema, optimizer.bin and trainer_state.json
    (`read_state`); random numbers, schedule and data follow from the seed and the step. It is written under a
    temporary name, flushed and renamed. Then checkpoints over the limit are deleted. Rank 0 writes; all wait.

    If that fails, say on a full disk, the older checkpoints remain, the run continues, and the result is
    False. Weights that are not finite end the run.
    """
    if not math.isfinite(sum(parameter.detach().norm() for parameter in prior.parameters())):
        raise SystemExit(
            f"stopped after step {state['global_step']}: weights that are not finite are not saved"
        )
    checkpoint = args.output_dir / f"checkpoint-{state['global_step']}"
    partial = args.output_dir / ".checkpoint.partial"
    saved = False
    if accelerator.is_main_process:
        try:
            delete(partial)
            save_prior(prior, partial / "prior")
            if ema_prior is not None:
                ema_prior.save_pretrained(partial / "prior_ema")
            scaler = accelerator.scaler and accelerator.scaler.state_dict()
            torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler}, partial / "optimizer.bin")
            files = [path for path in partial.rglob("*") if path.is_file()]
            sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
            (partial / STATE_FILE).write_text(json.dumps(state | {"files": sizes}, indent=2))
            flush_to_disk(partial)
            with contextlib.suppress(FileNotFoundError):
                # Keeps an incomplete checkpoint, or a folder of the user's, of this name.
                checkpoint.rename(f"{checkpoint}.{time.time_ns()}")
            partial.rename(checkpoint)
            saved = True
            logger.info(f"Saved {checkpoint}")
            for old in list_checkpoints(args.output_dir)[: -(args.checkpoints_total_limit or sys.maxsize)]:
                delete(old)
        except Exception as error:  # torch and safetensors raise errors of their own for a full disk
            if isinstance(error, BUGS):
                raise
            logger.error(f"{checkpoint} was not saved: {printable(str(error))}")
            delete(partial)
    return broadcast_object_list([saved])[0]


def flush_to_disk(folder: Path):
    """Flushes the files in a folder to disk, before it is renamed. Gives them the usual modes, since
    safetensors 0.8 lets only their owner read them."""
    os.umask(umask := os.umask(0))
    for path in filter(Path.is_file, folder.rglob("*")):
        with contextlib.suppress(OSError):  # not every file system has modes
            path.chmod(0o666 & ~umask)
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def delete(path: Path):
    """Deletes a folder, a file or a link, but not what the link refers to. If it cannot, it only warns."""
    with only_warn(f"Deleting {path}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------- processes
# Sets up devices and ranks, and handles signals and errors.
# Signals that stop a run: a scheduler's or launcher's, Ctrl-C, and a closed terminal.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
# Programming errors keep their traceback. Libraries raise other types for a wrong setting.
BUGS = (AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError)


def setup_accelerator(args: argparse.Namespace) -> Accelerator:
    """Sets up devices, precision, trackers and logging by the flags, the launcher and `accelerate config`."""
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):  # before Accelerate looks for their libraries
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise SystemExit(
                f"accelerate config: {engine} is not supported: the model fits one GPU; choose multi-GPU"
            )
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise SystemExit(
            f"accelerate config: mixed_precision={precision} is not supported; choose no, fp16 or bf16"
        )
    atexit.register(kill_workers)
    # PyTorch's handler would raise at any point when a worker dies; `load_batches` gets that error anyway.
    torch.utils.data._utils.signal_handling._set_SIGCHLD_handler = lambda: None
    sys.stdout, sys.stderr = LossyStream(sys.stdout), LossyStream(sys.stderr)
    if args.hub_token:  # wandb and comet_ml record the command line
        sys.argv = [argument.replace(args.hub_token, "***") for argument in sys.argv]
    args.output_dir = Path(args.output_dir)
    with explain_errors(args, "output_dir"):
        args.output_dir.mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # set by an earlier call of `main` in this process
    accelerator = Accelerator(
        # A plugin, since ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment would override a number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.gradient_accumulation_steps),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to.split(","),
        project_config=ProjectConfiguration(args.output_dir, args.output_dir / args.logging_dir),
        kwargs_handlers=[
            # Each weight is used once per pass: autocast's cache would only hold 2 GB of 16-bit copies.
            AutocastKwargs(cache_enabled=False),
            # For a rank that downloads, encodes, saves or uploads.
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),
            # Gradients stay in the buckets in which they are reduced: 4 GB less without accumulation.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    if int(os.environ.get("WORLD_SIZE", 1)) > accelerator.num_processes:
        raise SystemExit(
            "WORLD_SIZE: each process would train alone, without a GPU; set ACCELERATE_USE_CPU=true"
        )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it lists requests, with signed URLs
    diffusers.utils.logging.set_verbosity_error()  # it warns that the Würstchen pipelines are deprecated
    # DDP warns about strides of size-1 dimensions: harmless.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


class LossyStream(io.TextIOBase):
    """Standard output or error that ignores write errors, as when the terminal or pipe is closed."""

    encoding = "utf-8"

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(Exception):
            self.stream.write(text)
            self.stream.flush()
        return len(text)


def end_training(accelerator: Accelerator):
    """Waits for all ranks, then closes trackers and process group."""
    accelerator.wait_for_everyone()
    # gloo's threads need the GIL to end their work, and PyTorch 2.6 holds it while it waits for them.
    time.sleep(0.1)
    with only_warn("Closing the trackers"):
        accelerator.end_training()


@contextlib.contextmanager
def deferred_signals(received: list[int]) -> Iterator[None]:
    """Appends stop signals to `received` during the training loop; Ctrl-C after another signal exits at once.

    In the loop, a rank with a signal finishes a save or a validation, and then the next step, in which all
    ranks agree to stop. They save a checkpoint, but no result, which resuming writes, and exit with status
    128 + signal (SIGTERM's for the other ranks), or 74 if the checkpoint could not be saved. During the last
    checkpoint, which no step follows, there is no agreement: the rank exits alone when it is saved. A rank
    that waits for storage exits without a checkpoint (`load_batches`). All this must fit in the time until
    the launcher or the scheduler kills the ranks (torchrun: 30 s).

    Before and after the loop a signal ends the process at once. When a rank has ended, PyTorch ends its
    workers, and the launcher the other ranks.
    """

    def handler(number: int, frame):
        if number == signal.SIGINT and received:
            os._exit(128 + number)
        received.append(number)
        print("\nStopping after the next step, with a checkpoint; Ctrl-C from now on stops at once.")

    previous = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


def prepare_worker(worker_id: int):
    """Ignores stop signals, which terminals and schedulers send to all processes: the main one handles them.
    Ends the worker if a batch cannot be sent, for which the main process would wait forever."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # abstract sockets: no file that is deleted or has too long a path
        multiprocessing.connection.arbitrary_address = lambda family: f"\0{os.getpid()}-{time.time_ns()}"

    def end_worker(error: Exception, item):
        print(f"A worker cannot send its batch: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)


def kill_workers():
    """Kills the data loaders' workers at exit. They ignore SIGTERM, so multiprocessing would wait for them
    forever after an error in the training loop."""
    for process in multiprocessing.active_children():
        process.kill()


@contextlib.contextmanager
def explain_errors(args: argparse.Namespace, flag: str) -> Iterator[None]:
    """Turns a library's error about a user's setting into one line that names the flag."""
    try:
        yield
    except BUGS:
        raise
    except Exception as error:
        value = getattr(args, flag)
        while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
            error = error.__cause__  # the reason, for example a full disk
        reason = str(error).strip() if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if re.search("LocalEntryNotFoundError|not cached locally", traceback.format_exc()):
            reason = "it is not a local folder, not in the cache, and the Hub cannot be reached"
        path = Path(str(value))
        for file in [path, *path.rglob("*")]:
            with contextlib.suppress(OSError):  # folders, and files that cannot be read
                if file.stat().st_size < 1000 and file.read_bytes().startswith(LFS_POINTER):
                    reason = f"{file} is a Git LFS pointer: run `git lfs pull`"
        raise SystemExit(f"--{flag}={value}: {printable(reason)}") from None


@contextlib.contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Logs an error of non-essential output, such as a curve, once, instead of ending the run."""
    try:
        yield
    except Exception as error:
        message = f"{what} failed, the run continues: {type(error).__name__}: {printable(str(error))}"
        logger.warning_once(message, exc_info=isinstance(error, BUGS), main_process_only=False)


def printable(text: str) -> str:
    """Text from a file or a library on one line, with control characters escaped, for a message."""
    return repr(text[:500])[1:-1]


# ---------------------------------------------------------------------------------------------------- logging
# Writes metrics and images to the output folder and the trackers.
SAMPLE_FILE = "samples/step-{:07d}-{}.png"  # of a step and one of the `validation_images`


def init_trackers(accelerator: Accelerator, args: argparse.Namespace, state: dict):
    """Starts the trackers, or continues the curves of the run that is resumed."""
    config = {name: v if isinstance(v, (int, float)) else str(v) for name, v in vars(args).items()}
    del config["hub_token"]
    init_kwargs = {
        "tensorboard": {"purge_step": state["global_step"] + 1 if state["global_step"] else 0},
        "wandb": {"id": state["wandb_run_id"], "resume": "allow"},
    }
    with explain_errors(args, "report_to"):
        accelerator.init_trackers(args.tracker_project_name, config, init_kwargs)


def log_metrics(accelerator: Accelerator, metrics: dict[str, float], global_step: int):
    """Passes metrics to the trackers and appends them to loss.jsonl as a line."""
    with only_warn("Logging to the trackers"):
        accelerator.log(metrics, step=global_step)
    if accelerator.is_main_process and metrics:
        with only_warn("Writing loss.jsonl"), open(accelerator.project_dir / "loss.jsonl", "a") as file:
            file.write(json.dumps({"step": global_step} | metrics) + "\n")


def read_metrics(output_dir: Path, name: str) -> list[dict[str, float]]:
    """The lines of loss.jsonl with the metric `name`, without lines that a crash truncated."""
    rows = []
    with contextlib.suppress(FileNotFoundError), open(output_dir / "loss.jsonl", errors="replace") as file:
        for line in filter(lambda line: f'"{name}"' in line, file):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def truncate_logs(args: argparse.Namespace, state: dict):
    """Removes from loss.jsonl and samples/ what a run that starts at `state` writes again."""
    with only_warn("Truncating loss.jsonl"):
        output_dir, trained = args.output_dir, state["global_step"]
        validated = min(state["validated_step"], args.max_train_steps - 1)  # the end is always validated
        partial = output_dir / ".loss.jsonl"
        with open(partial, "w") as file:
            for row in read_metrics(output_dir, "step"):
                if row["step"] <= (trained if "train_loss" in row else validated):
                    file.write(json.dumps(row) + "\n")
        partial.replace(output_dir / "loss.jsonl")
        for file in output_dir.glob("samples/step-*-prompt-*.png"):
            if int(file.name.split("-")[1]) > validated:
                file.unlink()


def find_sample(args: argparse.Namespace, global_step: int, prompt: str, name: str) -> Path | None:
    """The file of a validation image. None if it is missing or shows another prompt."""
    file = args.output_dir / SAMPLE_FILE.format(global_step, name)
    with contextlib.suppress(OSError), Image.open(file) as image:
        return file if image.info.get("prompt") == prompt else None


def log_images(
    accelerator: Accelerator, args: argparse.Namespace, images: list[Image.Image], global_step: int
):
    """Logs images and their prompts to each tracker and to samples/."""
    if not images:  # or one failed
        return
    named = list(zip(validation_images(args), images, strict=True))
    for tracker in accelerator.trackers:
        with only_warn(f"Logging images to {tracker.name}"):
            log_images_to_tracker(tracker, [(prompt, image) for (prompt, *_), image in named], global_step)
    with only_warn("Writing samples/"):
        for (prompt, name, _), image in named:
            text = PngImagePlugin.PngInfo()
            text.add_itxt("prompt", prompt)
            file = args.output_dir / SAMPLE_FILE.format(global_step, name)
            file.parent.mkdir(exist_ok=True)
            image.save(file, pnginfo=text)
        save_contact_sheet(args)


def log_images_to_tracker(tracker, images: list[tuple[str, Image.Image]], global_step: int):
    """Logs pairs of prompts and images. Add trackers here: Accelerate's own `log_images` has no captions."""
    values = {}
    for index, (prompt, image) in enumerate(images):
        name = f"validation/{index}"
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(image)[None]}, step=global_step, dataformats="NHWC")
            values[name] = prompt
        elif tracker.name in ("wandb", "trackio"):
            values[name] = importlib.import_module(tracker.name).Image(image, caption=prompt)
        elif tracker.name == "comet_ml":
            tracker.tracker.log_image(image, name=prompt, step=global_step)
    tracker.log(values, step=global_step)


def save_contact_sheet(args: argparse.Namespace):
    """Writes samples/contact-sheet.png: a row for each prompt and size, a column for each step, at most 12
    with the first and the last."""
    rows, samples = validation_images(args), args.output_dir / "samples"
    steps = np.unique([int(file.name.split("-")[1]) for file in samples.glob("step-*-prompt-*.png")])
    steps = steps[np.linspace(0, len(steps) - 1, min(len(steps), 12)).round().astype(int)]
    font = ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSansMono.ttf", 12)
    cells = []
    for (prompt, name, _), step in itertools.product(rows, steps):
        file = find_sample(args, step, prompt, name)
        image = Image.open(file) if file else Image.new("RGB", (1, 1), "white")
        cell = ImageOps.expand(ImageOps.pad(image, (184, 184), color="white"), (4, 72, 4, 4), "white")
        label = textwrap.fill(prompt, 24, max_lines=3, placeholder=" ...")
        ImageDraw.Draw(cell).text((4, 4), f"step {step}\n{label}", "black", font)
        cells.append(cell)
    make_image_grid(cells, rows=len(rows), cols=len(steps)).save(samples / "contact-sheet.png")


def save_loss_curve(output_dir: Path):
    """Writes loss.png: the training loss and the held-out loss, and their moving averages over 2 %."""
    with only_warn("Writing loss.png"):
        figure = Figure(figsize=(10, 5))
        axes = figure.subplots()
        for name, color in (("train_loss", "tab:blue"), ("val_loss", "tab:red")):
            rows = read_metrics(output_dir, name)
            points = np.array([(row["step"], row[name]) for row in rows if math.isfinite(row[name])])
            width = len(points) // 50 + 1
            if len(points):  # without overflows of fp16
                means = np.convolve(points[:, 1], np.ones(width) / width, "valid")
                axes.plot(*points.T, color=color, alpha=0.3)
                label = f"{name}, mean of {width}"
                axes.plot(points[width - 1 :, 0], means, ".-", ms=3, color=color, label=label)
        if axes.get_lines():  # not before the first step
            axes.set(xlabel="step", ylabel="loss")
            axes.legend()
            figure.savefig(output_dir / "loss.png")


# ------------------------------------------------------------------------------------------------- publishing
# Saves the result, describes it in a model card, and uploads it.
# Flags that are secret, or whose values only have a meaning on this machine or for this repo.
PRIVATE_FLAGS = {
    "hub_token",
    "hub_model_id",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "output_dir",
    "dataloader_num_workers",
    "local_rank",
}


def check_destinations(args: argparse.Namespace) -> str:
    """Checks write access to the repo, whose id it returns."""
    repo_id, token = args.hub_model_id or args.output_dir.resolve().name, args.hub_token
    if args.push_to_hub:
        with explain_errors(args, "hub_model_id"):
            if not (token or hub.get_token()):
                raise ValueError("there is no token: log in with `hf auth login`")
            repo = hub.create_repo(repo_id, private=args.hub_private_repo or None, exist_ok=True, token=token)
            repo_id = repo.repo_id
            # Raises an error for a read-only token. Uploads nothing.
            hub.preupload_lfs_files(repo_id, [hub.CommitOperationAdd("README.md", b"-")], token=token)
    return repo_id


def save_components(pipeline: diffusers.DiffusionPipeline, folder: Path):
    """Writes a pipeline; of a tokenizer also the files that transformers 4 reads."""
    for name, component in pipeline.components.items():
        if isinstance(component, wuerstchen.WuerstchenPrior):
            save_prior(component, folder / name)
            continue
        if isinstance(component, diffusers.ModelMixin):
            component.register_to_config(_name_or_path="")  # it would publish a local path
        component.save_pretrained(folder / name)
        if isinstance(component, CLIPTokenizerFast):
            component.backend_tokenizer.model.save(str(folder / name))  # vocab.json and merges.txt
    pipeline.save_config(folder)


def move_into_place(partial: Path, output_dir: Path):
    """Moves complete parts from a temporary folder into the result, and deletes the old parts."""
    flush_to_disk(partial)
    old = output_dir / f".result.{time.time_ns()}"
    old.mkdir()
    for path in partial.iterdir():
        with contextlib.suppress(FileNotFoundError):
            (output_dir / path.name).rename(old / path.name)
        path.rename(output_dir / path.name)
    for path in output_dir.glob(".result.*"):
        delete(path)


def save_pipeline(args: argparse.Namespace, prior, tokenizer, noise_scheduler) -> int:
    """Writes `prior_pipeline/` and then the whole pipeline at the root, all in float32. Each is complete in a
    temporary folder before it replaces an older result. Returns the side in pixels of the images."""
    output_dir, partial = args.output_dir, args.output_dir / ".result.partial"
    # The text encoder in use may be in half precision.
    text_encoder = load_model(args, PRIOR_FLAG, CLIPTextModel, "text_encoder", dtype=torch.float32)
    decoder = load_decoder(args, torch.float32)
    pipeline = wuerstchen.WuerstchenPriorPipeline(tokenizer, text_encoder, prior, noise_scheduler)
    prior_components = {f"prior_{name}": component for name, component in pipeline.components.items()}
    combined = wuerstchen.WuerstchenCombinedPipeline(**decoder.components, **prior_components)
    with explain_errors(args, "output_dir"):
        delete(partial)
        try:
            save_components(pipeline, partial / "prior_pipeline")
            move_into_place(partial, output_dir)
            save_components(combined, partial)
            move_into_place(partial, output_dir)
        finally:
            delete(partial)
    return decoder_image_size(decoder, args.resolution)


def training_command(args: argparse.Namespace) -> str:
    """The settings as a command that may be published: without private flags and local paths."""
    words = ["accelerate", "launch", Path(__file__).name]
    for name, value in vars(args).items():
        is_local = name.endswith(PATH_FLAGS) and os.path.exists(str(value))
        if name not in PRIVATE_FLAGS and not is_local and value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(value) for value in values if value is not True)]
    return shlex.join(words)


def save_model_card(
    args: argparse.Namespace, image_size: int, global_step: int, plan: dict, accelerator: Accelerator
):
    """Writes README.md, the model card: models, data, settings, images, and code to use it."""
    prompts = args.validation_prompts or []
    base_model, dataset = (
        name if name and not os.path.exists(name) else None
        for name in (args.pretrained_prior_model_name_or_path, args.dataset_name)
    )
    images = {
        prompt: find_sample(args, global_step, prompt, name)
        for prompt, name, _ in validation_images(args)[: len(prompts)]
    }
    source = args.hub_model_id if args.push_to_hub else str(args.output_dir.resolve())
    card = f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [wuerstchen, text-to-image, diffusers, diffusers-training]
{f"base_model: {base_model}" if base_model else ""}
{f"datasets: [{dataset}]" if dataset else ""}
---

# {args.hub_model_id}
The Würstchen prior **{base_model or "of a local folder"}**, fine-tuned on **{dataset or "local images"}**.
{" ".join(f"![{prompt}](samples/{file.name})" for prompt, file in images.items() if file)}

## How to use it
```python
import diffusers
import torch

if not hasattr(diffusers.pipelines, "wuerstchen"):  # from 0.38 on
    from diffusers.pipelines.deprecated import wuerstchen
    diffusers.pipelines.wuerstchen = wuerstchen

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
source = {source!r}
pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(source, torch_dtype=dtype).to(device)
prompt = {[*prompts, "a photo"][0]!r}
size, guidance_scale = {image_size}, {GUIDANCE_SCALE}
image = pipeline(prompt, width=size, height=size, prior_guidance_scale=guidance_scale).images[0]
image.save("image.png")
```
The weights are float32. The prior alone, with its text encoder, is the pipeline in `prior_pipeline/`.

## How it was trained
For {global_step} steps of {plan["samples_per_step"]} samples,
{global_step * plan["samples_per_step"] / plan["num_rows"]:.1f} epochs of {plan["num_rows"]} rows,
on {accelerator.num_processes} x {accelerator.device.type}:
```bash
{training_command(args)}
```
![training loss](loss.png)
"""
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")


def push_to_hub(args: argparse.Namespace, global_step: int):
    """Uploads card, curve, last images and all parts of both pipelines, once, at the end of the run; no
    checkpoints, logs or data. `check_destinations` has created the repo at the start."""
    names = ["README.md", "model_index.json", "loss.png", f"samples/step-{global_step:07d}-*"]
    components = json.loads((args.output_dir / "model_index.json").read_text())
    names += [f"{folder}/*" for folder in ("prior_pipeline", *components)]
    with explain_errors(args, "push_to_hub"):
        hub.upload_folder(
            repo_id=args.hub_model_id,
            folder_path=args.output_dir,
            allow_patterns=names,
            commit_message="End of training",
            token=args.hub_token,
        )


@only_warn("The summary")
def log_summary(args: argparse.Namespace, global_step: int):
    """Logs where the results of a finished run are, and what to do next."""
    output_dir, resume = args.output_dir, "the same command with --resume_from_checkpoint=latest and"
    losses = [f"{row['val_loss']:.4f} at step {row['step']}" for row in read_metrics(output_dir, "val_loss")]
    logger.info(
        f"Done after {global_step} steps\n"
        f"  held-out loss, with --validation_split: {', '.join(losses[:1] + losses[1:][-1:])}\n"
        f"  curve of the loss: {output_dir / 'loss.png'}\n"
        f"  images, with --validation_prompts: {output_dir / 'samples' / 'contact-sheet.png'}\n"
        f"  result, and how to generate images with it: {output_dir / 'README.md'}\n"
        f"  to continue training: {resume} --max_train_steps={2 * global_step}\n"
        f"  to publish: {resume} --push_to_hub"
    )


# ---------------------------------------------------------------------------------------------------- compile
# Records the prior's training steps as CUDA graphs, for --compile.


def make_compiled_forward(prior: wuerstchen.WuerstchenPrior) -> Callable:
    """WuerstchenPrior.forward in channels-last format, in which one compiled function serves all triplets of
    blocks. (Compiling the whole model takes minutes.)"""

    @functools.partial(torch.compile, dynamic=False)
    def run_triplet(blocks, x, r_embed, c_embed):
        res_block, timestep_block, attention_block = blocks
        return attention_block(timestep_block(res_block(x), r_embed), c_embed)

    def compiled_forward(noisy_latents, timesteps, prompt_embeds):
        x = prior.projection(noisy_latents).contiguous(memory_format=torch.channels_last)
        r_embed, c_embed = prior.gen_r_embedding(timesteps), prior.cond_mapper(prompt_embeds)
        for first in range(0, len(prior.blocks), 3):
            x = run_triplet(tuple(prior.blocks[first : first + 3]), x, r_embed, c_embed)
        a, b = prior.out(x).chunk(2, dim=1)
        return (noisy_latents - a) / ((1 - b).abs() + 1e-5)

    return compiled_forward


def compile_prior(
    prior: wuerstchen.WuerstchenPrior,
    accelerator: Accelerator,
    args: argparse.Namespace,
    prompt_embeds: torch.Tensor,
):
    """Makes the prior's training steps replay two CUDA graphs, forward and backward. Validation runs the
    prior as it is. Where that is not possible, a warning is logged and nothing is changed.

    The graphs read the weights at their addresses, so change them in place only. Micro-batches must have
    `args.train_batch_size` samples, with embeddings like `prompt_embeds`, (1, 77, width).
    """
    if accelerator.device.type != "cuda" or accelerator.state.dynamo_plugin.backend != "NO":
        logger.warning("--compile is ignored: it is for CUDA, without --dynamo_backend")
        return
    logger.info("Compiling the prior, which takes a minute the first time")
    eager_forward = prior.forward
    batch_size, side = args.train_batch_size, math.ceil(args.resolution / STRIDE)
    latents = torch.zeros(batch_size, prior.config.c_in, side, side, device=accelerator.device)
    timesteps = torch.zeros(batch_size, device=accelerator.device)
    inputs = (latents, timesteps, prompt_embeds.repeat(batch_size, 1, 1))
    try:
        # For the backward pass, keep the results of matrix products and recompute cheap operations.
        config = torch._functorch.config
        for reason in ("used_far_apart", "long_fusible_chains", "materialized_backward"):
            setattr(config, f"ban_recompute_{reason}", False)
        config.activation_memory_budget = 0.5 if args.gradient_checkpointing else 1.0  # share of activations
        prior.forward = make_compiled_forward(prior)
        # The fastest attention kernel on an H100 first.
        kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        kernels += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(kernels, set_priority=True), accelerator.autocast():
            graphed_forward = torch.cuda.make_graphed_callables(prior.train(), inputs).forward
    except Exception as error:  # for example no C compiler, or a GPU that Triton does not support
        prior.forward = eager_forward
        logger.warning(f"--compile is ignored: {type(error).__name__}: {printable(str(error))}")
        return

    def forward(*inputs):
        return graphed_forward(*inputs) if prior.training else eager_forward(*inputs)

    prior.forward = forward
    if args.gradient_accumulation_steps > 1:
        # The first micro-step's gradient is the graph's own memory, which the next one would overwrite.
        for weight in filter(lambda weight: weight.requires_grad, prior.parameters()):
            weight.register_hook(lambda grad, weight=weight: grad.clone() if weight.grad is None else grad)


if __name__ == "__main__":
    main()
