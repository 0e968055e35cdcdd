# SPDX-License-Identifier: Apache-2.0
"""Fine-tune the Würstchen prior, the model that draws a picture's 42 times smaller latents from its caption.

    accelerate launch train_text_to_image_prior.py --train_data_dir=pictures --output_dir=run   # as configured
    torchrun --nproc_per_node=8 train_text_to_image_prior.py --train_data_dir=pictures --output_dir=run
    python train_text_to_image_prior.py --train_data_dir=pictures --output_dir=run              # one device

To resume, run the same command again with --resume_from_checkpoint=latest. The README explains every flag.

Where to edit: augmentation in `read_row`, captions in `tokenize_captions`, data in `load_train_dataset`, the
optimizer in `make_optimizer`, noise and loss in the loop of `main`. The file reads in the order in which it runs. The
image encoder, and the plumbing that is called `encoding.`, are in modeling_efficient_net_encoder.py: how pictures are
decoded, the order of samples, the loaders, what --cache_latents keeps, and --compile.
"""

import argparse
import functools
import importlib
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import accelerate
import datasets
import diffusers
import huggingface_hub as hub
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from diffusers import DDPMWuerstchenScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.utils.checkpoint import checkpoint as checkpoint_block
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import CLIPTextModel, CLIPTokenizerFast

import modeling_efficient_net_encoder as encoding

try:
    from diffusers.pipelines import wuerstchen
except ImportError:  # diffusers 0.38 moved the package, but what is saved and published names it by its old place
    from diffusers.pipelines.deprecated import wuerstchen

    diffusers.pipelines.wuerstchen = wuerstchen

logger = get_logger(__name__, log_level="INFO")

# The published prior pipeline undoes the scaling of its latents with these: latents * LATENT_MEAN - LATENT_STD.
LATENT_MEAN, LATENT_STD = 42.0, 1.0
STATE_FILE = "trainer_state.json"  # written last into a checkpoint, so that one without it is torn
CACHES = (datasets.config.HF_DATASETS_CACHE, hub.constants.HF_HUB_CACHE)  # may hold pictures of the Hub's data sets
SMALLEST_SCALE = 2.0**-20  # fp16's loss scale is halved at each overflow; below this the run has gone wrong
VALIDATION_TIMEOUT = timedelta(hours=3)  # of every collective: other ranks wait while the first saves or downloads
GUIDANCE_SCALE = 4.0  # of validation pictures: the guide's `prior_guidance_scale`
LOSS_BANDS = 4  # equal parts of [0, 1), the timesteps, that the held-out loss is told for
PUSH_WAITS = (10, 30, 60, 300, 900)  # seconds between tries to upload while the Hub is out of order


# ------------------------------------------------------------------------------------------------ arguments
def bounded(kind: type, low: float, below: float = math.inf):
    """An argparse type: an int or a float in [low, below)."""

    def convert(text: str):
        if low <= (value := kind(text)) < below:
            return value
        limit = "" if below == math.inf else f" and below {below}"
        raise argparse.ArgumentTypeError(f"must be at least {low}{limit}, not {text}")

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
    flag("--cache_dir", help="folder for downloaded models, prepared data sets and encoded pictures")

    flag = parser.add_argument_group("data, one of the first two; the data set's name wins").add_argument
    flag("--dataset_name", help="a data set on the Hub, or a local copy of one")
    flag("--train_data_dir", help="folder of pictures with a metadata.jsonl or .csv, or of Parquet or Arrow files")
    flag("--dataset_config_name", help="which configuration of the data set")
    flag("--image_column", default="image", help="the column of pictures")
    flag("--caption_column", default="text", help="the column of captions, each a string or a list of them")
    flag("--max_train_samples", type=count, help="take so many rows, drawn with the seed")
    flag("--validation_split", type=bounded(float, 1e-9), help="rows, or below 1 a share of them, held out")
    flag("--resolution", type=bounded(int, encoding.STRIDE), default=512, help="side of the square cropped, in pixels")
    flag("--random_crop", **on, help="crop anywhere, not at the centre")
    flag("--random_flip", **on, help="mirror half of the pictures, left to right")
    flag("--skip_bad_rows", **on, help="put other rows in place of those that cannot be read, instead of stopping")
    flag("--dataloader_num_workers", type=size, default=0, help="reading processes; 0: the main one reads")
    flag("--cache_latents", **on, help="encode all rows once, onto disk: about 215 KB a row of one caption at 768")

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
    flag("--timestep_sampling", choices=["uniform", "stretched"], default="uniform", help="stretched: the original's")
    flag("--caption_dropout", type=fraction, default=0.0, help="share of samples trained on the empty caption")
    flag("--compile", **on, help="compile the prior and replay it as CUDA graphs: a slower start, faster steps")

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
    flag("--validation_prompts", nargs="+", help="captions to draw before, while and after training")
    flag("--validation_epochs", type=count, default=5, help="epochs between validations")
    flag("--validation_steps", type=count, help="updates between validations, instead of epochs")
    flag("--logging_dir", default="logs", help="the trackers' folder under --output_dir")
    names = {"type": lambda text: text.replace(" ", "") or "none", "default": "tensorboard"}
    flag("--report_to", **names, help="trackers by comma: tensorboard, wandb, comet_ml, ..., all, none")
    flag("--tracker_project_name", default="text2image-fine-tune")
    flag("--push_to_hub", **on, help="upload the result at the end")
    flag("--hub_model_id", help="the repo to upload to; by default the name of --output_dir")
    flag("--hub_private_repo", **on, help="make the repo a private one, if there is none yet")
    flag("--hub_token", type=str.strip, help="goes to the Hub only; safer is `hf auth login`")
    flag("--local_rank", type=int, default=-1, help="unused: Accelerate reads the environment")

    args = parser.parse_args(argv)
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("give --dataset_name (a data set on the Hub) or --train_data_dir (a folder)")
    if (args.lr_scheduler == "piecewise_constant") != (args.lr_step_rules is not None):
        parser.error("--lr_scheduler=piecewise_constant and --lr_step_rules need each other")
    if args.cache_latents and (args.random_crop or args.random_flip):
        parser.error("--random_crop and --random_flip make other latents each time: leave out --cache_latents")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`")
    available = [*map(str, get_available_trackers()), "all", "none"]
    for name in set(args.report_to.split(",")) - set(available):
        parser.error(f"--report_to={name} is not installed; there is {', '.join(available)}")
    return args


def recipe_of(args: argparse.Namespace) -> str:
    """What was set, for all to see: without the token, and without what only means something on this machine."""
    hidden = ("hub_token", "resume_from_checkpoint", "overwrite_output_dir", "dataloader_num_workers", "local_rank")
    told = {name: v for name, v in vars(args).items() if name not in hidden and v is not None and v is not False}
    shown = {name: v for name, v in told.items() if not (isinstance(v, str) and os.path.exists(v))}
    return " ".join(f"--{name}" if value is True else f"--{name}={value}" for name, value in shown.items())


@contextmanager
def blaming(flag: str, value):
    """Turns whatever a library says of a user's setting into one line that names the flag."""
    try:
        yield
    except Exception as error:
        while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
            error = error.__cause__  # which hides, for instance, a full disk
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise SystemExit(f"{flag}={value}: {kind}{reason[:300]}") from None


# ----------------------------------------------------------------------------------------------------- data
def load_train_dataset(args: argparse.Namespace, seed: int) -> datasets.Dataset:
    """The rows to train on, their pictures still encoded: `read_row` decodes them."""
    name, folder = args.dataset_name, args.train_data_dir
    if name is not None and folder is not None:
        logger.warning(f"--train_data_dir={folder} is not used: --dataset_name is given too")
    with blaming("--train_data_dir" if name is None else "--dataset_name", folder if name is None else name):
        if name is None and not Path(folder).is_dir():
            raise ValueError("there is no such folder")
        dataset = encoding.load_split("train", name or folder, args.dataset_config_name, args.cache_dir, name is None)
    with blaming("--image_column", args.image_column):
        dataset = encoding.keep_encoded(dataset, args.image_column)
    with blaming("--caption_column", args.caption_column):
        dataset = dataset.select_columns([args.image_column, encoding.find_column(dataset, args.caption_column)])
    if args.max_train_samples is not None:
        if args.max_train_samples > len(dataset):
            logger.warning(f"--max_train_samples={args.max_train_samples}: all {len(dataset)} rows are used")
        count = min(args.max_train_samples, len(dataset))
        dataset = dataset.shuffle(seed=seed, keep_in_memory=True).select(range(count))
    return dataset


def tokenize_captions(captions: list[str], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP tokens and their mask, (B, 77) int64 and bool: padded, and cut to what the text encoder can take."""
    inputs = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return inputs.input_ids, inputs.attention_mask.bool()


def read_row(row: dict, args: argparse.Namespace, draw: random.Random | None = None) -> tuple[torch.Tensor, list[str]]:
    """A row's pixels, (3, resolution, resolution), normalised for the encoder, and its captions.

    Take whatever is random from `draw`, seeded for the sample, so that a resumed run draws the same; without `draw`
    nothing may be random. Raises ValueError if the row cannot be read."""
    captions = encoding.check_captions(row[args.caption_column], row[args.image_column])
    folders = [args.train_data_dir] if args.dataset_name is None else [args.dataset_name, args.cache_dir, *CACHES]
    image = encoding.decode_picture(row[args.image_column], [Path(folder) for folder in folders if folder])
    image = encoding.crop_square(image, args.resolution, draw if args.random_crop else None)
    if args.random_flip and draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return encoding.normalize_pixels(image), captions


def preprocess_train(row: dict, draw: random.Random, tokenizer, args: argparse.Namespace) -> dict:
    """A row of the data set as tensors: pixels as `read_row` gives them, tokens and mask (77,) of one caption."""
    pixels, captions = read_row(row, args, draw)
    caption = encoding.pick_caption(captions, draw, args.caption_dropout, empty="")
    (text_input_ids,), (text_mask,) = tokenize_captions([caption], tokenizer)
    return {"effnet_pixel_values": pixels, "text_input_ids": text_input_ids, "text_mask": text_mask}


def collate_fn(examples: list[dict]) -> dict:
    """Stacks samples to a batch; a problem in one of them is the batch's."""
    problems = [example["problem"] for example in examples if "problem" in example]
    if problems:
        return {"problem": problems[0]}
    batch = {name: torch.stack([e[name] for e in examples]) for name, v in examples[0].items() if torch.is_tensor(v)}
    batch["rows"] = [example["row"] for example in examples]
    batch["bad_rows"] = {row: text for example in examples for row, text in example["bad_rows"].items()}
    return batch


# --------------------------------------------------------------------------------------------------- models
def deepspeed_zero_init_disabled_context_manager():
    """Within it, DeepSpeed's ZeRO-3 does not partition the frozen models while they load."""
    plugin = AcceleratorState().deepspeed_plugin if is_initialized() else None
    return nullcontext() if plugin is None else plugin.zero3_init_context_manager(enable=False)


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen models: that of mixed precision, where the device can do it."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16} if accelerator.native_amp else {}
    return half.get(accelerator.mixed_precision, torch.float32)


def load_models(args: argparse.Namespace, checkpoint: Path | None, weight_dtype: torch.dtype) -> tuple:
    """The tokenizer, both frozen encoders in `weight_dtype`, and the prior, pretrained or the checkpoint's."""
    source, cache_dir = args.pretrained_prior_model_name_or_path, args.cache_dir
    with blaming("--pretrained_prior_model_name_or_path", source):
        with deepspeed_zero_init_disabled_context_manager():
            tokenizer = CLIPTokenizerFast.from_pretrained(source, subfolder="tokenizer", cache_dir=cache_dir)
            text_encoder = load_text_encoder(args, weight_dtype).requires_grad_(False).eval()
        settings = {"subfolder": "prior", "torch_dtype": torch.float32, "cache_dir": cache_dir}
        prior = wuerstchen.WuerstchenPrior.from_pretrained(checkpoint or source, **settings)
        given, taken = text_encoder.config.hidden_size, prior.config.c_cond
        if given != taken:
            raise ValueError(f"its text encoder gives {given} features, but its prior takes c_cond={taken}")
    source = args.pretrained_image_encoder_name_or_path
    with blaming("--pretrained_image_encoder_name_or_path", source), deepspeed_zero_init_disabled_context_manager():
        image_encoder = encoding.EfficientNetEncoder.load(source, cache_dir)
        image_encoder.requires_grad_(False).eval().to(weight_dtype)
        given, taken = image_encoder.config.c_latent, prior.config.c_in
        if given != taken:
            raise ValueError(f"it gives c_latent={given} channels, but the prior takes c_in={taken}")
    prior.set_attn_processor(AttnProcessor2_0())  # the same attention, by PyTorch's memory-efficient kernel
    if args.gradient_checkpointing:
        # diffusers' own choice, not reentrant, spends more time in Python than small batches take on a GPU.
        prior.enable_gradient_checkpointing(functools.partial(checkpoint_block, use_reentrant=True))
    return tokenizer, text_encoder, image_encoder, prior


def load_text_encoder(args: argparse.Namespace, dtype: torch.dtype) -> CLIPTextModel:
    """The prior's text encoder: CLIP ViT-bigG's text tower in the published model."""
    source = args.pretrained_prior_model_name_or_path
    return CLIPTextModel.from_pretrained(source, subfolder="text_encoder", dtype=dtype, cache_dir=args.cache_dir)


def embed_tokens(text_input_ids: torch.Tensor, text_mask: torch.Tensor, text_encoder: CLIPTextModel) -> torch.Tensor:
    """Embeddings of tokenized captions, (B, 77, width): the text encoder's last hidden state."""
    device = text_encoder.device
    return text_encoder(text_input_ids.to(device), attention_mask=text_mask.to(device)).last_hidden_state


def encode_batch(text_encoder, image_encoder, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions as embeddings, (B, 77, width), and pictures as the encoder's raw latents, (B, 16, side/32, side/32)."""
    pixels = batch["effnet_pixel_values"].to(image_encoder.device, image_encoder.dtype)
    return embed_tokens(batch["text_input_ids"], batch["text_mask"], text_encoder), image_encoder(pixels)


def cache_encodings(accelerator, dataset, tokenizer, text_encoder, image_encoder, args) -> datasets.Dataset:
    """The rows as what both encoders give for their pictures and for each of their captions, from disk, where it is
    found again by all that it follows from."""
    settings = (args.image_column, args.caption_column, args.resolution, text_encoder.dtype)
    code = (read_row, tokenize_captions, embed_tokens, encode_batch, *encoding.READING)
    parts = (settings, tokenizer.backend_tokenizer.to_str(), text_encoder, image_encoder, *code)
    key = encoding.fingerprint(dataset._fingerprint, *parts)
    read, tokenize = functools.partial(read_row, args=args), functools.partial(tokenize_captions, tokenizer=tokenizer)
    encode = functools.partial(encode_batch, text_encoder, image_encoder)
    with blaming("--cache_latents", f"True (--cache_dir={args.cache_dir or datasets.config.HF_DATASETS_CACHE})"):
        return encoding.encode_once(accelerator, dataset, key, read, tokenize, encode, args)


def make_optimizer(prior: torch.nn.Module, args: argparse.Namespace, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over all of the prior, fused where the device has it."""
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_cls
    else:
        optimizer_cls = functools.partial(torch.optim.AdamW, fused=device.type in ("cuda", "cpu", "mps", "xpu"))
    settings = {"betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.adam_weight_decay}
    return optimizer_cls(prior.parameters(), lr=args.learning_rate, eps=args.adam_epsilon, **settings)


def draw_timesteps(count: int, sampling: str, device: torch.device) -> torch.Tensor:
    """Timesteps for `count` samples, (count,) float32: uniform in [0, 1), or as train_stage_C.py of dome272/Wuerstchen
    drew them: (1 - u) * 1.08 + 0.001, clamped to [0.001, 1], so that 7.5 % are 1, where all sampling begins."""
    u = torch.rand(count, device=device)
    return u if sampling == "uniform" else ((1 - u) * 1.08 + 0.001).clamp(0.001, 1.0)


def loss_weights(weighting: str, noise_scheduler: DDPMWuerstchenScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """The weight of each sample's loss, (B,): 1, or P2 weighting (arXiv:2204.00227) with k = gamma = 1, Würstchen's,
    which is 1 / (1 + SNR) = 1 - alpha_bar(t)."""
    zeros, ones = torch.zeros_like(timesteps), torch.ones_like(timesteps)
    return ones if weighting == "none" else noise_scheduler.add_noise(zeros, ones, timesteps) ** 2


def make_ema(args, prior: torch.nn.Module, checkpoint: Path | None) -> EMAModel:
    """The average of the prior's weights (decay 0.9999, ramped up), new or the checkpoint's."""
    if checkpoint is None:
        return EMAModel(prior.parameters(), model_cls=type(prior), model_config=prior.config, foreach=True)
    if not (checkpoint / "prior_ema").is_dir():
        raise SystemExit(f"--use_ema: {checkpoint} has no prior_ema/ to go on with, since its run kept no average")
    return EMAModel.from_pretrained(checkpoint / "prior_ema", type(prior), foreach=True)


@contextmanager
def averaged_weights(accelerator: Accelerator, prior: torch.nn.Module, ema_prior: EMAModel | None, use_ema: bool):
    """Within it, the prior of every rank holds the average of its weights, which the first rank keeps, if any does."""
    kept = [parameter.detach().to("cpu", copy=True) for parameter in prior.parameters()] if use_ema else []
    if ema_prior is not None:
        ema_prior.copy_to(prior.parameters())
    pairs = list(zip(prior.parameters(), kept, strict=use_ema))
    for parameter, _ in pairs:
        accelerate.utils.broadcast(parameter.data)
    try:
        yield
    finally:
        for parameter, value in pairs:
            parameter.data.copy_(value)


def read_numbers(accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, signals: list) -> tuple[float, float, bool]:
    """The loss, averaged over the ranks, the gradient's norm, and whether a rank was told to stop: one transfer."""
    shared = accelerator.reduce(torch.stack([loss, torch.full_like(loss, len(signals))]), "mean")
    loss, told, grad_norm = torch.cat([shared, grad_norm.to(loss)[None]]).tolist()
    return loss, grad_norm, told > 0


def refuse_broken_numbers(accelerator, output_dir: Path, update: int, loss: float, grad_norm: float, drawn: dict):
    """Ends the run before a loss or gradient that is not finite reaches the weights, saying what was `drawn`. In fp16
    an overflow is normal: the scaler leaves the update out and halves its scale, until there is none left."""
    scaler = accelerator.scaler
    if scaler.get_scale() < SMALLEST_SCALE if scaler else not math.isfinite(loss + grad_norm):
        good = ", ".join(path.name for path in checkpoints_in(output_dir)[-1:]) or "there is none"
        facts = f"loss {loss}, gradient norm {grad_norm}, {drawn}; the last good checkpoint: {good}"
        raise SystemExit(f"stopped before update {update}: " + " ".join(facts.split()))


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


def find_start(args: argparse.Namespace, output_dir: Path) -> tuple[Path | None, list[Path], dict]:
    """The checkpoint to go on from, if any, those in its way, and the run's state: update, plan, seed, wandb's id."""
    checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
    state = json.loads((checkpoint / STATE_FILE).read_text()) if checkpoint else {"global_step": 0, "plan": {}}
    seed = args.seed if args.seed is not None else state["plan"].get("seed", random.getrandbits(31))
    seed, first_step = accelerate.utils.broadcast_object_list([seed, state["global_step"]])
    if first_step != state["global_step"]:
        problem = "not every node sees the same checkpoints there; share the folder"
        raise SystemExit(f"--output_dir={output_dir}: {problem}")
    others = other_checkpoints(output_dir, checkpoint)
    if others and not args.overwrite_output_dir:
        ways = "--resume_from_checkpoint=latest goes on with it, --overwrite_output_dir deletes it"
        raise SystemExit(f"--output_dir={output_dir} holds {others[-1].name} of an earlier run: {ways}")
    branched = others or (checkpoint and checkpoint.parent != output_dir.resolve())  # wandb drops steps it has had
    run_id = (None if branched else state.get("run_id")) or f"{random.getrandbits(40):010x}"
    return checkpoint, others, state | {"seed": seed, "run_id": run_id}


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
    """Writes checkpoint-N aside, flushes it, renames it in one step, and only then deletes what is over the limit. A
    full disk costs this checkpoint, not the run: the older ones stay, and the run goes on."""
    final, problem = output_dir / f"checkpoint-{state['global_step']}", ""
    aside = output_dir / f".{final.name}"
    try:
        accelerator.save_state(str(aside))  # every rank: each has a random state, and perhaps a shard, of its own
    except Exception as error:
        problem = str(error) or type(error).__name__
    problems = [text for text in accelerate.utils.gather_object([problem]) if text]
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
def load_decoder(args: argparse.Namespace, dtype: torch.dtype):
    """The pipeline that draws pictures from the prior's latents."""
    source = args.pretrained_decoder_model_name_or_path
    return wuerstchen.WuerstchenDecoderPipeline.from_pretrained(source, torch_dtype=dtype, cache_dir=args.cache_dir)


@torch.no_grad()
def draw_pictures(run: SimpleNamespace, global_step: int) -> list[Image.Image]:
    """The validation prompts as pictures, shared out among the ranks, the same noise every time; [] if one fails."""
    pictures, failures, device, main = [], [], run.accelerator.device, run.accelerator.is_main_process
    try:
        # It takes its dtype from the text encoder, for which the prior stands in: in half precision the prior would
        # see other timesteps than it was trained on. The text encoder is not needed, and may have left the device.
        pipeline = wuerstchen.WuerstchenPriorPipeline(None, run.prior, run.prior, run.noise_scheduler)
        run.decoder = (run.decoder or load_decoder(run.args, run.empty_embeds.dtype)).to(device)
        pipeline.set_progress_bar_config(disable=True)
        run.decoder.set_progress_bar_config(disable=True)
        size = encoding.picture_size(run.decoder, run.args.resolution)
        settings = {"height": size, "width": size, "timesteps": wuerstchen.DEFAULT_STAGE_C_TIMESTEPS}
        settings |= {"guidance_scale": GUIDANCE_SCALE, "negative_prompt_embeds": run.empty_embeds}
        prompts = list(zip(run.args.validation_prompts, run.prompt_embeds, strict=True))
        with run.accelerator.split_between_processes(prompts) as mine, run.accelerator.autocast():
            for prompt, embeds in tqdm(mine, "Drawing", leave=False, disable=not main):
                draw = torch.Generator().manual_seed(run.seed)
                latents = pipeline(prompt_embeds=embeds, generator=draw, **settings).image_embeddings
                pictures += run.decoder(latents, prompt, guidance_scale=0.0, generator=draw).images
    except Exception as error:  # it must not end a run, so nothing above may wait for other ranks
        advice = " (a smaller --train_batch_size leaves more memory)" if "out of memory" in str(error) else ""
        failures.append(f"{type(error).__name__}: {error}{advice}")
    if run.decoder is not None and device.type != "cpu":
        run.decoder.to("cpu")
        torch.cuda.empty_cache()
    pictures, failures = accelerate.utils.gather_object(pictures), accelerate.utils.gather_object(failures)
    if failures:
        logger.warning(f"No validation pictures at update {global_step}: {failures[0]}")
    return [] if failures else pictures[: len(run.prompt_embeds)]


@torch.no_grad()
def held_out_loss(run: SimpleNamespace) -> dict[str, float]:
    """The mean loss of the held-out rows, over all and for each band of timesteps. The draws are always the same: a
    row's noise follows from its number, and the rows' timesteps divide [0, 1) evenly."""
    device, rows = run.accelerator.device, len(run.held_out.dataset.rows)
    sums = torch.zeros(2, LOSS_BANDS, device=device)  # of losses and of samples
    batches = iter(tqdm(run.held_out, "Held-out loss", leave=False, disable=not run.accelerator.is_main_process))
    for _ in range(len(run.held_out)):
        batch = encoding.next_batch(batches, device, run.bad_rows)
        prompt_embeds, latents = run.encode(batch)
        image_embeds = (latents.float() + LATENT_STD) / LATENT_MEAN
        draws = [torch.Generator().manual_seed(encoding.draw_seed(run.seed, "held out", row)) for row in batch["rows"]]
        noise = torch.stack([torch.randn(image_embeds.shape[1:], generator=draw) for draw in draws]).to(device)
        timesteps = (torch.tensor(batch["rows"], device=device) + 0.5) / rows
        noisy_latents = run.noise_scheduler.add_noise(image_embeds, noise, timesteps)
        with run.accelerator.autocast():
            pred_noise = run.prior(noisy_latents, timesteps, prompt_embeds)
        losses = F.mse_loss(pred_noise.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        losses = losses * loss_weights(run.args.loss_weighting, run.noise_scheduler, timesteps)
        sums.index_add_(1, (timesteps * LOSS_BANDS).long(), torch.stack([losses, torch.ones_like(losses)]))
    losses, samples = run.accelerator.reduce(sums, "sum").tolist()
    bands = {f"val_loss_t{b / LOSS_BANDS}": losses[b] / samples[b] for b in range(LOSS_BANDS) if samples[b]}
    return {"val_loss": sum(losses) / sum(samples)} | bands


def log_validation(run: SimpleNamespace, global_step: int):
    """Draws the prompts and measures the held-out loss, unless a run that this one goes on with has: without dropout,
    with the averaged weights if there are any. It touches nothing that training draws from."""
    output_dir = Path(run.args.output_dir)
    picture = output_dir / "samples" / f"update-{global_step:07d}-prompt-{len(run.prompt_embeds) - 1}.png"
    losses = [row for row in encoding.read_losses(output_dir) if row["update"] == global_step and "val_loss" in row]
    done = bool(losses) if run.held_out else picture.exists()  # the loss is logged last
    (done,) = accelerate.utils.broadcast_object_list([done])
    if not done and (run.prompt_embeds or run.held_out):
        run.prior.eval()
        with averaged_weights(run.accelerator, run.prior, run.ema_prior, run.args.use_ema):
            pictures = draw_pictures(run, global_step) if run.prompt_embeds else []
            numbers = held_out_loss(run) if run.held_out else {}
        run.prior.train()
        if run.accelerator.is_main_process:
            with suppress(OSError):  # a full disk costs pictures, not the run
                log_pictures(run.accelerator, run.args, pictures, global_step)
        log_numbers(run.accelerator, numbers, global_step)
    if run.accelerator.is_main_process:
        with suppress(OSError):
            encoding.loss_curve(encoding.read_losses(output_dir)).save(output_dir / "loss.png")


def log_numbers(accelerator: Accelerator, numbers: dict[str, float], global_step: int):
    """Hands numbers to the trackers, and appends them to loss.jsonl, a line an update."""
    accelerator.log(numbers, step=global_step)
    if accelerator.is_main_process and numbers:
        with suppress(OSError), open(Path(accelerator.project_dir, "loss.jsonl"), "a") as file:
            file.write(json.dumps({"update": global_step} | numbers) + "\n")


def log_pictures(accelerator: Accelerator, args, pictures: list[Image.Image], global_step: int):
    """Shows pictures and their prompts in each tracker and in samples/. A tracker more is a branch more."""
    named, samples = list(zip(args.validation_prompts or [], pictures, strict=False)), Path(args.output_dir, "samples")
    for tracker in accelerator.trackers if named else []:
        if tracker.name == "tensorboard":
            for index, (prompt, picture) in enumerate(named):
                tracker.writer.add_image(f"validation/{index}", np.asarray(picture), global_step, dataformats="HWC")
                tracker.writer.add_text(f"validation/{index}", prompt, global_step)
        elif tracker.name in ("wandb", "trackio"):
            to_image = importlib.import_module(tracker.name).Image
            shown = [to_image(picture, caption=prompt) for prompt, picture in named]
            apart = {f"validation/{index}": image for index, image in enumerate(shown)}  # trackio drops lists
            tracker.log({"validation": shown} if tracker.name == "wandb" else apart, step=global_step)
        elif tracker.name == "comet_ml":
            for prompt, picture in named:
                tracker.tracker.log_image(picture, name=prompt, step=global_step)
        else:
            logger.warning(f"{tracker.name} is not shown the validation pictures; they are in samples/")
    for index, (prompt, picture) in enumerate(named):
        samples.mkdir(exist_ok=True)
        text = PngInfo()
        text.add_itxt("prompt", prompt)
        text.add_itxt("settings", f"{recipe_of(args)}, prior_guidance_scale={GUIDANCE_SCALE}")
        picture.save(samples / "part.png", pnginfo=text)  # and then renamed, so that a kill leaves no half of one
        (samples / "part.png").rename(samples / f"update-{global_step:07d}-prompt-{index}.png")
    if named:
        encoding.contact_sheet(samples, args.validation_prompts).save(samples / "contact-sheet.png")


# ----------------------------------------------------------------------------------------------- publishing
def save_parts(parts: dict, folder: Path):
    """Saves parts of a pipeline under their names; of a tokenizer also the files that transformers 4 reads."""
    for name, part in parts.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        if isinstance(part, diffusers.ModelMixin):
            part.register_to_config(_name_or_path="")  # it would tell where it lay on this machine
        part.save_pretrained(folder / name)
        if isinstance(part, CLIPTokenizerFast):
            part.backend_tokenizer.model.save(str(folder / name))  # vocab.json and merges.txt


def save_result(args, prior, tokenizer, noise_scheduler, output_dir: Path) -> int | None:
    """Writes `prior_pipeline/`, the trained prior before anything that could fail is even loaded, and then the whole
    pipeline at the root, all in float32. Gives the side in pixels of what it draws; None if the decoder is missing."""
    folder = output_dir / "prior_pipeline"
    with blaming("--output_dir", output_dir):
        save_parts({"prior": prior}, folder)
        text_encoder = load_text_encoder(args, torch.float32)  # anew: the one in use was rounded to half precision
        parts = {"text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": noise_scheduler}
        save_parts(parts, folder)
        wuerstchen.WuerstchenPriorPipeline(prior=prior, **parts).save_config(folder)  # model_index.json
    try:
        decoder = load_decoder(args, torch.float32)
        save_parts(decoder.components, output_dir)
        for name in ("prior", *parts):
            target = output_dir / f"prior_{name}"
            shutil.rmtree(target, ignore_errors=True)
            try:  # a second name for the same files
                shutil.copytree(folder / name, target, copy_function=os.link)
            except OSError:  # the file system knows no hard links
                shutil.copytree(folder / name, target, dirs_exist_ok=True)
        named = {f"prior_{name}": part for name, part in parts.items()} | {"prior_prior": prior}
        wuerstchen.WuerstchenCombinedPipeline(**decoder.components, **named).save_config(output_dir)
        return encoding.picture_size(decoder, args.resolution)
    except Exception as error:
        logger.warning(f"{output_dir} will not load as a pipeline, only its prior_pipeline/: {error}")


MODEL_CARD = """
# {repo_id}

The Würstchen prior **{base}**, fine-tuned on **{source}**.

{pictures}## How to use it

```python
import diffusers
import torch

if not hasattr(diffusers.pipelines, "wuerstchen"):  # from 0.38 on
    from diffusers.pipelines.deprecated import wuerstchen
    diffusers.pipelines.wuerstchen = wuerstchen

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipeline = diffusers.AutoPipelineForText2Image.from_pretrained("{repo_id}", torch_dtype=dtype).to(device)
image = pipeline({prompt}, width={size}, height={size}, prior_guidance_scale={guidance}).images[0]
image.save("picture.png")
```

The weights are float32. The prior alone, with its text encoder, is the pipeline in `prior_pipeline/`.

## How it was trained

For {updates} updates of {samples} samples, {epochs:.1f} epochs of {rows} rows, in {hours:.1f} hours on {processes} x
{device}, with seed {seed} and `{settings}`.

![training loss](loss.png)
"""


def save_model_card(args, repo_id: str, size: int | None, global_step: int, plan: dict, device: torch.device):
    """Writes README.md: what was trained on what, for how long and how, pictures, and code that draws with it."""
    output_dir, prompts = Path(args.output_dir), args.validation_prompts or []
    base, data = args.pretrained_prior_model_name_or_path, args.dataset_name
    on_hub = {name: name is not None and not Path(name).exists() for name in (base, data)}
    licence = None
    with suppress(Exception):  # there may be no card, or no Hub
        licence = hub.ModelCard.load(base if on_hub[base] else Path(base, "README.md")).data.license
    files, pictures = sorted((output_dir / "samples").glob(f"update-{global_step:07d}-*.png")), ""
    if files:
        grid = diffusers.utils.make_image_grid([Image.open(file) for file in files], rows=1, cols=len(files))
        grid.save(output_dir / "grid.png")
        pictures = "".join(f"* {prompt}\n" for prompt in prompts) + "\n![pictures](grid.png)\n\n"
    tags = ["wuerstchen", "text-to-image", "diffusers", "diffusers-training"]
    fields = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags, "license": licence}
    fields |= {"base_model": base if on_hub[base] else None, "datasets": [data] if on_hub[data] else None}
    shown = zip(prompts, files, strict=False)
    widget = [{"text": text, "output": {"url": f"samples/{file.name}"}} for text, file in shown]
    metadata = hub.ModelCardData(**fields, widget=widget or None)
    samples = encoding.samples_per_update(plan)
    rates = [row["images_per_second"] for row in encoding.read_losses(output_dir) if "images_per_second" in row]
    facts = {"samples": samples, "epochs": global_step * samples / plan["rows"], "updates": global_step, "size": size}
    facts["hours"] = sum(samples / rate for rate in rates) / 3600
    facts["device"] = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    facts |= {"settings": recipe_of(args), "repo_id": repo_id, "guidance": GUIDANCE_SCALE}
    facts["prompt"] = json.dumps((prompts or ["a photo"])[0], ensure_ascii=False)
    facts |= {"base": base if on_hub[base] else Path(base).name, "source": data if on_hub[data] else "local pictures"}
    card = MODEL_CARD.format(**plan | facts, pictures=pictures)
    hub.ModelCard(f"---\n{metadata}\n---\n{card}").save(output_dir / "README.md")


def push(repo_id: str, output_dir: Path, global_step: int, token: str | None):
    """Uploads what a user of the model needs, and nothing else; while the Hub is out of order, it tries again."""
    wanted = ["README.md", "model_index.json", "grid.png", "loss.png", f"samples/update-{global_step:07d}-*"]
    parts = wuerstchen.WuerstchenCombinedPipeline.__init__.__annotations__
    wanted += [f"{name}/*" for name in ("prior_pipeline", *parts)]
    what = {"repo_id": repo_id, "folder_path": output_dir, "allow_patterns": wanted, "token": token}
    for wait in (*PUSH_WAITS, None):
        try:  # the prior's weights first, so that their second copy is found to be there already
            weights = [hub.CommitOperationAdd(file.name, file) for file in output_dir.glob("prior_*/*/*.safetensors")]
            hub.preupload_lfs_files(repo_id, weights, token=token)
            return hub.upload_folder(**what, commit_message="End of training")
        except Exception as error:
            problem, status = error, getattr(getattr(error, "response", None), "status_code", 500)
        if wait is None or (400 <= status < 500 and status not in (408, 429)):
            include = [f"--include={path}" for path in wanted]
            if hub.__version__ < "1":  # where the command takes all patterns after one flag
                include = ["--include", *wanted]
            way = shlex.join(["hf", "upload", repo_id, str(output_dir), ".", *include])
            raise SystemExit(f"--push_to_hub: {problem}\nAll of it is in {output_dir}; to push it later: {way}")
        logger.warning(f"The upload failed ({type(problem).__name__}); it is tried again in {wait} seconds")
        time.sleep(wait)


# ----------------------------------------------------------------------------------------------------- main
def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Devices, precision and trackers, as `accelerate config`, the launcher and the flags say."""
    with blaming("--output_dir", args.output_dir):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    folders = accelerate.utils.ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir))
    # Each weight is used once a pass: autocast's cache would only hold on to 2 GB of half-precision copies.
    handlers = [accelerate.utils.AutocastKwargs(cache_enabled=False)]
    handlers += [accelerate.utils.InitProcessGroupKwargs(timeout=VALIDATION_TIMEOUT)]
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=[name for name in args.report_to.split(",") if name != "none"] or None,
        project_config=folders,
        kwargs_handlers=handlers,
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for library in ("accelerate", "httpx"):  # the latter would tell of each request
        logging.getLogger(library).setLevel(logging.WARNING)
    diffusers.utils.logging.set_verbosity_error()  # it would say of each pipeline that it is deprecated
    diffusers.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:
        logger.warning(f"{accelerator.device} cannot do {accelerator.mixed_precision}: everything is in float32")
    # An update that fp16's scaler skips counts as one, so that the rate stays a function of the update.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    return accelerator


def check_destinations(args: argparse.Namespace, repo_id: str) -> str:
    """Tries what the end will need: the decoder's name, and leave to write to the repo, of which it gives the id."""
    source = args.pretrained_decoder_model_name_or_path
    with blaming("--pretrained_decoder_model_name_or_path", source):
        index = wuerstchen.WuerstchenDecoderPipeline.load_config(source, cache_dir=args.cache_dir)
        if not {"decoder", "vqgan"} <= index.keys():
            raise ValueError("its model_index.json is not that of a Würstchen decoder")
    if args.push_to_hub:
        with blaming("--push_to_hub: --hub_model_id", repo_id):
            repo = hub.create_repo(repo_id, private=args.hub_private_repo or None, exist_ok=True, token=args.hub_token)
            repo_id = repo.repo_id
            # Asks how a file would be sent, which a token that may only read must not. Nothing is sent.
            hub.preupload_lfs_files(repo_id, [hub.CommitOperationAdd("README.md", b"-")], token=args.hub_token)
    return repo_id


def plan_run(args, rows, captions: int, seed: int, ranks: int, checkpoint: Path | None, resumed: dict) -> dict:
    """What decides which samples come when. Refuses to go on with a run that had another plan."""
    plan = {"seed": seed, "rows": len(rows), "captions": captions, "processes": ranks}
    plan |= {name: getattr(args, name) for name in ("train_batch_size", "gradient_accumulation_steps")}
    for name, value in resumed.items():
        if plan[name] != value:
            raise SystemExit(f"{checkpoint} cannot go on exactly: its run had {name}={value}, this one {plan[name]}")
    return plan


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    if args.hub_token:  # wandb and comet record the command line
        sys.argv = [argument.replace(args.hub_token, "***") for argument in sys.argv]
    accelerator = make_accelerator(args)
    device, ranks, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    weight_dtype = frozen_dtype(accelerator)  # the prior's is float32

    # Where the run starts: anew, or at a checkpoint, whose seed goes on.
    output_dir = Path(args.output_dir)
    checkpoint, others, state = find_start(args, output_dir)
    global_step, seed, run_id = state["global_step"], state["seed"], state["run_id"]
    repo_id = args.hub_model_id or output_dir.resolve().name
    if accelerator.is_main_process:
        repo_id = check_destinations(args, repo_id)

    # Data and models. The prior comes from the checkpoint if there is one.
    with accelerator.local_main_process_first():
        dataset = load_train_dataset(args, seed)
    spread = range(0, len(dataset), math.ceil(len(dataset) / 1000))  # some captions tell one data set from another
    captions = encoding.draw_seed(dataset.select_columns([args.caption_column])[spread])
    tokenizer, text_encoder, image_encoder, prior = load_models(args, checkpoint, weight_dtype)
    encode = functools.partial(encode_batch, text_encoder.to(device), image_encoder.to(device))
    preprocess = functools.partial(preprocess_train, tokenizer=tokenizer, args=args)
    texts = ["", *(args.validation_prompts or [])]
    embeds = [embed_tokens(*tokenize_captions([text], tokenizer), text_encoder) for text in texts]
    if args.cache_latents:
        dataset = cache_encodings(accelerator, dataset, tokenizer, text_encoder, image_encoder, args)
        preprocess = functools.partial(encoding.read_cached, empty=embeds[0][0].cpu(), args=args)
        encode = lambda batch: (batch["prompt_embeds"], batch["latents"])  # noqa: E731
        text_encoder = image_encoder = None  # and so out of memory
    held_out = None
    if args.validation_split:
        with blaming("--validation_split", args.validation_split):
            dataset, held_out = encoding.split_rows(dataset, args.validation_split, seed)
    noise_scheduler = DDPMWuerstchenScheduler()
    for name in ("s", "_init_alpha_cumprod"):  # it would copy them to the device, and wait, at each use
        setattr(noise_scheduler, name, getattr(noise_scheduler, name).to(device))
    ema_prior = None
    if args.use_ema and accelerator.is_main_process:
        ema_prior = make_ema(args, prior, checkpoint)
        ema_prior.to(device)

    # The plan, in updates. Batches and accumulation run on over an epoch's edge: each is full, each row seen once.
    plan = plan_run(args, dataset, captions, seed, ranks, checkpoint, state["plan"])
    samples_per_update = encoding.samples_per_update(plan)
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(dataset) / samples_per_update)
    if accelerator.is_main_process:  # only now, when no flag can be wrong any more
        remove_checkpoints(others, output_dir)
        encoding.forget_what_follows(output_dir, global_step if checkpoint else -1)
    loading = {"collate_fn": collate_fn, "num_workers": args.dataloader_num_workers}
    loading |= {"worker_init_fn": encoding.ignore_signals, "pin_memory": device.type == "cuda"}
    samples = encoding.TrainSamples(dataset, preprocess, seed, args.skip_bad_rows)
    batches = encoding.micro_batches(global_step, max_train_steps, plan, rank)
    train_dataloader = torch.utils.data.DataLoader(samples, batch_sampler=batches, **loading)

    # The prior's fast path, the optimizer, and the rate's schedule, which is a function of the update alone.
    if args.compile:
        encoding.compile_prior(prior.to(device), accelerator, args, embeds[0])
    optimizer = make_optimizer(prior, args, device)
    register_checkpoint_hooks(accelerator, ema_prior)
    prior, optimizer = accelerator.prepare(prior, optimizer)
    if checkpoint:
        with blaming("--resume_from_checkpoint", checkpoint):
            accelerator.load_state(str(checkpoint))
    for group in optimizer.param_groups:  # what the flags say now holds, not what the checkpoint remembers
        group.update(optimizer.optimizer.defaults, initial_lr=args.learning_rate)
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": max_train_steps}
    steps |= {"step_rules": args.lr_step_rules, "last_epoch": global_step - 1}
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer.optimizer, **steps)

    # Say what is about to happen. Trackers go on where the checkpoint is.
    if accelerator.is_main_process:
        goes_on = {"tensorboard": {"purge_step": global_step + 1 if checkpoint else 0}}
        goes_on |= {"wandb": {"id": run_id, "resume": "allow"}}
        told = {name: value for name, value in vars(args).items() if name != "hub_token"} | {"seed": seed}
        plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in told.items()}
        accelerator.init_trackers(args.tracker_project_name, plain, goes_on)
    logger.info(f"{len(dataset)} rows, {max_train_steps} updates of {samples_per_update} samples: {plan}, on {device}")
    if checkpoint:
        left = "going on" if global_step < max_train_steps else "nothing is left to train, only to save"
        logger.info(f"{checkpoint} is at update {global_step}: {left}")

    # What validation needs; what is not asked for is None or empty.
    whole_prior = accelerator.unwrap_model(prior)
    run = SimpleNamespace(accelerator=accelerator, args=args, seed=seed, prior=whole_prior, ema_prior=ema_prior)
    run.noise_scheduler, run.encode, run.decoder, run.bad_rows = noise_scheduler, encode, None, set()
    run.held_out = None
    if held_out:
        run.held_out = encoding.held_out_loader(held_out, preprocess, args, seed, rank, ranks, loading)
    run.empty_embeds, *run.prompt_embeds = embeds
    if not checkpoint or state.get("due"):  # a run that was ended right after its checkpoint has not done it
        log_validation(run, global_step)

    batches, bad_rows = iter(train_dataloader), set()
    prior.train()
    progress = tqdm(total=max_train_steps, initial=global_step, desc="Steps", disable=not accelerator.is_main_process)
    with encoding.noted_signals() as signals, progress, logging_redirect_tqdm():  # the bar ends before a stop is told
        while global_step < max_train_steps:
            started = time.perf_counter()
            # All that an update draws follows from (seed, update, rank): resuming draws what not stopping would.
            torch.manual_seed(encoding.draw_seed(seed, "update", global_step, rank))
            train_loss, drawn = torch.zeros((), device=device), {"rows": [], "timesteps": []}
            for _ in range(args.gradient_accumulation_steps):
                batch = encoding.next_batch(batches, device, bad_rows)
                with accelerator.accumulate(prior):
                    with torch.no_grad():
                        prompt_embeds, latents = encode(batch)
                        image_embeds = (latents.float() + LATENT_STD) / LATENT_MEAN
                        noise = torch.randn_like(image_embeds)
                        timesteps = draw_timesteps(len(noise), args.timestep_sampling, device)
                        noisy_latents = noise_scheduler.add_noise(image_embeds, noise, timesteps)

                    pred_noise = prior(noisy_latents, timesteps, prompt_embeds)
                    losses = F.mse_loss(pred_noise.float(), noise, reduction="none").mean(dim=(1, 2, 3))
                    loss = (losses * loss_weights(args.loss_weighting, noise_scheduler, timesteps)).mean()

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

            seen, rate = global_step * samples_per_update, lr_scheduler.get_last_lr()[0]
            speed = samples_per_update / (time.perf_counter() - started)
            log = {"train_loss": train_loss, "lr": rate, "grad_norm": grad_norm, "images_per_second": speed}
            log["epoch"] = seen / len(dataset)
            if device.type == "cuda":
                log["memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
            log_numbers(accelerator, log, global_step)
            progress.set_postfix_str(f"loss {train_loss:.4f}, lr {rate:.2e}, {speed:.1f} images/s", refresh=False)
            progress.update()

            ended = range((seen - samples_per_update) // len(dataset), seen // len(dataset))  # the epochs, from 0
            due = any(epoch % args.validation_epochs == 0 for epoch in ended)
            if args.validation_steps:
                due = global_step % args.validation_steps == 0
            if global_step % args.checkpointing_steps == 0 or stop:
                state = {"global_step": global_step, "plan": plan, "run_id": run_id, "due": due}
                save_checkpoint(accelerator, output_dir, state, args.checkpoints_total_limit)
            if stop:
                logger.info("Stopped; the same command with --resume_from_checkpoint=latest goes on")
                accelerator.end_training()
                del batches  # and with it the reading processes
                sys.exit(128 + max(signals, default=signal.SIGTERM))
            if ended and bad_rows:
                logger.warning(f"{len(bad_rows)} rows left out so far, at the end of epoch {ended[-1] + 1}")
            if due and global_step < max_train_steps:
                log_validation(run, global_step)

    # The result, on disk before anything is uploaded.
    with averaged_weights(accelerator, whole_prior, ema_prior, args.use_ema):
        if accelerator.is_main_process:
            size = save_result(args, whole_prior, tokenizer, noise_scheduler, output_dir)
    log_validation(run, global_step)
    if accelerator.is_main_process:
        save_model_card(args, repo_id, size, global_step, plan, device)
        if args.push_to_hub:
            push(repo_id, output_dir, global_step, args.hub_token)
    accelerator.end_training()


if __name__ == "__main__":
    main()
