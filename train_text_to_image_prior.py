# SPDX-License-Identifier: Apache-2.0
"""Fine-tune the Würstchen prior, the model that draws a picture's 42 times smaller latents from its caption.

    accelerate launch train_text_to_image_prior.py --train_data_dir=pictures --output_dir=run   # as configured
    torchrun --nproc_per_node=8 train_text_to_image_prior.py --train_data_dir=pictures --output_dir=run
    python train_text_to_image_prior.py --train_data_dir=pictures --output_dir=run              # one device

To resume, run the same command again with --resume_from_checkpoint=latest. The README explains every flag.

Where to edit: augmentation in `preprocess_train`, captions in `tokenize_captions`, data in `load_train_dataset`, the
optimizer in `make_optimizer`, noise and loss in the loop of `main`. The file reads in the order in which it runs.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from glob import escape
from pathlib import Path

import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, gather_object
from diffusers import DDPMWuerstchenScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import CLIPTextModel, CLIPTokenizerFast

from modeling_efficient_net_encoder import EfficientNetEncoder, center_square, decode_picture, normalize_pixels

try:
    from diffusers.pipelines import wuerstchen
except ImportError:  # diffusers 0.38 moved the package, but what is saved and published names it by its old place
    from diffusers.pipelines.deprecated import wuerstchen

    diffusers.pipelines.wuerstchen = wuerstchen

logger = get_logger(__name__, log_level="INFO")

# The published prior pipeline undoes the scaling of its latents with these: latents * LATENT_MEAN - LATENT_STD.
LATENT_MEAN, LATENT_STD = 42.0, 1.0
ENCODER_STRIDE = 32  # pixels a latent, in each direction
STATE_FILE = "trainer_state.json"  # written last into a checkpoint, so that one without it is torn
FUSED_ADAMW_DEVICES = ("cuda", "cpu", "mps", "xpu")
CACHES = (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)  # where pictures of the Hub's data sets may lie
SECRETS = ("hub_token",)  # arguments that no tracker, checkpoint or card may see
BAD_ROWS_IN_A_ROW = 12  # so many broken rows drawn one after the other mean that most of the data set is broken
SMALLEST_SCALE = 2.0**-20  # fp16's loss scale is halved at each overflow; below this the run has gone wrong
VALIDATION_TIMEOUT = timedelta(hours=3)  # other ranks wait this long while the first draws, saves or downloads


# ------------------------------------------------------------------------------------------------ arguments
def bounded(kind: type, low: float, below: float = math.inf):
    """An argparse type: an int or a float in [low, below)."""

    def convert(text: str):
        value = kind(text)
        if not low <= value < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"must be at least {low}{limit}, not {text}")
        return value

    convert.__name__ = kind.__name__  # argparse says "invalid int value" with it
    return convert


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's settings; what contradicts itself ends here, before anything is loaded."""
    parser = argparse.ArgumentParser(description="Fine-tune the Würstchen prior on captioned pictures.")
    count, size, fraction, real = bounded(int, 1), bounded(int, 0), bounded(float, 0, 1), bounded(float, 0)
    on = {"action": "store_true"}

    flag = parser.add_argument_group("models, each a Hub repo or a local folder").add_argument
    flag("--pretrained_prior_model_name_or_path", default="warp-ai/wuerstchen-prior", help="what is trained")
    flag("--pretrained_decoder_model_name_or_path", default="warp-ai/wuerstchen", help="what draws from its latents")
    flag("--pretrained_image_encoder_name_or_path", default="dome272/wuerstchen", help="what gives pictures' latents")
    flag("--cache_dir", help="folder for downloaded models and prepared data sets")

    flag = parser.add_argument_group("data, one of the first two; the data set's name wins").add_argument
    flag("--dataset_name", help="a data set on the Hub, or a local copy of one")
    flag("--train_data_dir", help="folder of pictures with a metadata.jsonl or .csv, or of Parquet or Arrow files")
    flag("--dataset_config_name", help="which configuration of the data set")
    flag("--image_column", default="image", help="the column of pictures")
    flag("--caption_column", default="text", help="the column of captions, each a string or a list of them")
    flag("--max_train_samples", type=count, help="train on so many rows, drawn with the seed")
    flag("--resolution", type=bounded(int, ENCODER_STRIDE), default=512, help="side of the square cropped, in pixels")
    flag("--skip_bad_rows", **on, help="put other rows in place of those that cannot be read, instead of stopping")
    flag("--dataloader_num_workers", type=size, default=0, help="reading processes; 0: the main one reads")

    flag = parser.add_argument_group("training; a step is an update of the weights").add_argument
    flag("--seed", type=size, help="of all that is drawn; by default one is picked, told and kept")
    flag("--train_batch_size", type=count, default=1, help="pictures a device and micro-step")
    flag("--gradient_accumulation_steps", type=count, default=1, help="micro-steps an update")
    flag("--num_train_epochs", type=count, default=100, help="passes over the data")
    flag("--max_train_steps", type=count, help="updates in all, instead of epochs")
    flag("--gradient_checkpointing", **on, help="less memory, a slower backward pass")
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="by default what Accelerate was told")
    flag("--allow_tf32", **on, help="TF32 for float32 matrix products on CUDA")
    flag("--use_ema", **on, help="keep an average of the weights, which is then validated and saved")
    flag("--loss_weighting", choices=["none", "p2"], default="none", help="p2 is the original training's")
    flag("--caption_dropout", type=fraction, default=0.0, help="share of samples trained on the empty caption")
    flag("--cache_latents", **on, help="reserved, not built yet")
    flag("--compile", **on, help="reserved, not built yet")

    flag = parser.add_argument_group("optimizer, AdamW").add_argument
    flag("--learning_rate", type=real, default=1e-4, help="at the schedule's peak")
    flag("--lr_scheduler", choices=[schedule.value for schedule in SchedulerType], default="constant")
    flag("--lr_warmup_steps", type=size, default=500, help="updates, for schedules that warm up")
    flag("--lr_step_rules", help="for piecewise_constant: 1:100,0.1:200,0.01 is the peak's share until an update")
    flag("--adam_beta1", type=fraction, default=0.9)
    flag("--adam_beta2", type=fraction, default=0.999)
    flag("--adam_weight_decay", type=real, default=0.0)
    flag("--adam_epsilon", type=real, default=1e-8)
    flag("--max_grad_norm", type=bounded(float, 1e-8), default=1.0, help="longer gradients are clipped to this")
    flag("--use_8bit_adam", **on, help="bitsandbytes' AdamW8bit, for less memory")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", default="wuerstchen-model-finetuned", help="folder for all that a run leaves")
    flag("--overwrite_output_dir", **on, help="delete the checkpoints there that this run does not go on from")
    flag("--checkpointing_steps", type=count, default=500, help="updates between checkpoints")
    flag("--checkpoints_total_limit", type=count, help="how many of the newest checkpoints to keep")
    flag("--resume_from_checkpoint", help="'latest' or a checkpoint's path")
    flag("--validation_prompts", nargs="+", help="captions to draw while training and at the end")
    flag("--validation_epochs", type=count, default=5, help="epochs between such drawings")
    flag("--logging_dir", default="logs", help="the trackers' folder under --output_dir")
    flag("--report_to", default="tensorboard", help="trackers by comma: tensorboard, wandb, comet_ml, ..., all, none")
    flag("--tracker_project_name", default="text2image-fine-tune")
    flag("--push_to_hub", **on, help="upload the result at the end")
    flag("--hub_model_id", help="the repo to upload to; by default the name of --output_dir")
    flag("--hub_token", help="goes to the Hub only; safer is `hf auth login`")
    flag("--local_rank", type=int, default=-1, help="unused: Accelerate reads the environment")

    args = parser.parse_args(argv)
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("give --dataset_name (a data set on the Hub) or --train_data_dir (a folder)")
    if (args.lr_scheduler == "piecewise_constant") != (args.lr_step_rules is not None):
        parser.error("--lr_scheduler=piecewise_constant and --lr_step_rules need each other")
    if args.cache_latents or args.compile:
        parser.error("--cache_latents and --compile are not built yet: leave them out")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`")
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in tracker_names(args.report_to):
        if name not in [*available, "all"]:
            parser.error(f"--report_to={name} is not installed; there is {', '.join(available)}, all and none")
    return args


def tracker_names(report_to: str) -> list[str]:
    """`--report_to` as a list; `none` is the empty one."""
    return [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]


@contextmanager
def blaming(flag: str, value):
    """Turns whatever a library says of a user's setting into one line that names the flag."""
    try:
        yield
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise SystemExit(f"{flag}={value}: {type(error).__name__}: {reason[:300]}") from None


# ----------------------------------------------------------------------------------------------------- data
PICTURE_SUFFIXES = frozenset(Image.registered_extensions())


def load_splits(source: str, args: argparse.Namespace) -> dict:
    """The splits of a data set on the Hub or in a folder, of whatever kind its files are."""
    folder = Path(source)
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(folder)
    if (folder / "state.json").is_file():
        return {"train": datasets.load_from_disk(folder)}
    if not folder.is_dir() or (args.dataset_name and (folder / "README.md").is_file()):  # on the Hub, or from there
        return datasets.load_dataset(source, args.dataset_config_name, cache_dir=args.cache_dir)
    suffixes = {path.suffix.lower() for path in folder.rglob("*")}
    here = escape(str(folder.resolve()))  # `datasets` takes [brackets] in a folder's name for a pattern
    for kind in ("parquet", "arrow"):
        if f".{kind}" in suffixes:
            return datasets.load_dataset(kind, data_dir=here, cache_dir=args.cache_dir)
    if not suffixes & PICTURE_SUFFIXES:
        raise ValueError("there are no pictures, Parquet or Arrow files in it")
    # Named here, since `datasets` would take a picture called test.jpg for a split.
    found = [name for name in ("train", "validation", "test") if (folder / name).is_dir()]
    files = {name: f"{here}/{name}/**" for name in found} or {"train": f"{here}/**"}
    return datasets.load_dataset("imagefolder", data_files=files, cache_dir=args.cache_dir)


def load_train_dataset(args: argparse.Namespace, seed: int) -> datasets.Dataset:
    """The rows to train on, their pictures still encoded, so that reading a row cannot fail on a broken picture."""
    flag, source = "--dataset_name", args.dataset_name
    if source is None:
        flag, source = "--train_data_dir", args.train_data_dir
        if not Path(source).is_dir():
            raise SystemExit(f"{flag}={source}: there is no such folder")
    elif args.train_data_dir is not None:
        logger.warning(f"--train_data_dir={args.train_data_dir} is not used: --dataset_name is given too")
    with blaming(flag, source):
        splits = load_splits(source, args)
    if "train" not in splits or not len(splits["train"]):
        raise SystemExit(f"{flag}={source}: no rows in a split named train; there is {', '.join(splits)}")

    dataset, columns = splits["train"], {"--image_column": args.image_column, "--caption_column": args.caption_column}
    for flag, column in columns.items():
        if column not in dataset.column_names:
            raise SystemExit(f"{flag}={column}: {source} has no such column, only {', '.join(dataset.column_names)}")
    feature = dataset.features[args.image_column]
    encoded = {"bytes", "path"} <= feature.keys() if isinstance(feature, dict) else "binary" in str(feature)
    if not encoded and not isinstance(feature, datasets.Image):
        raise SystemExit(f"--image_column={args.image_column} holds {feature}, not pictures: cast it to Image")
    with blaming("--image_column", args.image_column):
        dataset = dataset.select_columns(list({*columns.values()}))
        dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    if args.max_train_samples is not None:
        if args.max_train_samples > len(dataset):
            logger.warning(f"--max_train_samples={args.max_train_samples}: all {len(dataset)} rows are used")
        dataset = dataset.shuffle(seed=seed).select(range(min(args.max_train_samples, len(dataset))))
    return dataset


def check_inside(value: dict, args: argparse.Namespace):
    """Raises ValueError if a row's picture is a file outside the data set's folder (or the caches, for the Hub's)."""
    folders = [args.train_data_dir] if args.dataset_name is None else [args.dataset_name, args.cache_dir, *CACHES]
    path = (value or {}).get("path")
    if path and not value["bytes"] and "://" not in path:
        inside = (Path(path).absolute().is_relative_to(Path(folder).resolve()) for folder in folders if folder)
        if ".." in Path(path).parts or not any(inside):
            raise ValueError(f"the picture ({path}) lies outside the data set's folder")


def draw_seed(*key) -> int:
    """A seed for one thing, well mixed from what names it: draw_seed(seed, "epoch", 3)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int) -> torch.Tensor:
    """The order of the rows in an epoch: (rows,) int64."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(draw_seed(seed, "epoch", epoch)))


class TrainSamples(torch.utils.data.Dataset):
    """The endless stream of samples, epoch after epoch, of which any position can be read at once.

    Sample number `position` is row `epoch_order(...)[position % rows]` of epoch `position // rows`, and all that is
    drawn for it follows from (seed, position). So resuming is reading on from a position: nothing is skipped.
    A row that cannot be read becomes {"problem": text}, or with `skip_bad_rows` another row drawn in its place.
    """

    def __init__(self, rows: datasets.Dataset, preprocess, seed: int, skip_bad_rows: bool):
        self.rows, self.preprocess, self.seed, self.skip_bad_rows = rows, preprocess, seed, skip_bad_rows

    def __getitem__(self, position: int) -> dict:
        epoch, place = divmod(position, len(self.rows))
        row = int(epoch_order(self.seed, epoch, len(self.rows))[place])
        draw = random.Random(draw_seed(self.seed, "sample", position))
        bad_rows = {}
        for _ in range(BAD_ROWS_IN_A_ROW):
            try:
                return self.preprocess(self.rows[row], draw) | {"row": row, "bad_rows": bad_rows}
            except Exception as error:  # a decoder may raise anything
                bad_rows[row] = f"row {row} of the {len(self.rows)} used: {error}"
                if not self.skip_bad_rows:
                    return {"problem": f"{bad_rows[row]}; mend it, or leave such rows out with --skip_bad_rows"}
                row = draw.randrange(len(self.rows))
        return {"problem": f"{BAD_ROWS_IN_A_ROW} rows in a row cannot be read, the last: {bad_rows.popitem()[1]}"}


def micro_batches(first_step: int, last_step: int, plan: dict, rank: int) -> Iterator[range]:
    """The positions of each of this rank's micro-batches for the updates [first_step, last_step)."""
    size, share = plan["train_batch_size"], plan["train_batch_size"] * plan["processes"]
    update = share * plan["gradient_accumulation_steps"]
    starts = range(first_step * update + rank * size, last_step * update, share)
    return (range(start, start + size) for start in starts)


def tokenize_captions(captions: list[str], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP tokens and their mask, (B, 77) int64 and bool: padded, and cut to what the text encoder can take."""
    inputs = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return inputs.input_ids, inputs.attention_mask.bool()


def pick_caption(row: dict, draw: random.Random, args: argparse.Namespace) -> str:
    """The row's caption, one drawn from a list of them, or the empty one. Raises ValueError if there is no text."""
    captions = row[args.caption_column]
    choices = [captions] if isinstance(captions, str) else captions
    if not isinstance(choices, (list, tuple)) or not choices or not all(isinstance(c, str) for c in choices):
        file = (row[args.image_column] or {}).get("path") or "no file name"
        raise ValueError(f"the caption is {captions!r}, not a string or a list of strings (picture: {file})")
    caption = draw.choice(choices)
    return "" if draw.random() < args.caption_dropout else caption


def preprocess_train(row: dict, draw: random.Random, tokenizer, args: argparse.Namespace) -> dict:
    """A row of the data set as tensors: pixels (3, resolution, resolution), normalised for the encoder; tokens (77,).

    Take whatever is random from `draw`, which is seeded for the sample, so that a resumed run draws the same.
    """
    caption = pick_caption(row, draw, args)
    check_inside(row[args.image_column], args)
    image = center_square(decode_picture(row[args.image_column]), args.resolution)
    (text_input_ids,), (text_mask,) = tokenize_captions([caption], tokenizer)
    pixels = normalize_pixels(image)
    return {"effnet_pixel_values": pixels, "text_input_ids": text_input_ids, "text_mask": text_mask}


def collate_fn(examples: list[dict]) -> dict:
    """Stacks samples to a batch; a problem in one of them is the batch's."""
    problems = [example["problem"] for example in examples if "problem" in example]
    if problems:
        return {"problem": problems[0]}
    tensors = ("effnet_pixel_values", "text_input_ids", "text_mask")
    batch = {name: torch.stack([example[name] for example in examples]) for name in tensors}
    batch["rows"] = [example["row"] for example in examples]
    batch["bad_rows"] = {row: text for example in examples for row, text in example["bad_rows"].items()}
    return batch


def next_batch(batches, device: torch.device, bad_rows: set) -> dict:
    """The next micro-batch, on the device; rows that were left out are named once and noted in `bad_rows`."""
    batch = next(batches)
    if "problem" in batch:
        raise SystemExit(batch["problem"])
    for row in batch["bad_rows"].keys() - bad_rows:
        logger.warning(f"Left out: {batch['bad_rows'][row]}", main_process_only=False)
    bad_rows.update(batch["bad_rows"])
    return {name: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for name, v in batch.items()}


# --------------------------------------------------------------------------------------------------- models
def deepspeed_zero_init_disabled_context_manager():
    """Within it, DeepSpeed's ZeRO-3 does not partition the frozen models while they load."""
    plugin = AcceleratorState().deepspeed_plugin if is_initialized() else None
    return nullcontext() if plugin is None else plugin.zero3_init_context_manager(enable=False)


def load_models(args: argparse.Namespace, checkpoint: Path | None, weight_dtype: torch.dtype) -> tuple:
    """The tokenizer, both frozen encoders in `weight_dtype`, and the prior, pretrained or the checkpoint's."""
    source, cache_dir = args.pretrained_prior_model_name_or_path, args.cache_dir
    with deepspeed_zero_init_disabled_context_manager():
        with blaming("--pretrained_prior_model_name_or_path", source):
            tokenizer = CLIPTokenizerFast.from_pretrained(source, subfolder="tokenizer", cache_dir=cache_dir)
            text_encoder = load_text_encoder(args, weight_dtype).requires_grad_(False).eval()
        with blaming("--pretrained_image_encoder_name_or_path", args.pretrained_image_encoder_name_or_path):
            image_encoder = EfficientNetEncoder.load(args.pretrained_image_encoder_name_or_path, cache_dir)
            image_encoder.requires_grad_(False).eval().to(weight_dtype)
    with blaming("--pretrained_prior_model_name_or_path", source):
        prior = wuerstchen.WuerstchenPrior.from_pretrained(
            checkpoint or source, subfolder="prior", torch_dtype=torch.float32, cache_dir=cache_dir
        )
        given, taken = text_encoder.config.hidden_size, prior.config.c_cond
        if given != taken:
            raise ValueError(f"its text encoder gives {given} features, but its prior takes c_cond={taken}")
    with blaming("--pretrained_image_encoder_name_or_path", args.pretrained_image_encoder_name_or_path):
        given, taken = image_encoder.config.c_latent, prior.config.c_in
        if given != taken:
            raise ValueError(f"it gives c_latent={given} channels, but the prior takes c_in={taken}")
    prior.set_attn_processor(AttnProcessor2_0())  # the same attention, by PyTorch's memory-efficient kernel
    if args.gradient_checkpointing:
        prior.enable_gradient_checkpointing()
    return tokenizer, text_encoder, image_encoder, prior


def load_text_encoder(args: argparse.Namespace, dtype: torch.dtype) -> CLIPTextModel:
    """The prior's text encoder: CLIP ViT-bigG's text tower in the published model."""
    source = args.pretrained_prior_model_name_or_path
    return CLIPTextModel.from_pretrained(source, subfolder="text_encoder", dtype=dtype, cache_dir=args.cache_dir)


def make_optimizer(prior: torch.nn.Module, args: argparse.Namespace, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over all of the prior, fused where the device has it."""
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_cls
    else:
        optimizer_cls = functools.partial(torch.optim.AdamW, fused=device.type in FUSED_ADAMW_DEVICES)
    return optimizer_cls(
        prior.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def p2_weight(noise_scheduler: DDPMWuerstchenScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """1 / (1 + SNR) = 1 - alpha_bar(t), (B,): P2 weighting (arXiv:2204.00227) with k = gamma = 1, Würstchen's."""
    deviation = noise_scheduler.add_noise(torch.zeros_like(timesteps), torch.ones_like(timesteps), timesteps)
    return deviation**2


def make_ema(args, prior: torch.nn.Module, checkpoint: Path | None) -> EMAModel:
    """The average of the prior's weights (decay 0.9999, ramped up), new or the checkpoint's."""
    if checkpoint is None:
        return EMAModel(prior.parameters(), model_cls=type(prior), model_config=prior.config, foreach=True)
    if not (checkpoint / "prior_ema").is_dir():
        raise SystemExit(f"--use_ema: {checkpoint} has no prior_ema/ to go on with, since its run kept no average")
    return EMAModel.from_pretrained(checkpoint / "prior_ema", type(prior), foreach=True)


def read_numbers(accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, signals: list) -> tuple[float, float, bool]:
    """The loss, averaged over the ranks, the gradient's norm, and whether a rank was told to stop: one transfer."""
    shared = accelerator.reduce(torch.stack([loss, torch.full_like(loss, len(signals))]), "mean")
    loss, told, grad_norm = torch.cat([shared, grad_norm.to(loss)[None]]).tolist()
    return loss, grad_norm, told > 0


def refuse_broken_numbers(accelerator, output_dir: Path, update: int, loss: float, grad_norm: float, drawn: dict):
    """Ends the run before a loss or gradient that is not finite reaches the weights, and says what was `drawn`.

    With fp16 an overflow is normal: the scaler leaves the update out and halves its scale, until there is none left.
    """
    scaler = accelerator.scaler
    if scaler.get_scale() < SMALLEST_SCALE if scaler else not math.isfinite(loss + grad_norm):
        good = ", ".join(path.name for path in checkpoints_in(output_dir)[-1:]) or "there is none"
        facts = f"loss {loss}, gradient norm {grad_norm}, {drawn}; the last good checkpoint: {good}"
        raise SystemExit(f"stopped before update {update}: " + " ".join(facts.split()))


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within it, SIGTERM and SIGINT are put into the list, for the loop to look at; a second one ends the process."""
    received = []

    def note(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)
        os.write(2, b"\nStopping after this update; another signal stops at once.\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(worker: int):
    """Leaves stopping to the main process: terminals and schedulers signal every process of a job."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def averaged_weights(prior: torch.nn.Module, ema_prior: EMAModel | None):
    """Within it, the prior holds the average of its weights, if one is kept."""
    if ema_prior is None:
        yield
        return
    ema_prior.store(prior.parameters())
    ema_prior.copy_to(prior.parameters())
    try:
        yield
    finally:
        ema_prior.restore(prior.parameters())


# ---------------------------------------------------------------------------------------------- checkpoints
def is_whole(checkpoint: Path) -> bool:
    """Whether all files that the checkpoint's own list names, which is written last, are there in full."""
    try:
        files = json.loads((checkpoint / STATE_FILE).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; what is torn or of another kind is passed over."""
    found = output_dir.resolve().glob("checkpoint-*")
    whole = [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name) and is_whole(path)]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to go on from: the newest whole one for `latest`, or that path; None: start anew."""
    if wanted is None:
        return None
    if wanted != "latest":
        for path in (Path(wanted), output_dir / wanted):
            if is_whole(path):
                return path.resolve()
        raise SystemExit(f"--resume_from_checkpoint={wanted}: there is no whole checkpoint at that path")
    whole = checkpoints_in(output_dir)
    for path in sorted(set(output_dir.resolve().glob("checkpoint*")) - set(whole)):
        logger.warning(f"Passed over {path}: it is not a whole checkpoint")
    if not whole:
        logger.info(f"--resume_from_checkpoint=latest: there is none in {output_dir}, so this run starts anew")
    return whole[-1] if whole else None


def other_checkpoints(output_dir: Path, checkpoint: Path | None) -> list[Path]:
    """The checkpoints there that this run would mix its own with: another run's, or newer ones."""
    found = checkpoints_in(output_dir)
    return found[found.index(checkpoint) + 1 :] if checkpoint in found else found


def remove_checkpoints(paths: list[Path], output_dir: Path):
    """Deletes them under other names, so that what a kill leaves is known for what it is, and deletes such, too."""
    for path in paths:
        path.rename(path.with_name(f".old-{path.name}"))
    for path in output_dir.glob(".*checkpoint-*"):
        shutil.rmtree(path)


def register_checkpoint_hooks(accelerator: Accelerator, ema_prior: EMAModel | None):
    """Makes `save_state` write the prior and its average in diffusers' format, and `load_state` leave them to us."""

    def save_prior(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save_pretrained(os.path.join(folder, "prior"))
            if ema_prior is not None:
                ema_prior.save_pretrained(os.path.join(folder, "prior_ema"))

    accelerator.register_save_state_pre_hook(save_prior)
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())  # it was loaded from there


def save_checkpoint(accelerator: Accelerator, output_dir: Path, state: dict, limit: int | None):
    """Writes checkpoint-N aside, flushes it, renames it in one step, and only then deletes what is over the limit.

    A full disk costs this checkpoint, not the run: the older ones stay, and the run goes on.
    """
    final = output_dir / f"checkpoint-{state['global_step']}"
    aside = output_dir / f".{final.name}"
    problem = None
    try:
        accelerator.save_state(str(aside))  # every rank: each has a random state, and perhaps a shard, of its own
    except Exception as error:
        problem = error
    problems = [text for text in gather_object([problem and str(problem)]) if text]
    if accelerator.is_main_process:
        try:
            if problems:
                raise OSError(problems[0])
            files = {str(path.relative_to(aside)): path.stat().st_size for path in aside.rglob("*") if path.is_file()}
            (aside / STATE_FILE).write_text(json.dumps(state | {"files": files}, indent=2))
            for path in [*aside.rglob("*"), aside]:
                flush_to_disk(path)
            shutil.rmtree(final, ignore_errors=True)  # there is one only if it is torn
            aside.rename(final)
            flush_to_disk(output_dir)
            remove_checkpoints(checkpoints_in(output_dir)[: -limit if limit else 0], output_dir)
            logger.info(f"Saved {final}")
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            logger.error(f"{final} could not be written, the run goes on without it: {error}")


def flush_to_disk(path: Path):
    """Returns when a file's or folder's content would survive a power failure."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------- validation
def load_pipeline(args, prior, text_encoder, tokenizer, scheduler, dtype: torch.dtype):
    """The whole text-to-picture pipeline: these parts for the latents, the decoder of `args` in `dtype`."""
    source = args.pretrained_decoder_model_name_or_path
    decoder = wuerstchen.WuerstchenDecoderPipeline.from_pretrained(source, torch_dtype=dtype, cache_dir=args.cache_dir)
    return wuerstchen.WuerstchenCombinedPipeline(
        **decoder.components,
        prior_prior=prior,
        prior_text_encoder=text_encoder,
        prior_tokenizer=tokenizer,
        prior_scheduler=scheduler,
    )


def check_decoder(args: argparse.Namespace):
    """Reads the decoder's index, so that a wrong name does not come to light when the training is done."""
    source = args.pretrained_decoder_model_name_or_path
    with blaming("--pretrained_decoder_model_name_or_path", source):
        index = wuerstchen.WuerstchenDecoderPipeline.load_config(source, cache_dir=args.cache_dir)
        if not {"decoder", "vqgan"} <= index.keys():
            raise ValueError("its model_index.json is not that of a Würstchen decoder")


def picture_size(pipeline, resolution: int) -> int:
    """Pixels a side of the picture that latents trained at `resolution` stand for.

    An encoder input of 768 pixels gives 24 latents a side, which the pipeline draws as 1024 pixels. The decoder halves
    its own latents, `latent_dim_scale` times as many, level by level, so only some numbers can be drawn: the nearest.
    """
    trained = math.ceil(resolution / ENCODER_STRIDE)
    config = pipeline.decoder.config
    divisor = config.patch_size * 2 ** (len(config.c_hidden) - 1)
    scale = pipeline.decoder_pipe.config.latent_dim_scale
    sides = [side for side in range(1, trained + 2 * divisor) if int(side * scale) % divisor == 0]
    nearest = min(sides, key=lambda side: abs(side - trained))
    return int(nearest * pipeline.prior_pipe.config.resolution_multiple)


def log_validation(accelerator, args, parts: dict, seed: int, global_step: int) -> list:
    """Draws the validation prompts, the same noise every time, and hands the pictures to trackers and `samples/`.

    Sampling is done in float32 (under autocast): the pipeline takes its dtype from the text encoder, and in half
    precision the prior would see other timesteps than it was trained on. What fails here never ends a run: it
    returns the pictures in the order of the prompts, or none.
    """
    logger.info(f"Drawing {len(args.validation_prompts)} validation pictures")
    weight_dtype = parts["text_encoder"].dtype
    parts["prior"].eval()
    pipeline = None
    try:
        parts["text_encoder"].float()
        pipeline = load_pipeline(args, **parts, dtype=weight_dtype)
        pipeline.to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        size = picture_size(pipeline, args.resolution)
        pictures = []
        for prompt in tqdm(args.validation_prompts, desc="Validation", unit="picture", leave=False):
            with accelerator.autocast():
                pictures += pipeline(
                    prompt,
                    height=size,
                    width=size,
                    prior_timesteps=wuerstchen.DEFAULT_STAGE_C_TIMESTEPS,
                    generator=torch.Generator().manual_seed(seed),
                ).images
        log_pictures(accelerator, args.validation_prompts, pictures, global_step)
        samples = Path(args.output_dir, "samples")
        samples.mkdir(exist_ok=True)
        for index, picture in enumerate(pictures):
            picture.save(samples / f"update-{global_step:07d}-prompt-{index}.png")
        return pictures
    except Exception as error:
        logger.warning(f"No validation pictures at update {global_step}: {type(error).__name__}: {error}")
        return []
    finally:
        del pipeline
        parts["text_encoder"].to(weight_dtype)
        parts["prior"].train()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def log_pictures(accelerator: Accelerator, prompts: list[str], pictures: list[Image.Image], global_step: int):
    """Shows pictures and their prompts in each tracker; a tracker more is a branch more."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
                tracker.writer.add_image(f"validation/{index}", np.asarray(picture), global_step, dataformats="HWC")
                tracker.writer.add_text(f"validation/{index}", prompt, global_step)
        elif tracker.name == "wandb":
            import wandb

            named = [wandb.Image(picture, caption=prompt) for prompt, picture in zip(prompts, pictures, strict=True)]
            tracker.log({"validation": named}, step=global_step)
        else:
            logger.warning(f"{tracker.name} is not shown the validation pictures; they are in samples/")


# ----------------------------------------------------------------------------------------------- publishing
def save_part(part, folder: Path):
    """Saves a part of a pipeline; of a tokenizer also vocab.json and merges.txt, which transformers 4 reads."""
    part.save_pretrained(folder)
    if isinstance(part, CLIPTokenizerFast):
        part.backend_tokenizer.model.save(str(folder))


def save_prior_pipeline(args, prior, tokenizer, noise_scheduler, output_dir: Path):
    """Writes `prior_pipeline/`, the trained prior before anything that could fail is even loaded. All in float32."""
    folder = output_dir / "prior_pipeline"
    save_part(prior, folder / "prior")
    text_encoder = load_text_encoder(args, torch.float32)  # anew: the one in use was rounded to half precision
    pipeline = wuerstchen.WuerstchenPriorPipeline(
        prior=prior, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=noise_scheduler
    )
    for name in ("text_encoder", "tokenizer", "scheduler"):
        save_part(pipeline.components[name], folder / name)
    pipeline.save_config(folder)  # model_index.json
    return pipeline


def save_pipeline(args, prior_pipeline, output_dir: Path):
    """Writes the whole pipeline at the root of `output_dir`; `prior_pipeline/` is linked, not written again."""
    pipeline = load_pipeline(args, **prior_pipeline.components, dtype=torch.float32)
    for name, part in pipeline.components.items():
        shutil.rmtree(output_dir / name, ignore_errors=True)
        if name.startswith("prior_"):
            source = output_dir / "prior_pipeline" / name.removeprefix("prior_")
            shutil.copytree(source, output_dir / name, copy_function=link_or_copy)
        else:
            save_part(part, output_dir / name)
    pipeline.save_config(output_dir)


def link_or_copy(source: str, target: str):
    """A second name for a file, or a copy where the file system knows no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


MODEL_CARD = """---
{metadata}
---

# {repo_id}

The Würstchen prior **{base}**, fine-tuned on **{source}**.

{pictures}
## How to use it

```python
import torch
from diffusers import AutoPipelineForText2Image

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipeline = AutoPipelineForText2Image.from_pretrained("{repo_id}", torch_dtype=dtype).to(device)
image = pipeline({prompt}, width={size}, height={size}, prior_guidance_scale=4.0).images[0]
image.save("picture.png")
```

The weights are float32. The prior alone, with its text encoder, is the pipeline in `prior_pipeline/`.

## How it was trained

For {updates} updates, with `{settings}`.
"""


def save_model_card(args, repo_id: str, updates: int, pictures: list, output_dir: Path):
    """Writes README.md: what was trained on what, pictures, and code that draws with the model."""
    base, prompts = args.pretrained_prior_model_name_or_path, args.validation_prompts or ["a photo"]
    on_hub = args.dataset_name is not None and not Path(args.dataset_name).exists()
    tags = ["wuerstchen", "text-to-image", "diffusers", "diffusers-training"]
    metadata = ModelCardData(base_model=base, license="mit", library_name="diffusers", tags=tags)
    metadata["pipeline_tag"] = "text-to-image"
    if on_hub:
        metadata["datasets"] = [args.dataset_name]
    size, shown = 1024, ""
    if pictures:
        size, shown = pictures[0].width, "".join(f"* {prompt}\n" for prompt in prompts) + "\n![pictures](grid.png)\n"
        diffusers.utils.make_image_grid(pictures, rows=1, cols=len(pictures)).save(output_dir / "grid.png")
    told = ("learning_rate", "lr_scheduler", "train_batch_size", "gradient_accumulation_steps", "resolution")
    settings = " ".join(f"--{name}={getattr(args, name)}" for name in told)
    source, prompt = args.dataset_name if on_hub else "local pictures", json.dumps(prompts[0])
    names = {"metadata": metadata.to_yaml(), "repo_id": repo_id, "base": base, "source": source, "pictures": shown}
    card = MODEL_CARD.format(**names, prompt=prompt, size=size, updates=updates, settings=settings)
    ModelCard(card).save(output_dir / "README.md")


def push(args, repo_id: str, output_dir: Path):
    """Uploads what a user of the model needs, and nothing else."""
    wanted = ["README.md", "grid.png", "model_index.json", "prior_pipeline/*"]
    wanted += [f"{path.parent.name}/*" for path in output_dir.glob("*/*config.json")]
    what = {"repo_id": repo_id, "folder_path": output_dir, "allow_patterns": wanted}
    try:
        upload_folder(**what, commit_message="End of training", token=args.hub_token)
    except Exception as error:
        way = f"hf upload {repo_id} {output_dir} . --include " + " ".join(f"'{pattern}'" for pattern in wanted)
        raise SystemExit(f"--push_to_hub: {error}\nAll of it is in {output_dir}; to push it later: {way}") from None


# ----------------------------------------------------------------------------------------------------- main
def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Devices, precision and trackers, as `accelerate config`, the launcher and the flags say."""
    with blaming("--output_dir", args.output_dir):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=tracker_names(args.report_to) or None,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=VALIDATION_TIMEOUT)],
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    diffusers.utils.logging.set_verbosity_error()  # it would say of each pipeline that it is deprecated
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:
        logger.warning(f"{accelerator.device} cannot do {accelerator.mixed_precision}: everything is in float32")
    # An update that fp16's scaler skips counts as one, so that the rate stays a function of the update.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    return accelerator


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    if args.hub_token:  # wandb and comet record the command line
        sys.argv = [argument.replace(args.hub_token, "***") for argument in sys.argv]
    accelerator = make_accelerator(args)
    device, ranks, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    weight_dtype = torch.float32  # of the frozen models; the prior's own weights stay in float32
    if accelerator.native_amp:
        weight_dtype = torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16

    # Where the run starts: anew, or at a checkpoint, whose seed goes on.
    output_dir = Path(args.output_dir)
    checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
    state = json.loads((checkpoint / STATE_FILE).read_text()) if checkpoint else {"global_step": 0, "plan": {}}
    global_step = state["global_step"]
    seed = args.seed if args.seed is not None else state["plan"].get("seed", random.getrandbits(31))
    (seed,) = broadcast_object_list([seed])
    others = other_checkpoints(output_dir, checkpoint)
    if others and not args.overwrite_output_dir:
        ways = "--resume_from_checkpoint=latest goes on with it, --overwrite_output_dir deletes it"
        raise SystemExit(f"--output_dir={output_dir} holds {others[-1].name} of an earlier run: {ways}")

    # What the end of the run will need is tried now.
    repo_id = args.hub_model_id or output_dir.resolve().name
    if accelerator.is_main_process:
        check_decoder(args)
        if args.push_to_hub:
            with blaming("--hub_model_id", repo_id):
                repo_id = create_repo(repo_id, exist_ok=True, token=args.hub_token).repo_id

    # Data and models. The prior comes from the checkpoint if there is one.
    with accelerator.local_main_process_first():
        dataset = load_train_dataset(args, seed)
    tokenizer, text_encoder, image_encoder, prior = load_models(args, checkpoint, weight_dtype)
    text_encoder.to(device)
    image_encoder.to(device)
    noise_scheduler = DDPMWuerstchenScheduler()
    ema_prior = None
    if args.use_ema and accelerator.is_main_process:
        ema_prior = make_ema(args, prior, checkpoint)
        ema_prior.to(device)

    # The plan, in updates. Batches and accumulation run on over an epoch's edge: each is full, each row seen once.
    samples_per_update = args.train_batch_size * args.gradient_accumulation_steps * ranks
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(dataset) / samples_per_update)
    spread = range(0, len(dataset), math.ceil(len(dataset) / 1000))  # some captions tell one data set from another
    captions = draw_seed(dataset.select_columns([args.caption_column])[spread])
    plan = {"seed": seed, "rows": len(dataset), "captions": captions, "processes": ranks}
    plan |= {name: getattr(args, name) for name in ("train_batch_size", "gradient_accumulation_steps")}
    for name, value in state["plan"].items():
        if plan[name] != value:
            raise SystemExit(f"{checkpoint} cannot go on exactly: its run had {name}={value}, this one {plan[name]}")
    if accelerator.is_main_process:  # only now, when no flag can be wrong any more
        remove_checkpoints(others, output_dir)

    preprocess = functools.partial(preprocess_train, tokenizer=tokenizer, args=args)
    train_dataloader = torch.utils.data.DataLoader(
        TrainSamples(dataset, preprocess, seed, args.skip_bad_rows),
        batch_sampler=micro_batches(global_step, max_train_steps, plan, rank),
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
    )

    # The optimizer and the rate's schedule, which is a function of the update alone.
    optimizer = make_optimizer(prior, args, device)
    register_checkpoint_hooks(accelerator, ema_prior)
    prior, optimizer = accelerator.prepare(prior, optimizer)
    if checkpoint:
        with blaming("--resume_from_checkpoint", checkpoint):
            accelerator.load_state(str(checkpoint))
    for group in optimizer.param_groups:  # what the flags say now holds, not what the checkpoint remembers
        group.update(optimizer.optimizer.defaults, initial_lr=args.learning_rate)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer.optimizer,
        step_rules=args.lr_step_rules,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
        last_epoch=global_step - 1,
    )

    # Say what is about to happen.
    if accelerator.is_main_process:
        settings = {name: value for name, value in vars(args).items() if name not in SECRETS} | {"seed": seed}
        plain = {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in settings.items()}
        accelerator.init_trackers(args.tracker_project_name, plain)
    logger.info(f"{len(dataset)} rows, {max_train_steps} updates of {samples_per_update} samples: {plan}, on {device}")
    if checkpoint:
        left = "going on" if global_step < max_train_steps else "nothing is left to train, only to save"
        logger.info(f"{checkpoint} is at update {global_step}: {left}")
    whole_prior = accelerator.unwrap_model(prior)
    draw = None
    if args.validation_prompts:
        parts = {"prior": whole_prior, "text_encoder": text_encoder, "tokenizer": tokenizer}
        draw = functools.partial(log_validation, accelerator, args, parts | {"scheduler": noise_scheduler}, seed)
    batches, bad_rows = iter(train_dataloader), set()
    prior.train()
    progress = tqdm(total=max_train_steps, initial=global_step, desc="Steps", disable=not accelerator.is_main_process)
    with noted_signals() as signals, progress, logging_redirect_tqdm():  # the bar ends before a stop is told
        while global_step < max_train_steps:
            started = time.perf_counter()
            # All that an update draws follows from (seed, update, rank): resuming draws what not stopping would.
            torch.manual_seed(draw_seed(seed, "update", global_step, rank))
            train_loss, drawn = torch.zeros((), device=device), {"rows": [], "timesteps": []}
            for _ in range(args.gradient_accumulation_steps):
                batch = next_batch(batches, device, bad_rows)
                with accelerator.accumulate(prior):
                    with torch.no_grad():
                        text = text_encoder(batch["text_input_ids"], attention_mask=batch["text_mask"])
                        prompt_embeds = text.last_hidden_state
                        latents = image_encoder(batch["effnet_pixel_values"].to(weight_dtype))
                        image_embeds = (latents.float() + LATENT_STD) / LATENT_MEAN
                        noise = torch.randn_like(image_embeds)
                        timesteps = torch.rand(len(noise), device=device)
                        noisy_latents = noise_scheduler.add_noise(image_embeds, noise, timesteps)

                    pred_noise = prior(noisy_latents, timesteps, prompt_embeds)
                    loss = F.mse_loss(pred_noise.float(), noise, reduction="none").mean(dim=(1, 2, 3))
                    if args.loss_weighting == "p2":
                        loss = loss * p2_weight(noise_scheduler, timesteps)
                    loss = loss.mean()

                    accelerator.backward(loss)
                    train_loss += loss.detach() / args.gradient_accumulation_steps
                    drawn["rows"] += batch["rows"]
                    drawn["timesteps"].append(timesteps)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(prior.parameters(), args.max_grad_norm)
                        train_loss, grad_norm, stop = read_numbers(accelerator, train_loss, grad_norm, signals)
                        refuse_broken_numbers(accelerator, output_dir, global_step + 1, train_loss, grad_norm, drawn)
                    optimizer.step()
                    optimizer.zero_grad()
            lr_scheduler.step()
            global_step += 1
            if ema_prior is not None:
                ema_prior.step(prior.parameters())

            rate, speed = lr_scheduler.get_last_lr()[0], samples_per_update / (time.perf_counter() - started)
            log = {"train_loss": train_loss, "lr": rate, "grad_norm": grad_norm, "images_per_second": speed}
            accelerator.log(log, step=global_step)
            progress.set_postfix_str(f"loss {train_loss:.4f}, lr {rate:.2e}, {speed:.1f} images/s", refresh=False)
            progress.update()

            if global_step % args.checkpointing_steps == 0 or stop:
                state = {"global_step": global_step, "plan": plan}
                save_checkpoint(accelerator, output_dir, state, args.checkpoints_total_limit)
            if stop:
                logger.info("Stopped; the same command with --resume_from_checkpoint=latest goes on")
                accelerator.end_training()
                del batches  # and with it the reading processes
                sys.exit(128 + max(signals, default=signal.SIGTERM))
            seen, rows_in_all = global_step * samples_per_update, len(dataset)
            ended = range((seen - samples_per_update) // rows_in_all, seen // rows_in_all)  # the epochs, from 0
            if ended and bad_rows:
                logger.warning(f"{len(bad_rows)} rows left out so far, at the end of epoch {ended[-1] + 1}")
            if draw and global_step < max_train_steps and any(epoch % args.validation_epochs == 0 for epoch in ended):
                if accelerator.is_main_process:
                    with averaged_weights(whole_prior, ema_prior):
                        draw(global_step)
                accelerator.wait_for_everyone()

    # The result: the prior first, then all that could still fail.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with averaged_weights(whole_prior, ema_prior):
            with blaming("--output_dir", output_dir):
                prior_pipeline = save_prior_pipeline(args, whole_prior, tokenizer, noise_scheduler, output_dir)
            try:
                save_pipeline(args, prior_pipeline, output_dir)
            except Exception as error:
                logger.warning(f"{output_dir} will not load as a pipeline, only its prior_pipeline/: {error}")
            pictures = draw(global_step) if draw else []
        save_model_card(args, repo_id, global_step, pictures, output_dir)
        if args.push_to_hub:
            push(args, repo_id, output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
