# SPDX-License-Identifier: Apache-2.0
"""Fine-tune the Würstchen prior, the model that generates an image's latents, 42 times smaller, from its
caption.

    accelerate launch train_text_to_image_prior.py --train_data_dir=images --output_dir=run   # as configured
    torchrun --nproc_per_node=8 train_text_to_image_prior.py --train_data_dir=images --output_dir=run
    python train_text_to_image_prior.py --train_data_dir=images --output_dir=run              # one device

To resume, run the same command again with --resume_from_checkpoint=latest. The README explains every flag.

The file reads in the order in which it runs, and `main`, at its end, is the summary:

    arguments      parse_args, public_args, explain_errors
    setup          setup_accelerator, lock_output_dir, check_destinations, init_trackers, deferred_signals
    ranks          wait_for_slow_ranks, explain_lost_ranks, end_training, count_separate_ranks
    data           load_train_dataset, load_splits, read_captioned_images, check_rows
    samples        load_image, choose_sizes, make_augmentations, choose_caption, SamplePlan, SampleOrder
    models         load_encoders, load_prior, load_ema, update_ema, make_optimizer, make_lr_scheduler
    diffusion      encode_batch, sample_noise, sample_timesteps, diffusion_loss
    validation     is_validation_due, Validator
    checkpoints    TrainState, find_checkpoint, load_train_state, save_checkpoint
    logging        log_metrics, log_images, save_contact_sheet, save_loss_curve
    publishing     save_pipeline, save_model_card, log_summary, push_to_hub
    cache latents  cache_latents, preprocess_cached (need not be read)
    compile        compile_prior (need not be read)
    main           main

Where to edit: the loss in `diffusion_loss`, augmentation in `make_augmentations`, captions in
`choose_caption`, data layouts in `load_splits`, the optimizer in `make_optimizer`, trackers in
`log_images_to_tracker`.

Sizes: an image of --resolution=768 pixels becomes 24 x 24 latents, since the image encoder's stride is 32.
The decoder turns 24 x 24 latents into 1024 pixels, 42.67 times as many: it was trained on latents of
downscaled images. "42 times smaller" is that ratio, rounded. The 42.0 in LATENT_MEAN is unrelated: it scales
the values of the latents.
"""

import argparse
import atexit
import contextlib
import csv
import difflib
import functools
import glob
import hashlib
import importlib
import inspect
import io
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import accelerate
import datasets
import diffusers
import filelock
import huggingface_hub as hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, send_to_device
from datasets.fingerprint import Hasher
from diffusers import DDPMWuerstchenScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from PIL.PngImagePlugin import PngInfo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from tqdm.auto import tqdm
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
# Those of torchvision's EfficientNet weights.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GUIDANCE_SCALE = 4.0  # of validation images: the guide's `prior_guidance_scale`
NUM_LOSS_BANDS = 4  # equal parts of [0, 1), the timesteps, for which the held-out loss is reported
# Those of some formats that are not opened, too: an image with a caption is read or is an error.
IMAGE_SUFFIXES = frozenset(Image.registered_extensions()) | {".avif", ".heic", ".heif", ".jxl"}
# Formats that are opened, whatever a file's name says. (Others run programs: EPS starts Ghostscript.)
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000"]
IMAGE_FORMATS = [name for name in IMAGE_FORMATS if name in Image.OPEN]  # AVIF needs Pillow 11.3
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # an editor's history can be longer than 1 MB
MAX_IMAGE_PIXELS = 10**8  # a small file can hold an image that fills the memory
# Of --aspect_ratio_buckets, long to short side: those of common cameras and screens.
ASPECT_RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)
# Longer images are cropped to it: resizing 60000 x 1 pixels to height 512 would fill the memory.
MAX_ASPECT_RATIO = 8
MIN_LOSS_SCALE = 2.0**-20  # fp16's loss scale is halved at each overflow; below this the run has diverged
MAX_CURVE_POINTS = 20_000  # of the training loss: to read a million lines would take seconds each time
MAX_BAD_ROWS = 12  # unreadable rows drawn in succession, after which the data set is considered broken
# A rank that does not answer for so long is lost. Accelerate would not pass on 10 minutes, its default for
# NCCL, to gloo, whose own default is 30.
COLLECTIVE_TIMEOUT = timedelta(minutes=9)
SLOW_TIMEOUT = timedelta(hours=3)  # the same where ranks wait for one that downloads, encodes or saves
BATCH_TIMEOUT = 10  # seconds without a batch after which a requested stop no longer waits for it
DUPLICATE_SIGTERM = 2.0  # seconds within which two are one: a scheduler and torchrun may both send it
PUSH_RETRY_DELAYS = (10, 30, 60, 300, 900)  # seconds between attempts to upload during a Hub outage


# -------------------------------------------------------------------------------------------------- arguments
def bounded(number_type: type, minimum: float, below: float = math.inf) -> Callable[[str], float]:
    """Returns an argparse type: an int or a float in [minimum, below)."""

    def convert(text: str) -> float:
        value = number_type(text)
        if not minimum <= value < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"must be at least {minimum}{limit}, not {text}")
        return value

    convert.__name__ = number_type.__name__  # for argparse's message "invalid int value"
    return convert


class HelpFormatter(argparse.HelpFormatter):
    """Shows each flag on one line, with its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=44, width=110)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "__name__", "str").upper()  # not the flag's name again

    def _get_help_string(self, action: argparse.Action) -> str:
        without = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return action.help if without else f"{action.help} (default: %(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """Suggests a flag in place of one that does not exist."""

    def error(self, message: str):
        match = re.match(r"(?:unrecognized arguments|ambiguous option): (--[\w-]+)", message)
        if match:
            flags = [flag for action in self._actions for flag in action.option_strings]
            similar = difflib.get_close_matches(match[1], flags, n=1)
            similar = ["--learning_rate"] if match[1] == "--lr" else similar
            message += f"; did you mean {similar[0]}?" if similar else ""
        super().error(message)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line and rejects contradictory flags before anything is loaded."""
    parser = ArgumentParser(
        usage="accelerate launch %(prog)s (--dataset_name=NAME | --train_data_dir=FOLDER) [flags]",
        description="Fine-tune the Würstchen prior on captioned images. The README explains every flag.",
        formatter_class=HelpFormatter,
    )
    positive_int, natural = bounded(int, 1), bounded(int, 0)
    fraction, non_negative = bounded(float, 0, 1), bounded(float, 0)

    add = parser.add_argument_group("models, each a Hub repo or a local folder").add_argument
    add("--pretrained_prior_model_name_or_path", default="warp-ai/wuerstchen-prior", help="to fine-tune")
    add("--pretrained_decoder_model_name_or_path", default="warp-ai/wuerstchen", help="latents to images")
    add("--pretrained_image_encoder_name_or_path", default="dome272/wuerstchen", help="images to latents")
    add("--cache_dir", help="folder for downloaded models, prepared data sets and encoded images")

    add = parser.add_argument_group("data: one of the first two; --dataset_name has precedence").add_argument
    add("--dataset_name", help="a data set on the Hub, or a local copy of one")
    add("--train_data_dir", help="folder of images with metadata.jsonl or .csv, or of Parquet or Arrow files")
    add("--dataset_config_name", help="configuration of the data set")
    add("--image_column", default="image", help="column of the images")
    add("--caption_column", default="text", help="column of the captions, each a string or a list of strings")
    add("--max_train_samples", type=positive_int, help="number of rows to use, selected with the seed")
    add("--validation_split", type=bounded(float, 1e-9), help="rows, or below 1 a fraction, to hold out")
    add("--resolution", type=bounded(int, STRIDE), default=512, help="side of the square crop, in pixels")
    add("--aspect_ratio_buckets", action="store_true", help="train on sizes near the images' own shapes")
    add("--random_crop", action="store_true", help="crop at a random position instead of the center")
    add("--random_flip", action="store_true", help="mirror half of the images, left to right")
    add("--skip_bad_rows", action="store_true", help="replace unreadable rows by others instead of stopping")
    add("--dataloader_num_workers", type=natural, default=0, help="processes that read images; 0: none")
    add("--cache_latents", action="store_true", help="encode all rows once, to disk: 215 KB a row at 768")

    add = parser.add_argument_group("training; a step is one update of the weights").add_argument
    add("--seed", type=natural, help="of all random numbers; by default one is chosen, logged and saved")
    add("--train_batch_size", type=positive_int, default=1, help="images per device and micro-step")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="micro-steps per step")
    add("--num_train_epochs", type=positive_int, default=100, help="passes over the data")
    add("--max_train_steps", type=positive_int, help="total number of steps; overrides --num_train_epochs")
    add("--gradient_checkpointing", action="store_true", help="use less memory, with a slower backward pass")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="by default Accelerate's configuration")
    add("--allow_tf32", action="store_true", help="use TF32 for float32 matrix products on CUDA")
    add("--use_ema", action="store_true", help="average the weights; the average is validated and saved")
    add("--offload_ema", action="store_true", help="keep the average in main memory, with slower steps")
    add("--loss_weighting", choices=["none", "p2"], default="none", help="p2: as in the original training")
    timesteps = {"choices": ["uniform", "stretched"], "default": "uniform"}
    add("--timestep_sampling", **timesteps, help="stretched: as in the original training")
    add("--caption_dropout", type=fraction, default=0.0, help="fraction of captions that are left empty")
    add("--compile", action="store_true", help="compile the prior and replay it as CUDA graphs")

    add = parser.add_argument_group("optimizer").add_argument
    optimizers = {"choices": ["adamw", "adamw8bit", "adafactor"]}
    add("--optimizer", **optimizers, help="the last two need less memory (default: adamw)")
    add("--use_8bit_adam", action="store_true", help="the same as --optimizer=adamw8bit")
    add("--learning_rate", type=non_negative, default=1e-4, help="at the schedule's peak")
    schedules = {"choices": [schedule.value for schedule in SchedulerType], "default": "constant"}
    add("--lr_scheduler", **schedules, metavar="NAME", help=", ".join(schedules["choices"]))
    add("--lr_warmup_steps", type=natural, default=500, help="steps, for schedules with a warm-up")
    add("--lr_step_rules", help="of piecewise_constant: factors and their last steps, 1:100,0.1:200,0.01")
    add("--adam_beta1", type=fraction, default=0.9, help="decay of the average of gradients")
    add("--adam_beta2", type=fraction, default=0.999, help="decay of the average of squared gradients")
    add("--adam_weight_decay", type=non_negative, default=0.0, help="decoupled, for all optimizers")
    add("--adam_epsilon", type=non_negative, default=1e-8, help="added to the divisor")
    add("--max_grad_norm", type=bounded(float, 1e-8), default=1.0, help="gradients are clipped to this norm")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="wuerstchen-model-finetuned", help="folder for everything that is written")
    add("--overwrite_output_dir", action="store_true", help="replace another run's files in --output_dir")
    add("--checkpointing_steps", type=positive_int, default=500, help="steps between checkpoints")
    add("--checkpoints_total_limit", type=positive_int, help="number of checkpoints to keep; default: all")
    add("--resume_from_checkpoint", help="'latest' or the path of a checkpoint")
    add("--validation_prompts", nargs="+", help="of images generated before, during and after training")
    add("--validation_epochs", type=positive_int, default=5, help="epochs between validations")
    add("--validation_steps", type=positive_int, help="steps between validations, instead of epochs")
    sizes = {"type": positive_int, "nargs": "+", "metavar": "PIXELS"}
    add("--validation_size", **sizes, help="WIDTH HEIGHT ... of further images of each prompt")
    add("--logging_dir", default="logs", help="folder of the trackers' files, under --output_dir")
    trackers = {"type": lambda text: text.replace(" ", "") or "none", "default": "tensorboard"}
    trackers |= {"metavar": "NAMES", "help": "comma-separated: tensorboard, wandb, comet_ml, ..., all, none"}
    add("--report_to", **trackers)
    add("--tracker_project_name", default="text2image-fine-tune", help="project that trackers log to")
    add("--push_to_hub", action="store_true", help="upload the result at the end")
    add("--hub_model_id", help="repo to upload to; default: the name of --output_dir")
    add("--hub_private_repo", action="store_true", help="make the repo private, if it does not exist yet")
    add("--hub_token", type=str.strip, metavar="STR", help="sent to the Hub only; `hf auth login` is safer")
    unused = {"type": int, "default": -1, "help": "not used: Accelerate reads the environment"}
    add("--local_rank", "--local-rank", **unused)

    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name} is empty; is it set from a variable that does not exist?")
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("give --dataset_name (a data set on the Hub) or --train_data_dir (a folder)")
    if (args.lr_scheduler == "piecewise_constant") != (args.lr_step_rules is not None):
        parser.error("--lr_scheduler=piecewise_constant and --lr_step_rules need each other")
    if len(args.validation_size or []) % 2:
        parser.error("--validation_size needs pairs of WIDTH and HEIGHT, such as 1024 1536")
    if args.compile and args.aspect_ratio_buckets:
        parser.error(
            "--compile records one size of micro-batches, --aspect_ratio_buckets makes several: leave out one"
        )
    if args.cache_latents and make_augmentations(args, (args.resolution, args.resolution)):
        parser.error(
            "--cache_latents encodes each image once, but --random_crop, --random_flip and whatever else "
            "make_augmentations returns change it every epoch: leave out one or the other"
        )
    choose_optimizer(parser, args)
    if args.offload_ema and not args.use_ema:
        parser.error("--offload_ema needs --use_ema, the average that it keeps in main memory")
    available = [*map(str, get_available_trackers()), "all", "none"]
    for name in args.report_to.split(","):
        if name not in available:
            parser.error(f"--report_to={name} is not installed; available: {', '.join(available)}")
    return args


def choose_optimizer(parser: ArgumentParser, args: argparse.Namespace):
    """Completes --optimizer, for which --use_8bit_adam can stand, and rejects flags that contradict it."""
    if args.use_8bit_adam and args.optimizer not in (None, "adamw8bit"):
        parser.error(f"--use_8bit_adam means --optimizer=adamw8bit, not {args.optimizer}: leave out one")
    if args.optimizer is None:
        args.optimizer = "adamw8bit" if args.use_8bit_adam else "adamw"
    args.use_8bit_adam = args.optimizer == "adamw8bit"
    if args.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--optimizer=adamw8bit needs bitsandbytes: `pip install bitsandbytes`")
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if args.optimizer == "adafactor" and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} has no meaning for --optimizer=adafactor: leave out one of them")


# Flags that are secret, or whose values only have a meaning on this machine or for this repo.
PRIVATE_FLAGS = {"hub_token", "hub_model_id", "resume_from_checkpoint", "overwrite_output_dir"}
PRIVATE_FLAGS |= {"dataloader_num_workers", "local_rank"}


def public_settings(args: argparse.Namespace) -> dict:
    """The flags that may be kept in checkpoints, without private ones."""
    return {name: value for name, value in vars(args).items() if name not in PRIVATE_FLAGS}


def public_args(args: argparse.Namespace) -> str:
    """The settings as flags for a shell, for image files and the model card, without local paths."""
    words = []
    for name, value in public_settings(args).items():
        is_local_path = name.endswith(("_path", "_dir", "dataset_name")) and os.path.exists(str(value))
        if is_local_path or value is None or value is False:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    return shlex.join(words)


@contextlib.contextmanager
def explain_errors(flag: str, value, kind: type[Exception] = Exception) -> Iterator[None]:
    """Turns a library's error about a user's setting into one line that names the flag."""
    try:
        yield
    except kind as error:
        while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
            error = error.__cause__  # the reason, for example a full disk
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        name = "" if type(error) is ValueError else f"{type(error).__name__}: "
        cause = error
        while cause is not None:
            if isinstance(cause, hub.errors.LocalEntryNotFoundError):
                name, reason = "", "it is not a local folder, not in the cache, and the Hub cannot be reached"
            cause = cause.__cause__ or cause.__context__
        raise SystemExit(f"{flag}={value}: {name}{printable(reason)}") from None


def printable(text: str, max_length: int = 500) -> str:
    """Text from a file or a library on one line, with control characters escaped, for a message."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= max_length else f"{text[:max_length]}..."


# ------------------------------------------------------------------------------------------------------ setup
def setup_accelerator(args: argparse.Namespace) -> Accelerator:
    """Sets up devices, precision, trackers and logging by the flags, the launcher and `accelerate config`."""
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):  # before Accelerate looks for their libraries
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise SystemExit(
                f"accelerate config: {engine} is not supported; choose multi-GPU. To save memory, use "
                "--use_8bit_adam --gradient_checkpointing: 1 B parameters need no sharding."
            )
    atexit.register(kill_workers)
    sys.stdout, sys.stderr = LossyStream(sys.stdout), LossyStream(sys.stderr)
    if args.hub_token:  # wandb and comet_ml record the command line
        sys.argv = [argument.replace(args.hub_token, "***") for argument in sys.argv]
    with explain_errors("--output_dir", args.output_dir):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    logging_dir = os.path.join(args.output_dir, args.logging_dir)
    # A plugin, since ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment would override a number.
    accumulation = accelerate.utils.GradientAccumulationPlugin(args.gradient_accumulation_steps)
    accelerator = Accelerator(
        gradient_accumulation_plugin=accumulation,
        mixed_precision=args.mixed_precision,
        log_with=[name for name in args.report_to.split(",") if name != "none"] or None,
        project_config=accelerate.utils.ProjectConfiguration(args.output_dir, logging_dir),
        kwargs_handlers=[
            # Each weight is used once per pass: autocast's cache would only hold 2 GB of 16-bit copies.
            accelerate.utils.AutocastKwargs(cache_enabled=False),
            accelerate.utils.InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            # Gradients stay in the buckets in which they are reduced: 4 GB less without accumulation.
            accelerate.utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > accelerator.num_processes:
        raise SystemExit(
            f"WORLD_SIZE={world_size}: so many processes were started, but each would train alone, since "
            "there is no GPU; set ACCELERATE_USE_CPU=true to train together on the CPU"
        )
    log_format = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(format=log_format, datefmt="%H:%M:%S", level=logging.INFO)
    for library in ("accelerate", "httpx", "httpx2"):  # the last two log every request
        logging.getLogger(library).setLevel(logging.WARNING)
    diffusers.utils.logging.set_verbosity_error()  # it warns that the Würstchen pipelines are deprecated
    diffusers.utils.logging.disable_progress_bar()
    # DDP's, about dimensions of size 1, whose strides have no meaning.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "One process trains, although MASTER_ADDR is set, as `accelerate launch --num_processes=2` does: "
            "for several, add --multi_gpu, and on a CPU set ACCELERATE_USE_CPU=true in the environment"
        )
    precision = accelerator.mixed_precision
    if precision != "no" and not accelerator.native_amp:
        logger.warning(f"{accelerator.device} does not support {precision}: training in float32")
    return accelerator


class LossyStream:
    """Standard output or error that loses text instead of raising, when the terminal or the pipe is
    closed."""

    def __init__(self, stream):
        self.stream = stream or io.StringIO()  # None: closed from the start

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str):  # isatty, encoding, ...
        return getattr(self.stream, name)


def lock_output_dir(accelerator: Accelerator, output_dir: Path):
    """Locks the folder against a second run until this process ends, however it ends. All ranks must see the
    same folder."""
    if accelerator.is_main_process:
        lock = filelock.FileLock(output_dir / ".lock", timeout=0, is_singleton=True)
        with explain_errors("--output_dir", output_dir):
            try:
                lock.acquire()
            except filelock.Timeout:
                raise ValueError("another run is writing to this folder; choose another one") from None
        atexit.register(lock.release)  # a lock that nothing refers to is released
    num_separate = count_separate_ranks(accelerator, output_dir)
    if num_separate:
        message = (
            f"--output_dir={output_dir}: {num_separate} of {accelerator.num_processes} processes have another"
            " folder of that name; share it between the nodes"
        )
        raise SystemExit(message if accelerator.is_main_process else 1)


def check_destinations(args: argparse.Namespace) -> str:
    """Checks what is needed at the end: the decoder, and write access to the repo, whose id it returns."""
    source = args.pretrained_decoder_model_name_or_path
    with explain_errors("--pretrained_decoder_model_name_or_path", source):
        config = wuerstchen.WuerstchenDecoderPipeline.load_config(source, cache_dir=args.cache_dir)
        if not {"decoder", "vqgan"} <= config.keys():
            raise ValueError("its model_index.json is not that of a Würstchen decoder")
    repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
    if args.push_to_hub:
        with explain_errors("--push_to_hub: --hub_model_id", repo_id):
            private, token = args.hub_private_repo or None, args.hub_token
            if token is None and hub.get_token() is None:
                raise ValueError("there is no token for the Hub; log in with `hf auth login`")
            repo_id = hub.create_repo(repo_id, private=private, exist_ok=True, token=token).repo_id
            # Asks how a file would be uploaded, which a read-only token must not. Nothing is uploaded.
            hub.preupload_lfs_files(repo_id, [hub.CommitOperationAdd("README.md", b"-")], token=token)
    return repo_id


def init_trackers(accelerator: Accelerator, args: argparse.Namespace, state: "TrainState"):
    """Starts the trackers, or continues the curves of the run that is resumed."""
    config = {}
    for name, value in vars(args).items():
        if name != "hub_token":
            config[name] = value if isinstance(value, (int, float, str)) else str(value)
    init_kwargs = {
        "tensorboard": {"purge_step": state.global_step + 1 if state.global_step else 0},
        "wandb": {"id": state.wandb_run_id, "resume": "allow"},
    }
    with explain_errors("--report_to", args.report_to):
        accelerator.init_trackers(args.tracker_project_name, config, init_kwargs)


def kill_workers():
    """Kills the data loaders' workers at exit. They ignore SIGTERM, with which multiprocessing ends its
    processes: it would wait for them forever after an error in the training loop."""
    if hasattr(signal, "SIGCHLD"):  # PyTorch's handler would raise that a worker was killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


# Signals that stop a run: a scheduler's or launcher's, Ctrl-C, and a closed terminal.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def deferred_signals(received: list[int]) -> Iterator[None]:
    """Appends signals that stop a run to `received` instead; a second one stops at once."""
    received_at = -math.inf

    def handler(number: int, frame):
        nonlocal received_at
        if number == signal.SIGTERM and time.monotonic() - received_at < DUPLICATE_SIGTERM:
            return
        if received:
            os._exit(128 + number)
        received_at = time.monotonic()
        received.append(number)
        with contextlib.suppress(OSError):
            os.write(2, b"\nStopping after this step; another signal stops at once.\n")

    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


def exit_on_signals(received: list[int]):
    """Makes a signal end the process with the status of a stop, and so does one that was received before."""

    def handler(number: int, frame):
        logger.info("Stopped; the same command with --resume_from_checkpoint=latest saves the result")
        sys.exit(128 + number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    if received:
        handler(received[0], None)


# ------------------------------------------------------------------------------------------------------ ranks
@functools.cache
def slow_group():
    """A second group of all ranks, over gloo, for long waits. Made by the first call, of all ranks."""
    return torch.distributed.new_group(backend="gloo", timeout=SLOW_TIMEOUT)


def wait_for_slow_ranks(accelerator: Accelerator):
    """Waits until all ranks are here, for hours if need be. Other collectives give up after minutes."""
    if accelerator.num_processes > 1:
        torch.distributed.barrier(group=slow_group())


@contextlib.contextmanager
def local_main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """As `accelerator.local_main_process_first`, for what may take long, such as a download."""
    if not accelerator.is_local_main_process:
        wait_for_slow_ranks(accelerator)
    yield
    if accelerator.is_local_main_process:
        wait_for_slow_ranks(accelerator)


def is_first_to_end() -> bool:
    """Whether no other rank has asked this before, or the ranks' store, where they count, is lost, too."""
    with contextlib.suppress(Exception):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(address, port, timeout=timedelta(seconds=10))
        return store.add(f"ended-{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    return True


@contextlib.contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Ends a rank without a traceback if a collective failed because another rank has ended or does not
    answer. The first rank to end says why, those that follow it nothing."""
    try:
        yield
    except BaseException as error:
        if "RANK" not in os.environ:
            raise
        is_first = is_first_to_end()  # asked by each rank, so that those that follow it know
        from_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
        if not from_gloo and not isinstance(error, torch.distributed.DistError):
            raise
        reason = printable(next(iter(str(error).splitlines()), ""), 200)
        message = (
            f"rank {os.environ['RANK']}: another process has ended without a message, or cannot be reached; "
            f"--resume_from_checkpoint=latest continues ({reason})"
        )
        raise SystemExit(message if is_first else 1) from None


def end_training(accelerator: Accelerator):
    """Closes the trackers and the groups of ranks."""
    # PyTorch before 2.8 hangs if it closes a group whose thread is still about to free a tensor. This wait
    # lets it.
    wait_for_slow_ranks(accelerator)
    with only_warn("Closing the trackers"):
        accelerator.end_training()


def count_separate_ranks(accelerator: Accelerator, folder: Path) -> int:
    """The number of ranks that do not see a file that rank 0 writes to the folder."""
    if accelerator.num_processes == 1:
        return 0
    wait_for_slow_ranks(accelerator)
    (file,) = broadcast_object_list([folder / f".shared-{time.time_ns()}"])
    if accelerator.is_main_process:
        file.touch()
    wait_for_slow_ranks(accelerator)
    num_separate = gather_object([file.exists()]).count(False)
    if accelerator.is_main_process:
        file.unlink()
    return num_separate


# ------------------------------------------------------------------------------------------------------- data
SPLITS = ("train", "validation", "test")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Data files and the builders of `datasets` for them. The first kind that is there is read: beside each tar
# img2dataset writes a Parquet file without images.
BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}
CAPTION_COLUMNS = ("text", "txt", "caption", "captions", "prompt")  # suggested for --caption_column
# For a table with paths of images. The README has the lines that embed them.
OUTSIDE = "lies outside the data set's folder: move it there, or embed the images (README, Your own data)"
# For a folder of images without captions.
CAPTIONS_ADVICE = """Write the captions to metadata.jsonl in that folder, a line for each image:
{"file_name": "cat.jpg", "text": "a cat on a sofa"}
{"file_name": "more/dog.png", "text": "a dog in the snow"}
or each to a text file beside its image: cat.txt, more/dog.txt"""


def load_train_dataset(args: argparse.Namespace) -> datasets.Dataset:
    """Loads the images, still encoded (`load_image` decodes them), and captions to train on."""
    source, flag = args.dataset_name, "--dataset_name"
    if source is None:
        source, flag = args.train_data_dir, "--train_data_dir"
    elif args.train_data_dir is not None:
        logger.warning(f"--train_data_dir={args.train_data_dir} is ignored, since --dataset_name is given")
    with explain_errors(flag, source):
        splits = load_splits(source, args)
        if not len(splits.get("train", ())):
            raise ValueError(f"there are no rows in a split named train, only {', '.join(splits)}")
        dataset = splits["train"]
    check_columns(dataset.features, args)
    dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    dataset = dataset.select_columns([args.image_column, args.caption_column])
    if args.max_train_samples is not None:
        if args.max_train_samples > len(dataset):
            logger.warning(f"--max_train_samples={args.max_train_samples}: there are {len(dataset)} rows")
        num_rows = min(args.max_train_samples, len(dataset))
        dataset = dataset.shuffle(seed=args.seed, keep_in_memory=True).select(range(num_rows))
    return dataset


def holds_images(feature) -> bool:
    """Whether a column holds encoded images: `datasets.Image`, structs of bytes and path, or bytes."""
    is_struct = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    is_binary = isinstance(feature, datasets.Value) and "binary" in feature.dtype
    return is_struct or is_binary or isinstance(feature, datasets.Image)


def check_columns(features: datasets.Features, args: argparse.Namespace):
    """Ends the run if there are no such columns, and suggests others, or if the first holds no images."""
    names = list(features)
    columns = {"--image_column": args.image_column, "--caption_column": args.caption_column}
    candidates = {
        "--image_column": [name for name, feature in features.items() if holds_images(feature)],
        "--caption_column": [name for name in CAPTION_COLUMNS if name in names],
    }
    missing = [flag for flag, column in columns.items() if column not in names]
    if missing:
        flags = [shlex.quote(f"{flag}={candidates[flag][0]}") for flag in missing if candidates[flag]]
        advice = f"; use {' '.join(flags)}" if flags else ""
        if names in (["image"], ["image", "label"]):
            advice = f"\n{CAPTIONS_ADVICE}"
        reason = f"there is no such column, only {printable(', '.join(names))}{advice}"
        raise SystemExit(f"{missing[0]}={columns[missing[0]]}: {reason}")
    if not holds_images(features[args.image_column]):
        reason = f"the column holds {features[args.image_column]}, not images: cast it to Image"
        raise SystemExit(f"--image_column={args.image_column}: {reason}")


def load_splits(source: str, args: argparse.Namespace) -> dict:
    """Loads the splits of a data set on the Hub or in a folder. Add data layouts here.

    A folder with a README.md that is given as --dataset_name is a copy of a Hub repo, which it may configure.
    """
    folder, is_local = Path(source), args.dataset_name is None
    if is_local and not folder.is_dir():
        raise ValueError("there is no such folder")
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(folder)
    if (folder / "state.json").is_file():
        return {"train": datasets.load_from_disk(folder)}
    if not folder.is_dir() or (not is_local and (folder / "README.md").is_file()):
        return datasets.load_dataset(source, args.dataset_config_name, cache_dir=args.cache_dir)
    root = str(folder.resolve())
    files = list_files(root)
    rows = read_captioned_images(root, files, args.caption_column)
    if rows:
        return {"train": make_image_dataset(rows)}
    for suffix in BUILDERS:
        if any(has_suffix(file, [suffix]) for file in files):
            return {"train": load_data_files(root, files, suffix, args)}
    images = [file for file in files if has_suffix(file, IMAGE_SUFFIXES)]
    if not images:
        raise ValueError("there are no images, WebDataset (.tar), Parquet or Arrow files in it")
    return {"train": make_image_dataset([{"image": image} for image in images])}  # lacks captions


def list_files(root: str) -> list[str]:
    """All files in a folder, sorted, but for hidden ones. Links are followed; each folder is read once."""

    def fail(error: OSError):
        raise error

    hidden = (".", "__")
    files, visited = [], set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(hidden))
        files += [os.path.join(folder, name) for name in names if not name.startswith(hidden)]
    return sorted(files)


def has_suffix(file: str, suffixes: Collection[str]) -> bool:
    """Whether a file's suffix, such as ".jpg", is one of these, in either case."""
    return os.path.splitext(file)[1].lower() in suffixes


def find_split(file: str, root: str) -> str | None:
    """The split of a file in the folder `root`: an image's by its top-level folder, a data file's by any
    folder or its name, which `datasets` writes as test-00000-of-00001.parquet."""
    *names, name = file[len(root) :].strip(os.sep).split(os.sep)
    if has_suffix(name, BUILDERS):
        names.append(re.sub(r"-\d{5}-of-\d{5}.*", "", os.path.splitext(name)[0]))
    else:
        names = names[:1]
    return next((name for name in names if name in SPLITS), None)


def select_train_files(files: list[str], root: str) -> list[str]:
    """The files in the split train or, if there are none, those in no split."""
    splits = [find_split(file, root) for file in files]
    wanted = "train" if "train" in splits else None
    if files and wanted not in splits:
        raise ValueError(f"there are no rows in a split named train, only {', '.join(sorted(set(splits)))}")
    return [file for file, split in zip(files, splits, strict=True) if split == wanted]


def report_files(log: Callable, files: set[str], root: str, reason: str):
    """Logs a message about files, if there are any, with their number and the first one."""
    if files:
        first = printable(os.path.relpath(min(files), root), 200)
        log(f"{len(files)} {reason}: {first}{' and others' if len(files) > 1 else ''}")


def load_data_files(root: str, files: list[str], suffix: str, args: argparse.Namespace) -> datasets.Dataset:
    """Loads the data files with a suffix, by `datasets`."""
    used = select_train_files([file for file in files if has_suffix(file, [suffix])], root)
    for file in used:
        if "::" in file:
            raise ValueError(f"`datasets` takes {file} for a URL, because of the '::' in it: rename it")
    # Each file is given, escaped: `datasets` takes words in names for splits and [brackets] for patterns.
    data_files = {"train": [glob.escape(file) for file in used]}
    load = functools.partial(datasets.load_dataset, BUILDERS[suffix], data_files=data_files, split="train")
    features = load(streaming=True).features  # from the first file, before all are copied to the cache
    check_columns(features, args)
    if suffix == ".tar":  # without other files in it, such as .json, whose types may differ
        columns = (args.image_column, args.caption_column)
        features = datasets.Features({name: features[name] for name in columns})
    dataset = load(features=features, cache_dir=args.cache_dir)
    logger.info(f"Found {len(dataset)} rows in {len(used)} {suffix} files in {root}")
    others = {file for file in files if has_suffix(file, BUILDERS)} - set(used)
    report_files(logger.info, others, root, f"other data files ({', '.join(BUILDERS)}) there are not used")
    return dataset


def read_captioned_images(root: str, files: list[str], caption_column: str) -> list[dict]:
    """The rows of a folder's metadata files, and those of images that none of them names but that have a .txt
    file: the image's path, "image", and other columns.

    The builder "imagefolder" of `datasets` reads no .txt files, takes the caption "NA" for a missing one and
    "a::b.jpg" for a URL, and reads several metadata files in an order that changes.
    """
    images = [file for file in files if has_suffix(file, IMAGE_SUFFIXES)]
    train_images = select_train_files(images, root)
    if not train_images:
        return []
    train_split = find_split(train_images[0], root)
    metadata_files = [file for file in files if os.path.basename(file) in METADATA_FILES]
    all_rows = read_metadata_files(metadata_files)
    rows = [row for row in all_rows if find_split(row["image"], root) == train_split]
    named = {row["image"] for row in rows}
    unnamed = [image for image in train_images if image not in named]
    text_rows = read_text_files(root, files, unnamed, caption_column)
    if not rows and not text_rows:
        return []

    source = f"{len(metadata_files)} metadata files"
    if len(metadata_files) == 1:
        source = printable(os.path.relpath(metadata_files[0], root))
    counts = ((len(rows), source), (len(text_rows), ".txt files"))
    found = ", ".join(f"{number} captions in {place}" for number, place in counts if number)
    logger.info(f"Found {len(train_images)} images in {root}: {found}")
    uncaptioned = set(train_images) - named - {row["image"] for row in text_rows}
    reason = "are not used: neither a metadata file nor a .txt file captions"
    report_files(logger.warning, uncaptioned, root, f"of {len(train_images)} images in {root} {reason}")
    others = (set(images) | {row["image"] for row in all_rows}) - set(train_images) - named
    report_files(logger.info, others, root, "images are not in the split train and are not used")
    data_files = {file for file in files if has_suffix(file, BUILDERS)} - set(metadata_files)
    report_files(logger.info, data_files, root, "data files there are not used, since captioned images are")
    folders = {os.path.basename(os.path.dirname(row["image"])) for row in rows + text_rows}
    if all(re.match(r"\d+_", folder) for folder in folders):
        name = printable(min(folders), 200)
        logger.info(f"Numbers in folders' names, as in {name}, are not read as repeats of their images")
    return rows + text_rows


def read_metadata_files(files: list[str]) -> list[dict]:
    """The rows of metadata files: those of one in its order, those of several by their images' paths."""
    rows, named_in = [], {}
    for file in files:
        for row in read_metadata(file):
            other = named_in.setdefault(row["image"], file)
            if other != file:
                raise ValueError(f"{other} and {file} both name {row['image']}; remove it from one of them")
            rows.append(row)
    return sorted(rows, key=lambda row: row["image"]) if len(files) > 1 else rows


def read_metadata(file: str) -> list[dict]:
    """The rows of a metadata file, with the image's path, "image", for "file_name". CSV is text as written.

    Raises:
        ValueError: with the file and the line, if a row cannot be read.
    """
    rows, line = [], 1
    try:
        with open(file, "rb") as source:
            if file.endswith(".parquet"):
                numbered_rows = enumerate(pq.read_table(source).to_pylist(), 1)
            elif file.endswith(".csv"):
                reader = csv.DictReader((text.decode("utf-8-sig") for text in source), strict=True)
                numbered_rows = ((reader.line_num, row) for row in reader)
                line = 2
            else:
                numbered_rows = enumerate((json.loads(text.strip() or "null") for text in source), 1)
            for last_line, row in numbered_rows:
                if row is not None:  # a blank line
                    rows.append(resolve_file_name(row, file))
                line = last_line + 1
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file}, line {line}: {getattr(error, 'msg', error)}") from None
    return rows


def resolve_file_name(row: dict, metadata_file: str) -> dict:
    """A row of a metadata file with the path "image" for "file_name", which is relative to the file."""
    name = row.pop("file_name", None) if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("it has no file_name")
    if None in row:
        raise ValueError("it has more values than the header: a caption with commas needs quotes")
    folder = os.path.dirname(metadata_file)
    path = os.path.normpath(os.path.join(folder, name))
    if "\\" in name and not os.path.exists(path):  # written on Windows
        path = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
    return row | {"image": path}


def read_text_files(root: str, files: list[str], images: list[str], caption_column: str) -> list[dict]:
    """The rows of images with a .txt file of the same name beside them. Its text is the caption, on one line,
    which is None if it is empty or not UTF-8."""
    text_files = {os.path.splitext(file)[0]: file for file in files if has_suffix(file, [".txt"])}
    rows, unusable = [], set()
    for image in images:
        file = text_files.get(os.path.splitext(image)[0])
        if file is None:
            continue
        caption = ""
        with contextlib.suppress(UnicodeDecodeError), open(file, encoding="utf-8-sig") as source:
            caption = source.read().strip().replace("\n", " ")
        if not caption:
            unusable.add(file)
        rows.append({"image": image, caption_column: caption or None})
    report_files(logger.warning, unusable, root, f"of {len(rows)} .txt files are empty or not UTF-8")
    return rows


def make_image_dataset(rows: list[dict]) -> datasets.Dataset:
    """A data set in memory, from rows of "image", an image file's path, and other columns. Its fingerprint
    follows from them and the files' times: --cache_latents encodes them anew after a change."""
    images = [{"bytes": None, "path": row["image"]} for row in rows]
    names = dict.fromkeys(name for row in rows for name in row if name != "image")
    try:
        columns = {"image": pa.array(images, datasets.Image.pa_type)}
        columns |= {name: make_column([row.get(name) for row in rows]) for name in names}
    except UnicodeEncodeError as error:
        raise ValueError(f"a file's name or a caption is not UTF-8: {printable(error.object)}") from None
    table = pa.table(columns)
    features = datasets.Features.from_arrow_schema(table.schema)
    features["image"] = datasets.Image(decode=False)
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        modified = None
        with contextlib.suppress(OSError, ValueError):  # a missing file, a name with a null character
            modified = os.path.getmtime(row["image"])
        digest.update(repr((row, modified)).encode())
    return datasets.Dataset(
        datasets.table.InMemoryTable(table),
        info=datasets.DatasetInfo(features=features),
        fingerprint=digest.hexdigest(),
    )


def make_column(values: list) -> pa.Array:
    """A column of metadata. Where types differ, it has lists of strings, as captions may be, and otherwise
    None."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        lists = [[value] if isinstance(value, str) else value for value in values]
        is_text = [isinstance(v, list) and all(isinstance(text, str) for text in v) for v in lists]
        return pa.array([v if ok else None for v, ok in zip(lists, is_text, strict=True)])


def split_held_out(num_rows: int, held_out: float | None, seed: int) -> tuple[np.ndarray | range, np.ndarray]:
    """The indices of the rows to train on and of those to hold out, a number or, below 1, a fraction of them.
    (`train_test_split` of `datasets` would write into the data set's folder.)"""
    if held_out is None:
        return range(num_rows), np.arange(0)
    num_held_out = math.ceil(held_out * num_rows) if held_out < 1 else held_out
    if num_held_out % 1 or num_held_out >= num_rows:
        raise SystemExit(
            f"--validation_split={held_out}: there are {num_rows} rows; "
            "give a smaller whole number, or a fraction below 1"
        )
    permutation = np.random.default_rng(seed).permutation(num_rows)
    return permutation[int(num_held_out) :], permutation[: int(num_held_out)]


def image_fields(images: pa.ChunkedArray) -> Iterator[tuple[str | None, pa.Buffer | None]]:
    """Yields each image's path and its bytes, which are mapped, not read."""
    for chunk in images.chunks:
        contents = (content.as_buffer() for content in pc.struct_field(chunk, "bytes"))
        yield from zip(pc.struct_field(chunk, "path").to_pylist(), contents, strict=True)


def describe_rows(dataset: datasets.Dataset, args: argparse.Namespace) -> Iterator[tuple]:
    """Yields each row's image path, the image's size in bytes, None if it is missing, whether that is of the
    file at the path and not of embedded bytes, and the captions. Images are not read."""
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        captions = table[args.caption_column].to_pylist()
        for (path, content), caption in zip(image_fields(table[args.image_column]), captions, strict=True):
            size = None if content is None else content.size
            is_file = size is None and path is not None
            if is_file:
                with contextlib.suppress(OSError):
                    size = os.path.getsize(path)
            yield path, size, is_file, caption


def hash_rows(dataset: datasets.Dataset, args: argparse.Namespace) -> str:
    """A hash of all captions and of the names and sizes of all images, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for path, size, _, captions in describe_rows(dataset, args):
        digest.update(repr((os.path.basename(path or ""), size, captions)).encode())
    return digest.hexdigest()


def check_rows(dataset: datasets.Dataset, args: argparse.Namespace, tokenizer: CLIPTokenizerFast):
    """Ends the run if images are missing or captions are no text, unless they may be skipped, and logs how
    many captions are empty or too long for the text encoder. Takes seconds for 100,000 rows."""
    errors, texts = [], []
    is_inside = functools.cache(functools.partial(lies_inside, folders=tuple(image_folders(args))))
    for row, (path, size, is_file, captions) in enumerate(describe_rows(dataset, args)):
        try:
            texts += list_captions({args.caption_column: captions, args.image_column: {"path": path}}, args)
            name = printable(path or "no file name", 200)
            if is_file and not is_inside(os.path.dirname(path)):
                raise ValueError(f"the image ({name}) {OUTSIDE}")
            if not size:
                raise ValueError(f"the image ({name}) is missing or empty")
        except ValueError as error:
            errors.append(f"row {row}: {error}")
    if errors:
        message = f"{len(errors)} of {len(dataset)} rows cannot be used, the first: {errors[0]}"
        if not args.skip_bad_rows:
            raise SystemExit(f"{message}; fix them, or skip such rows with --skip_bad_rows")
        logger.warning(message)
    num_empty = sum(not text.strip() for text in texts)
    if num_empty:
        logger.warning(f"{num_empty} of {len(texts)} captions are empty")
    max_length = tokenizer.model_max_length
    for what, captions in (("captions", texts), ("--validation_prompts", args.validation_prompts or [])):
        lengths = []
        for start in range(0, len(captions), 1000):  # a million at once take 9 GB
            tokens = tokenizer(captions[start : start + 1000], return_attention_mask=False, verbose=False)
            lengths += map(len, tokens.input_ids)
        too_long = [caption for caption, length in zip(captions, lengths, strict=True) if length > max_length]
        if too_long:
            logger.warning(
                f"{len(too_long)} of {len(captions)} {what} are longer than the text encoder's {max_length} "
                f"tokens and are cut, for example: {printable(too_long[0], 100)}"
            )


# ---------------------------------------------------------------------------------------------------- samples
def image_folders(args: argparse.Namespace) -> list[Path]:
    """The folders in which a data set's image files may be: its own, and the caches of those from the Hub."""
    caches = [args.cache_dir, datasets.config.HF_DATASETS_CACHE, hub.constants.HF_HUB_CACHE]
    folders = [args.train_data_dir] if args.dataset_name is None else [args.dataset_name, *caches]
    return [Path(folder) for folder in folders if folder]


def lies_inside(path: str, folders: Sequence[Path]) -> bool:
    """Whether a path is in one of these folders. /etc/passwd and URLs are not."""
    file = Path(path)
    roots = [root for folder in folders for root in (folder.absolute(), folder.resolve())]  # of links, both
    return ".." not in file.parts and any(file.absolute().is_relative_to(root) for root in roots)


def find_image_file(path: str, folders: list[Path]) -> Path:
    """A file of the data set. A path outside its folder is an error."""
    if not lies_inside(path, folders):
        raise ValueError(f"it {OUTSIDE}")
    return Path(path)


@contextlib.contextmanager
def explain_image_errors(path: str | None) -> Iterator[None]:
    """Turns an error of reading an image, of which decoders raise all kinds, into a ValueError with its
    name."""
    try:
        yield
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        name = printable(path or "no file name", 200)
        raise ValueError(f"the image ({name}) cannot be read: {kind}{printable(str(error))}") from error


def load_image(value: dict | None, folders: list[Path]) -> Image.Image:
    """Decodes an image of a data set, {"bytes", "path"}, to 8-bit RGB. EXIF orientation is applied, 16-bit
    grayscale is scaled, and transparency is composited on white.

    Raises:
        ValueError: with the file's name, if it cannot be decoded or lies outside `folders`.
    """
    value = value or {"bytes": None, "path": None}
    with explain_image_errors(value["path"]):
        if not value["bytes"] and not value["path"]:
            raise ValueError("it is missing")
        data = value["bytes"] or find_image_file(value["path"], folders).read_bytes()
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_IMAGE_PIXELS:.0e}")
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("the range of its pixel values is unknown: save it with 8 or 16 bits")
        image.load()
        with contextlib.suppress(Exception):  # an orientation that cannot be read is upright
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grayscale, which convert() would clip to white
            gray, transparent = np.asarray(image), image.info.get("transparency")
            image = Image.fromarray((gray.clip(0, 65535) / 257).round().astype(np.uint8))
            if transparent is not None:
                image.putalpha(Image.fromarray(np.where(gray == transparent, 0, 255).astype(np.uint8)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        longest = MAX_ASPECT_RATIO * min(image.size)
        if max(image.size) > longest:
            width, height = image.size
            image = transforms.functional.center_crop(image, (min(height, longest), min(width, longest)))
        return image.convert("RGB")


def read_image_size(image: Image.Image) -> tuple[int, int]:
    """The height and width of an opened image as `load_image` orients it, without decoding it."""
    width, height = image.size
    if image.format == "TIFF":  # whose size newer versions of Pillow have oriented already
        width, height = (image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
    orientation = 1
    if image.format != "PNG" or "exif" in image.info:  # for the EXIF of a PNG, Pillow may decode all of it
        with contextlib.suppress(Exception):
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def read_image_sizes(
    dataset: datasets.Dataset, args: argparse.Namespace, rows_hash: str
) -> dict[str, np.ndarray]:
    """The height and width of each row's image, or the error that reading it raised, from the headers of the
    files. They are read once and kept in the cache folder by `rows_hash`."""
    folders = image_folders(args)

    def read_batch(table: pa.Table) -> dict[str, list]:
        sizes = {"height": [], "width": [], "error": []}
        for path, content in image_fields(table[args.image_column]):
            height, width, error = 0, 0, ""
            try:
                with explain_image_errors(path):
                    file = pa.BufferReader(content) if content else find_image_file(path or "", folders)
                    with Image.open(file, formats=IMAGE_FORMATS) as image:
                        height, width = read_image_size(image)
            except ValueError as reason:
                error = str(reason)
            for name, value in (("height", height), ("width", width), ("error", error)):
                sizes[name].append(value)
        return sizes

    folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "wuerstchen_image_sizes")
    folder.mkdir(parents=True, exist_ok=True)
    integer = datasets.Value("int32")
    sizes = dataset.with_format("arrow").map(
        read_batch,
        batched=True,
        remove_columns=dataset.column_names,
        features=datasets.Features(height=integer, width=integer, error=datasets.Value("string")),
        cache_file_name=str(folder / f"{rows_hash}.arrow"),
        new_fingerprint=rows_hash,
        desc="Reading image sizes",
    )
    return sizes.with_format("numpy")[:]


@dataclass(frozen=True, eq=False)
class SizedRows:
    """Rows and the size to which each one's image is resized and cropped. Those of one size are a bucket, and
    a micro-batch is of one bucket. Without --aspect_ratio_buckets there is one."""

    dataset: datasets.Dataset
    sizes: list[tuple[int, int]]  # height and width in pixels
    buckets: np.ndarray  # (num_rows,): the index of each row's size

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, row: int) -> dict:
        return self.dataset[row]

    def select(self, rows: Sequence[int]) -> "SizedRows":
        dataset = self.dataset.select(rows, keep_in_memory=True)
        return SizedRows(dataset, self.sizes, self.buckets[np.asarray(rows)])

    def size(self, row: int) -> tuple[int, int]:
        return self.sizes[self.buckets[row]]

    def count(self) -> np.ndarray:
        """The number of rows of each size."""
        return np.bincount(self.buckets, minlength=len(self.sizes))

    def describe(self) -> dict[str, int]:
        """The number of rows of each size, by WIDTHxHEIGHT."""
        names = [f"{width}x{height}" for height, width in self.sizes]
        return dict(zip(names, self.count().tolist(), strict=True))


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """Sizes of all ASPECT_RATIOS, (height, width) in pixels: multiples of 32 with about as many latents as
    the square of `resolution`, which is the first. At 768 that is 567 to 588."""
    side = math.ceil(resolution / STRIDE)
    sizes = []
    for ratio in ASPECT_RATIOS:
        long, short = round(side * math.sqrt(ratio)), max(1, round(side / math.sqrt(ratio)))
        sizes += [(short * STRIDE, long * STRIDE), (long * STRIDE, short * STRIDE)]
    return list(dict.fromkeys(sizes))


def choose_sizes(dataset: datasets.Dataset, args: argparse.Namespace, rows_hash: str) -> SizedRows:
    """The square of --resolution for all rows or, with --aspect_ratio_buckets, the size of the nearest shape.
    Logs how many rows each size has, and what share of the images is cropped."""
    if not args.aspect_ratio_buckets:
        return SizedRows(dataset, [(args.resolution, args.resolution)], np.zeros(len(dataset), np.int64))
    image_sizes = read_image_sizes(dataset, args, rows_hash)
    is_good = image_sizes["error"] == ""
    if not is_good.all() and not args.skip_bad_rows:
        row = int(is_good.argmin())
        raise SystemExit(
            f"row {row}: {image_sizes['error'][row]} ({(~is_good).sum()} of {len(dataset)} rows cannot be "
            "used); fix them, or skip such rows with --skip_bad_rows"
        )
    sizes = bucket_sizes(args.resolution)
    shapes = np.log([height / width for height, width in sizes])  # 1:2 is as far from 1:1 as 2:1
    heights, widths = image_sizes["height"][is_good], image_sizes["width"][is_good]
    distances = np.abs(np.log(heights / widths)[:, None] - shapes)
    buckets = np.zeros(len(dataset), np.int64)
    buckets[is_good] = distances.argmin(axis=1)
    # Rows that cannot be read are replaced by others of their size: the most frequent one.
    buckets[~is_good] = np.bincount(buckets[is_good], minlength=1).argmax()
    occurring, buckets = np.unique(buckets, return_inverse=True)
    rows = SizedRows(dataset, [sizes[bucket] for bucket in occurring], buckets)
    cropped, cropped_to_square = 1 - np.exp(-distances.min(axis=1)), 1 - np.exp(-distances[:, 0])
    counts = ", ".join(f"{size} ({count} rows)" for size, count in rows.describe().items())
    logger.info(
        f"Aspect-ratio buckets: {counts}. On average {cropped.mean():.1%} of an image is cropped; "
        f"with squares it would be {cropped_to_square.mean():.1%}"
    )
    return rows


def load_rows(args: argparse.Namespace, tokenizer: CLIPTokenizerFast) -> tuple[SizedRows, str]:
    """Loads and checks the data set, and chooses the size of each row. Also returns the hash of all rows."""
    dataset = load_train_dataset(args)
    check_rows(dataset, args, tokenizer)
    rows_hash = hash_rows(dataset, args)
    return choose_sizes(dataset, args, rows_hash), rows_hash


def make_augmentations(args: argparse.Namespace, size: tuple[int, int]) -> list[Callable]:
    """The random transforms of training images, from PIL image to PIL image. Add yours here.

    They are called with an image that covers `size`, (height, width): --resolution squared, or the bucket's.
    The center is cropped to it afterwards. They may use the default generators of torch, Python and numpy,
    which are seeded for each sample. Held-out rows are not augmented, and --cache_latents is rejected if
    there is any augmentation.
    """
    augmentations = []
    if args.random_crop:
        augmentations.append(transforms.RandomCrop(size))
    if args.random_flip:
        augmentations.append(transforms.RandomHorizontalFlip())
    return augmentations


def resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes an image so that it just covers `size`, (height, width)."""
    height, width = size
    if image.height * width > image.width * height:
        resized = (image.height * width // image.width, width)
    else:
        resized = (height, image.width * height // image.height)
    return transforms.functional.resize(image, resized, transforms.InterpolationMode.BILINEAR, antialias=True)


def make_image_transforms(
    size: tuple[int, int], augmentations: Sequence[Callable] = ()
) -> transforms.Compose:
    """From a PIL image to the pixels of its center, (3, height, width) uint8."""
    return transforms.Compose(
        [
            functools.partial(resize_to_cover, size=size),
            *augmentations,
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
        ]
    )


def list_captions(row: dict, args: argparse.Namespace) -> list[str]:
    """A row's captions, a string or a list of strings, as a list. Raises ValueError if they are neither."""
    captions = row[args.caption_column]
    choices = [captions] if isinstance(captions, str) else captions
    if not isinstance(choices, (list, tuple)) or not choices or not all(isinstance(c, str) for c in choices):
        file = (row[args.image_column] or {}).get("path") or "no file name"
        message = f"the caption is {captions!r}, not a string or a list of strings (image: {file})"
        raise ValueError(printable(message))
    return list(choices)


def choose_caption(captions: list, caption_dropout: float, empty):
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
    row: dict,
    size: tuple[int, int],
    args: argparse.Namespace,
    tokenizer: CLIPTokenizerFast,
    augment: bool,
    caption_dropout: float,
) -> dict[str, torch.Tensor]:
    """A row as tensors: pixels (3, height, width) uint8, tokens and mask (77,) of one caption."""
    captions = list_captions(row, args)
    image_transforms = make_image_transforms(size, make_augmentations(args, size) if augment else ())
    pixels = image_transforms(load_image(row[args.image_column], image_folders(args)))
    tokens = tokenize_captions([choose_caption(captions, caption_dropout, empty="")], tokenizer)
    return {"effnet_pixel_values": pixels} | {name: tensor[0] for name, tensor in tokens.items()}


def make_preprocess(
    args: argparse.Namespace, tokenizer: CLIPTokenizerFast, empty_embeds: torch.Tensor, train: bool
) -> Callable[[dict, tuple[int, int]], dict]:
    """The function from a row and its size to its tensors. Held-out rows (`train=False`) have no random
    changes."""
    caption_dropout = args.caption_dropout if train else 0.0
    if args.cache_latents:
        return functools.partial(
            preprocess_cached, empty_embeds=empty_embeds[0].cpu(), caption_dropout=caption_dropout
        )
    return functools.partial(
        preprocess_train, args=args, tokenizer=tokenizer, augment=train, caption_dropout=caption_dropout
    )


def derive_seed(*key) -> int:
    """A well-mixed 63-bit seed for a purpose: derive_seed(seed, "epoch", 3)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Seeds torch's, Python's and numpy's default generators on the CPU, and restores them afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, num_rows: int) -> torch.Tensor:
    """The order of the rows in an epoch, (num_rows,) int64."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    return torch.randperm(num_rows, generator=generator)


class SampleDataset(Dataset):
    """Reads samples: pairs of a position, from which all random numbers follow, and a row.

    An unreadable row gives {"error": message} or, with `skip_bad_rows`, a random other row of its size in its
    place. The error is a value, since a DataLoader wraps an exception in its worker's traceback.
    """

    def __init__(self, rows: SizedRows, preprocess: Callable, seed: int, skip_bad_rows: bool):
        self.rows = rows
        self.preprocess = preprocess
        self.seed = seed
        self.skip_bad_rows = skip_bad_rows

    def __getitem__(self, sample: tuple[int, int]) -> dict:
        position, row = sample
        bad_rows = {}
        with seeded_generators(derive_seed(self.seed, "sample", position)):
            for _ in range(MAX_BAD_ROWS):
                try:
                    tensors = self.preprocess(self.rows[row], self.rows.size(row))
                    return {"position": position, "row": row, "bad_rows": bad_rows} | tensors
                except ValueError as error:  # from `load_image` or `list_captions`
                    bad_rows[row] = f"row {row} of the {len(self.rows)} used: {error}"
                if not self.skip_bad_rows:
                    return {"error": f"{bad_rows[row]}; fix it, or skip such rows with --skip_bad_rows"}
                same_size = np.flatnonzero(self.rows.buckets == self.rows.buckets[row])
                row = int(random.choice(same_size))
        last_error = bad_rows.popitem()[1]
        return {"error": f"{MAX_BAD_ROWS} rows in succession cannot be read; the last: {last_error}"}


@dataclass(frozen=True)
class SamplePlan:
    """What determines which samples a step trains on. A run can only be resumed with the same samples, on any
    number of processes."""

    seed: int
    num_rows: int
    rows_hash: str
    num_processes: int
    train_batch_size: int
    gradient_accumulation_steps: int
    bucket_rows: dict[str, int] = field(default_factory=dict)  # with --aspect_ratio_buckets

    @property
    def samples_per_step(self) -> int:
        return self.num_processes * self.train_batch_size * self.gradient_accumulation_steps

    def describe_step(self) -> str:
        factors = f"{self.train_batch_size} x {self.gradient_accumulation_steps} micro-steps"
        return f"{self.samples_per_step} samples a step ({factors} x {self.num_processes} processes)"

    def __str__(self) -> str:
        return f"{self.num_rows} rows, {self.describe_step()}, seed {self.seed}"

    def train_batches(self, rank: int, first_step: int, last_step: int) -> Iterator[range]:
        """The positions of each of a rank's micro-batches in the steps [first_step, last_step)."""
        size, stride = self.train_batch_size, self.num_processes * self.train_batch_size
        first = first_step * self.samples_per_step + rank * size
        return (
            range(start, start + size) for start in range(first, last_step * self.samples_per_step, stride)
        )

    def held_out_batches(self, rank: int, rows: SizedRows) -> list[list[tuple[int, int]]]:
        """A rank's share of the samples of the held-out rows, in batches of one size, of which each size's
        last may be smaller."""
        batches, size = [], self.train_batch_size
        for bucket in range(len(rows.sizes)):
            samples = [(row, row) for row in np.flatnonzero(rows.buckets == bucket).tolist()]
            batches += [samples[start : start + size] for start in range(0, len(samples), size)]
        return batches[rank :: self.num_processes]


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """The endless sequence of samples, epoch after epoch, in which the row of any position follows from the
    seed, so that resuming means to start at a later position.

    The rows of each bucket, in the order of `epoch_permutation`, fill micro-batches, which are mixed with
    those of other buckets at random. What is left of a bucket at an epoch's end begins its next batch, so
    that each row is used once an epoch and no batch is smaller. With one bucket, position p is row
    `epoch_permutation(...)[p % num_rows]` of epoch p // num_rows.
    """

    rows: SizedRows
    plan: SamplePlan

    @functools.cached_property
    def counts(self) -> np.ndarray:
        return self.rows.count()

    def batches_before(self, epoch: int) -> np.ndarray:
        """The number of batches that each bucket has filled before an epoch."""
        return epoch * self.counts // self.plan.train_batch_size

    @functools.lru_cache(maxsize=2)  # noqa: B019  one order lives as long as the process
    def epoch_batches(self, epoch: int) -> np.ndarray:
        """An epoch's batches in their order: the bucket of each, and its number among the bucket's batches,
        (num_batches, 2)."""
        before, after = self.batches_before(epoch), self.batches_before(epoch + 1)
        batches = np.concatenate(
            [
                np.stack([np.full(end - start, bucket), np.arange(start, end)], axis=1)
                for bucket, (start, end) in enumerate(zip(before, after, strict=True))
            ]
        )
        if len(self.counts) == 1:
            return batches
        return np.random.default_rng(derive_seed(self.plan.seed, "batches", epoch)).permutation(batches)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def epoch_rows(self, epoch: int) -> np.ndarray:
        """An epoch's rows, sorted by bucket, each bucket's in random order, (num_rows,)."""
        permutation = epoch_permutation(self.plan.seed, epoch, len(self.rows)).numpy()
        return permutation[np.argsort(self.rows.buckets[permutation], kind="stable")]

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def batch_rows(self, batch: int) -> list[int]:
        """The rows of a micro-batch, by its number in the sequence."""
        batch_size = self.plan.train_batch_size
        epoch = batch * batch_size // len(self.rows)  # or a later one, since buckets' rests are left over
        while self.batches_before(epoch + 1).sum() <= batch:
            epoch += 1
        bucket, number = self.epoch_batches(epoch)[batch - self.batches_before(epoch).sum()].tolist()
        first, num_rows = int(self.counts[:bucket].sum()), int(self.counts[bucket])
        rows = []
        for index in range(number * batch_size, (number + 1) * batch_size):
            epoch, offset = divmod(index, num_rows)
            rows.append(int(self.epoch_rows(epoch)[first + offset]))
        return rows

    def row(self, position: int) -> int:
        """The row of a position."""
        batch, offset = divmod(position, self.plan.train_batch_size)
        return self.batch_rows(batch)[offset]

    def train_batches(self, rank: int, first_step: int, last_step: int) -> Iterator[list[tuple[int, int]]]:
        """The samples of `SamplePlan.train_batches`: pairs of a position and its row."""
        for positions in self.plan.train_batches(rank, first_step, last_step):
            yield [(position, self.row(position)) for position in positions]


def collate_fn(samples: list[dict]) -> dict:
    """Stacks samples to a batch. An error in one of them is the batch's.

    In a worker, `default_collate` allocates shared memory at once, so that the main process learns if it is
    used up. Tensors from `torch.stack` are moved there later, in a background thread whose error nobody sees.
    """
    for sample in samples:
        if "error" in sample:
            return sample
    batch = {"positions": [sample.pop("position") for sample in samples], "bad_rows": {}}
    batch["rows"] = [sample.pop("row") for sample in samples]
    for sample in samples:
        batch["bad_rows"] |= sample.pop("bad_rows")
    return batch | default_collate(samples)


def ignore_signals(worker_id: int):
    """Leaves stopping to the main process: terminals and schedulers signal every process of a job."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def make_dataloader(
    rows: SizedRows, preprocess: Callable, batches, args: argparse.Namespace, device: torch.device
) -> DataLoader:
    """A DataLoader of samples; `batches` yields the positions and rows of each batch."""
    return DataLoader(
        SampleDataset(rows, preprocess, args.seed, args.skip_bad_rows),
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
        timeout=BATCH_TIMEOUT if args.dataloader_num_workers else 0,
        generator=torch.Generator(),  # not the default one, which makes dropout's masks
    )


def iterate_batches(
    dataloader: DataLoader, device: torch.device, skipped_rows: set[int], signals: list[int]
) -> Iterator[dict]:
    """Yields the batches on the device. Each skipped row is reported once; an unreadable row ends the run,
    and so does a signal in `signals` if no batch arrives within BATCH_TIMEOUT."""
    batches = iter(dataloader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            if signals:
                logger.error(f"Stopped without a checkpoint: no batch arrived within {BATCH_TIMEOUT} seconds")
                kill_workers()  # PyTorch would wait ten seconds for each that is blocked
                sys.exit(128 + signals[-1])
            continue  # slow storage
        if "error" in batch:
            raise SystemExit(batch["error"])
        for row in batch["bad_rows"].keys() - skipped_rows:
            skipped_rows.add(row)
            message = f"Skipped {batch['bad_rows'][row]} ({len(skipped_rows)} so far)"
            logger.warning(message, main_process_only=False)
        yield send_to_device(batch, device, non_blocking=True)


@contextlib.contextmanager
def explain_worker_errors(num_workers: int) -> Iterator[None]:
    """Turns the death of a worker process, which PyTorch raises at any point of the main process, and used-up
    shared memory into one line."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if "DataLoader worker (pid" not in message and "shared memory" not in message:
            raise
        reason = message.strip().splitlines()[-1].removeprefix("RuntimeError: ").rstrip(".")
        raise SystemExit(
            f"--dataloader_num_workers={num_workers}: {reason}. Batches are passed in /dev/shm, and each "
            "worker needs memory: use fewer workers or a smaller --train_batch_size, or provide more of both "
            "(docker run --shm-size=1g)"
        ) from None


# ----------------------------------------------------------------------------------------------------- models
def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen models: that of mixed precision, where the device supports it."""
    if not accelerator.native_amp:
        return torch.float32
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def load_text_encoder(args: argparse.Namespace, dtype: torch.dtype) -> CLIPTextModel:
    """The prior's text encoder: CLIP ViT-bigG's text model in the published one."""
    source = args.pretrained_prior_model_name_or_path
    location = {"subfolder": "text_encoder", "cache_dir": args.cache_dir}
    return CLIPTextModel.from_pretrained(source, **location, dtype=dtype)


def load_tokenizer(args: argparse.Namespace) -> CLIPTokenizerFast:
    """The tokenizer of the prior's text encoder."""
    source = args.pretrained_prior_model_name_or_path
    with explain_errors("--pretrained_prior_model_name_or_path", source):
        # First, since transformers 4 does not say why it could not load a tokenizer.
        CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", cache_dir=args.cache_dir)
        return CLIPTokenizerFast.from_pretrained(source, subfolder="tokenizer", cache_dir=args.cache_dir)


def load_encoders(
    args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> tuple[CLIPTextModel, EfficientNetEncoder]:
    """The text encoder and the image encoder, frozen."""
    source = args.pretrained_prior_model_name_or_path
    with explain_errors("--pretrained_prior_model_name_or_path", source):
        text_encoder = load_text_encoder(args, dtype).requires_grad_(False).eval().to(device)
    source = args.pretrained_image_encoder_name_or_path
    with explain_errors("--pretrained_image_encoder_name_or_path", source):
        image_encoder = EfficientNetEncoder.load(source, args.cache_dir)
        image_encoder.requires_grad_(False).eval().to(device, dtype)
    return text_encoder, image_encoder


def load_prior(
    args: argparse.Namespace,
    checkpoint: Path | None,
    text_encoder: CLIPTextModel,
    image_encoder: EfficientNetEncoder,
) -> wuerstchen.WuerstchenPrior:
    """The prior in float32, pretrained or from the checkpoint. It must match both encoders."""
    source = args.pretrained_prior_model_name_or_path
    with explain_errors("--pretrained_prior_model_name_or_path", source):
        prior = wuerstchen.WuerstchenPrior.from_pretrained(
            checkpoint or source, subfolder="prior", torch_dtype=torch.float32, cache_dir=args.cache_dir
        )
        width = text_encoder.config.hidden_size
        if width != prior.config.c_cond:
            raise ValueError(f"its text encoder has {width} features, its prior c_cond={prior.config.c_cond}")
    with explain_errors(
        "--pretrained_image_encoder_name_or_path", args.pretrained_image_encoder_name_or_path
    ):
        channels = image_encoder.config.c_latent
        if channels != prior.config.c_in:
            raise ValueError(f"it has c_latent={channels} channels, but the prior c_in={prior.config.c_in}")
    prior.set_attn_processor(AttnProcessor2_0())  # the same attention, by PyTorch's memory-efficient kernel
    if args.gradient_checkpointing:
        prior.enable_gradient_checkpointing()
    return prior


def load_ema(
    args: argparse.Namespace, prior: wuerstchen.WuerstchenPrior, checkpoint: Path | None, device: torch.device
) -> EMAModel | None:
    """The average of the prior's weights (decay 0.9999, ramp-up) on every rank, new or the checkpoint's, in
    the device's memory or, with --offload_ema, in main memory."""
    if not args.use_ema:
        return None
    if checkpoint is None:
        model = {"model_cls": type(prior), "model_config": prior.config}
        ema_prior = EMAModel(prior.parameters(), foreach=True, **model)
    elif (checkpoint / "prior_ema").is_dir():
        ema_prior = EMAModel.from_pretrained(checkpoint / "prior_ema", type(prior), foreach=True)
    else:
        raise SystemExit(f"--use_ema: {checkpoint} has no prior_ema/, since its run did not use --use_ema")
    ema_prior.to("cpu" if args.offload_ema else device)
    return ema_prior


def update_ema(ema_prior: EMAModel | None, prior: torch.nn.Module):
    """Moves the average, if there is one, towards the prior's weights, on the device of the average."""
    if ema_prior is not None:
        device = ema_prior.shadow_params[0].device
        # Whether a weight is trained decides whether it is averaged.
        weights = [p.detach().to(device).requires_grad_(p.requires_grad) for p in prior.parameters()]
        ema_prior.step(weights)


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


def load_noise_scheduler(device: torch.device) -> DDPMWuerstchenScheduler:
    """The cosine schedule, with its constants on the device, which avoids a host sync per call."""
    noise_scheduler = DDPMWuerstchenScheduler()
    noise_scheduler.s = noise_scheduler.s.to(device)
    noise_scheduler._init_alpha_cumprod = noise_scheduler._init_alpha_cumprod.to(device)
    return noise_scheduler


def make_optimizer(prior: torch.nn.Module, args: argparse.Namespace, device: torch.device):
    """The optimizer of the prior's trainable parameters. All three decay weights apart from the gradients."""
    settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as optimizer_cls
    elif args.optimizer == "adafactor":
        from transformers import Adafactor as optimizer_cls

        # The learning rate is the schedule's alone, as for AdamW.
        settings = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    else:
        optimizer_cls = torch.optim.AdamW
        settings["fused"] = device.type in ("cuda", "cpu", "mps", "xpu")
    return optimizer_cls(
        [parameter for parameter in prior.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        weight_decay=args.adam_weight_decay,
        **settings,
    )


def make_lr_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace, global_step: int):
    """The learning rate as a function of the step, from `global_step` on. The flags of this run apply, not
    what a checkpoint's optimizer remembers."""
    for group in optimizer.param_groups:
        group.update(optimizer.defaults, initial_lr=args.learning_rate)
    # A step that fp16's gradient scaler skips counts, too. PyTorch warns if the first one is skipped.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        step_rules=args.lr_step_rules,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        last_epoch=global_step - 1,
    )


def check_finite(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    loss: float,
    grad_norm: float,
    rows: list[int],
    timesteps: list[torch.Tensor],
):
    """Ends the run before a loss or gradient that is not finite reaches the weights.

    In fp16 an overflow is normal: the gradient scaler skips the step and halves its scale, until there is
    none left.
    """
    if accelerator.scaler is None:
        diverged = not math.isfinite(loss + grad_norm)
    else:
        diverged = accelerator.scaler.get_scale() < MIN_LOSS_SCALE
    if diverged:
        raise SystemExit(
            f"stopped before step {step}: loss {loss}, gradient norm {grad_norm}, rows {rows}, timesteps "
            f"{torch.cat(timesteps).tolist()}; {describe_last(output_dir)}"
        )


def check_finite_weights(prior: torch.nn.Module, output_dir: Path, step: int):
    """Ends the run before weights that an optimizer step made overflow are saved."""
    norms = torch._foreach_norm([parameter.detach() for parameter in prior.parameters()])
    if not torch.stack(norms).isfinite().all():
        raise SystemExit(f"stopped after step {step}: weights are not finite; {describe_last(output_dir)}")


def describe_last(output_dir: Path) -> str:
    """Names the newest checkpoint for a message."""
    names = [path.name for path in list_checkpoints(output_dir)]
    return f"the last good checkpoint: {names[-1] if names else 'none'}"


# -------------------------------------------------------------------------------------------------- diffusion
def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Normalizes (B, 3, H, W) uint8 RGB by ImageNet's mean and deviation, to float32. With scalars, since
    torchvision's function copies tensors of three numbers to the device, a host sync per call."""
    channels = zip(pixels.unbind(dim=1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel.float() / 255 - mean) / std for channel, mean, std in channels], dim=1)


@torch.no_grad()
def embed_captions(tokens: dict[str, torch.Tensor], text_encoder: CLIPTextModel) -> torch.Tensor:
    """Embeds tokenized captions, (B, 77) to (B, 77, width): the text encoder's last hidden state."""
    tokens = send_to_device(tokens, text_encoder.device)
    return text_encoder(tokens["text_input_ids"], attention_mask=tokens["text_mask"]).last_hidden_state


@torch.no_grad()
def embed_images(pixels: torch.Tensor, image_encoder: EfficientNetEncoder) -> torch.Tensor:
    """The latents of images, (B, 3, H, W) uint8 to (B, 16, H / 32, W / 32)."""
    pixels = normalize_pixels(pixels.to(image_encoder.device))
    return image_encoder(pixels.to(image_encoder.dtype))


def embed_prompts(prompts: list[str], tokenizer: CLIPTokenizerFast, text_encoder: CLIPTextModel) -> list:
    """The embedding of each prompt by itself, (1, 77, width)."""
    return [embed_captions(tokenize_captions([prompt], tokenizer), text_encoder) for prompt in prompts]


def encode_batch(batch: dict, text_encoder, image_encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """The images' latents, (B, 16, H / 32, W / 32), and the embeddings of the captions, (B, 77, width)."""
    if "latents" in batch:  # --cache_latents
        return batch["latents"], batch["prompt_embeds"]
    tokens = {name: batch[name] for name in ("text_input_ids", "text_mask")}
    return embed_images(batch["effnet_pixel_values"], image_encoder), embed_captions(tokens, text_encoder)


def sample_noise(
    positions: list[int], shape: Sequence[int], device: torch.device, *key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal noise, (B, *shape), and uniform random numbers in [0, 1), (B,), both float32.

    Those of a sample follow from its position and `key`, on any device and number of processes.
    """
    noise, uniform = [], []
    for position in positions:
        generator = torch.Generator().manual_seed(derive_seed(*key, position))
        noise.append(torch.randn(shape, generator=generator))
        uniform.append(torch.rand((), generator=generator))
    noise, uniform = torch.stack(noise), torch.stack(uniform)
    if device.type == "cuda":  # other memory is copied synchronously
        noise, uniform = noise.pin_memory(), uniform.pin_memory()
    return noise.to(device, non_blocking=True), uniform.to(device, non_blocking=True)


def seed_dropout(seed: int, device: torch.device):
    """Seeds the default generators of the CPU and the device. `torch.manual_seed` would do so, too, and for
    each kind of device that is not there it formats a stack trace: 0.3 ms a micro-step."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


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

    "p2" weights it by 1 / (1 + SNR) = 1 - alpha_bar(t): P2 weighting (arXiv:2204.00227) with k = gamma = 1,
    as in Würstchen's original training.
    """
    image_embeds = (latents.float() + LATENT_STD) / LATENT_MEAN
    noisy_latents = noise_scheduler.add_noise(image_embeds, noise, timesteps)
    pred_noise = prior(noisy_latents, timesteps, prompt_embeds)
    losses = F.mse_loss(pred_noise.float(), noise, reduction="none").mean(dim=(1, 2, 3))
    if weighting == "p2":
        zeros, ones = torch.zeros_like(timesteps), torch.ones_like(timesteps)
        losses = losses * noise_scheduler.add_noise(zeros, ones, timesteps) ** 2  # 1 - alpha_bar(t)
    return losses


def reduce_metrics(
    accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, stop: bool
) -> tuple[float, float, bool]:
    """The mean loss over the ranks, the gradient norm, and whether any rank should stop, with one all-reduce
    and one transfer from the device. (`accelerator.check_trigger` would need another of both.)"""
    reduced = accelerator.reduce(torch.stack([loss, torch.full_like(loss, float(stop))]), "mean")
    loss, stop, grad_norm = torch.cat([reduced, grad_norm.to(reduced)[None]]).tolist()
    return loss, grad_norm, stop > 0


# ------------------------------------------------------------------------------------------------- validation
def is_validation_due(global_step: int, args: argparse.Namespace, plan: SamplePlan) -> bool:
    """Whether to validate: before the first step, and then every --validation_steps, or after the first epoch
    and every --validation_epochs from there."""
    if global_step == 0:
        return True
    if args.validation_steps is not None:
        return global_step % args.validation_steps == 0
    epochs_before = (global_step - 1) * plan.samples_per_step // plan.num_rows
    epochs_after = global_step * plan.samples_per_step // plan.num_rows
    return any(epoch % args.validation_epochs == 0 for epoch in range(epochs_before, epochs_after))


def load_decoder(args: argparse.Namespace, dtype: torch.dtype) -> wuerstchen.WuerstchenDecoderPipeline:
    """The pipeline that decodes the prior's latents to images. Its components are loaded by their own
    classes, since those that its model_index.json names could be code in the folder."""
    source = args.pretrained_decoder_model_name_or_path
    location = {"cache_dir": args.cache_dir}
    config = wuerstchen.WuerstchenDecoderPipeline.load_config(source, **location)
    half = location | {"torch_dtype": dtype}
    return wuerstchen.WuerstchenDecoderPipeline(
        tokenizer=CLIPTokenizerFast.from_pretrained(source, subfolder="tokenizer", **location),
        text_encoder=CLIPTextModel.from_pretrained(source, subfolder="text_encoder", dtype=dtype, **location),
        decoder=wuerstchen.WuerstchenDiffNeXt.from_pretrained(source, subfolder="decoder", **half),
        scheduler=DDPMWuerstchenScheduler.from_pretrained(source, subfolder="scheduler", **location),
        vqgan=wuerstchen.PaellaVQModel.from_pretrained(source, subfolder="vqgan", **half),
        latent_dim_scale=config.get("latent_dim_scale", 10.67),
    )


def decoder_image_size(decoder_pipeline: wuerstchen.WuerstchenDecoderPipeline, resolution: float) -> int:
    """The side in pixels of the image that latents trained at `resolution` stand for: 1024 for 768.

    The decoder's own latents are `latent_dim_scale` times as many, and it halves them level by level, so not
    every side is possible. The nearest one is taken.
    """
    config = decoder_pipeline.decoder.config
    scale = decoder_pipeline.config.latent_dim_scale
    divisor = config.patch_size * 2 ** (len(config.c_hidden) - 1)
    trained_side = math.ceil(resolution / STRIDE)
    sides = [side for side in range(1, trained_side + 2 * divisor) if int(side * scale) % divisor == 0]
    return int(min(sides, key=lambda side: abs(side - trained_side)) * RESOLUTION_MULTIPLE)


def validation_images(args: argparse.Namespace) -> list[tuple[int, tuple[int, int] | None]]:
    """What is generated: the index of each image's prompt, and its width and height. None is the size of the
    latents trained at --resolution, with which all prompts come first."""
    pixels = args.validation_size or []
    sizes = [None, *zip(pixels[::2], pixels[1::2], strict=True)]
    return [(index, size) for size in sizes for index in range(len(args.validation_prompts or []))]


@dataclass
class Validator:
    """Generates images for the validation prompts and computes the held-out loss: without dropout, with
    averaged weights if there are any, and with the same noise every time, apart from the training's."""

    accelerator: Accelerator
    args: argparse.Namespace
    prior: wuerstchen.WuerstchenPrior
    ema_prior: EMAModel | None
    noise_scheduler: DDPMWuerstchenScheduler
    encode: Callable[[dict], tuple[torch.Tensor, torch.Tensor]]
    empty_embeds: torch.Tensor
    prompt_embeds: list[torch.Tensor]
    held_out_dataloader: DataLoader | None
    signals: list[int]
    skipped_rows: set[int] = field(default_factory=set)
    decoder: wuerstchen.WuerstchenDecoderPipeline | None = None  # loaded when it is first needed

    def log_validation(self, global_step: int):
        """Validates and logs the results, unless the run that this one resumes has done so at this step."""
        output_dir = Path(self.args.output_dir)
        wait_for_slow_ranks(self.accelerator)  # the first one may be saving the result
        if not self.is_done(global_step):
            self.prior.eval()
            with ema_weights(self.prior, self.ema_prior):
                images = self.generate_images(global_step) if self.prompt_embeds else []
                losses = self.compute_held_out_loss() if self.held_out_dataloader is not None else {}
            self.prior.train()
            if losses:
                logger.info(f"Held-out loss at step {global_step}: {losses['val_loss']:.4f}")
            if self.accelerator.is_main_process:
                log_images(self.accelerator, self.args, images, global_step)
            log_metrics(self.accelerator, losses, global_step)  # last: `is_done` looks for them
        if self.accelerator.is_main_process:
            save_loss_curve(output_dir)

    def is_done(self, global_step: int) -> bool:
        """Whether there is nothing left to do at this step."""
        output_dir = Path(self.args.output_dir)
        if self.held_out_dataloader is not None:
            done = any(row["step"] == global_step for row in read_metrics(output_dir, "val_loss"))
        elif self.prompt_embeds:
            done = sample_file(output_dir, global_step, *validation_images(self.args)[-1]).exists()
        else:
            done = True
        return broadcast_object_list([done])[0]

    @torch.no_grad()
    def generate_images(self, global_step: int) -> list[Image.Image]:
        """The `validation_images`, shared out among the ranks; none, and a warning, if one fails."""
        device, is_main_process = self.accelerator.device, self.accelerator.is_main_process
        wanted = validation_images(self.args)
        images, errors = [], []
        try:  # nothing in here may wait for other ranks
            if self.decoder is None:
                self.decoder = load_decoder(self.args, self.empty_embeds.dtype)
                self.decoder.set_progress_bar_config(disable=True)
                for size in {size for _, size in wanted if size is not None}:
                    nearest = self.find_image_size(size)
                    if size != nearest:
                        logger.warning(f"--validation_size: the decoder makes {nearest} of {size}")
            self.decoder.to(device)
            with self.accelerator.split_between_processes(wanted) as own_share:
                progress = tqdm(own_share, "Images", leave=False, disable=not is_main_process)
                images = [self.generate_image(index, size) for index, size in progress]
        except Exception as error:
            is_memory_error = "out of memory" in str(error)
            advice = " (a smaller --train_batch_size leaves more memory)" if is_memory_error else ""
            errors.append(f"{type(error).__name__}: {error}{advice}")
        if self.decoder is not None and device.type != "cpu":
            self.decoder.to("cpu")
            torch.cuda.empty_cache()
        wait_for_slow_ranks(self.accelerator)  # one may have another image to generate
        images, errors = gather_object(images), gather_object(errors)
        if errors:
            logger.warning(f"No validation images at step {global_step}: {errors[0]}")
            return []
        return images[: len(wanted)]

    def find_image_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """The width and height that the decoder supports: nearest to `size`, or of the trained latents."""
        if size is None:
            return (decoder_image_size(self.decoder, self.args.resolution),) * 2
        resolutions = [pixels * STRIDE / RESOLUTION_MULTIPLE for pixels in size]
        return tuple(decoder_image_size(self.decoder, resolution) for resolution in resolutions)

    def generate_image(self, index: int, size: tuple[int, int] | None) -> Image.Image:
        """Generates an image of a prompt as the published pipelines do, from the same noise every time."""
        # The pipeline takes its dtype from the text encoder, for which the prior stands in: in half precision
        # the timesteps would be others than in training, and the text encoder may have been freed.
        pipeline = wuerstchen.WuerstchenPriorPipeline(None, self.prior, self.prior, self.noise_scheduler)
        pipeline.set_progress_bar_config(disable=True)
        width, height = self.find_image_size(size)
        prompt = self.args.validation_prompts[index]
        generator = torch.Generator().manual_seed(self.args.seed)
        with self.accelerator.autocast():
            latents = pipeline(
                height=height,
                width=width,
                prompt_embeds=self.prompt_embeds[index],
                negative_prompt_embeds=self.empty_embeds,
                timesteps=wuerstchen.DEFAULT_STAGE_C_TIMESTEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=generator,
            ).image_embeddings
            return self.decoder(latents, prompt, guidance_scale=0.0, generator=generator).images[0]

    @torch.no_grad()
    def compute_held_out_loss(self) -> dict[str, float]:
        """The mean loss of the held-out rows, in total and for each band of timesteps. A row's noise follows
        from its number, and the rows' timesteps divide [0, 1) evenly."""
        device, is_main_process = self.accelerator.device, self.accelerator.is_main_process
        num_rows, num_batches = len(self.held_out_dataloader.dataset.rows), len(self.held_out_dataloader)
        sums = torch.zeros(2, NUM_LOSS_BANDS, device=device)  # of losses and of samples
        seed = self.args.seed
        batches = iterate_batches(self.held_out_dataloader, device, self.skipped_rows, self.signals)
        for batch in tqdm(batches, "Held-out loss", num_batches, leave=False, disable=not is_main_process):
            latents, prompt_embeds = self.encode(batch)
            noise, _ = sample_noise(batch["positions"], latents.shape[1:], device, seed, "held out")
            timesteps = (torch.tensor(batch["positions"], device=device) + 0.5) / num_rows
            inputs = (self.prior, self.noise_scheduler, latents, prompt_embeds, noise, timesteps)
            with self.accelerator.autocast():
                losses = diffusion_loss(*inputs, self.args.loss_weighting)
            bands = (timesteps * NUM_LOSS_BANDS).long()
            sums.index_add_(1, bands, torch.stack([losses, torch.ones_like(losses)]))
        losses, counts = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {"val_loss": sum(losses) / sum(counts)}
        for band in range(NUM_LOSS_BANDS):
            if counts[band]:
                metrics[f"val_loss_t{band / NUM_LOSS_BANDS}"] = losses[band] / counts[band]
        return metrics


# ------------------------------------------------------------------------------------------------ checkpoints
STATE_FILE = "trainer_state.json"  # written last into a checkpoint
# The folders of a result: the text-to-image pipeline at the root of --output_dir, the prior's own, shared
# components.
RESULT_FOLDERS = ["prior_pipeline", "prior_prior", "prior_text_encoder", "prior_tokenizer", "prior_scheduler"]
RESULT_FOLDERS += ["decoder", "vqgan", "text_encoder", "tokenizer", "scheduler"]
RESULT_FILES = ["model_index.json", "README.md", "grid.png"]
LOG_FILES = ["loss.jsonl", "loss.png", "samples"]
# Names under which something is written or deleted, so that a crash leaves nothing that looks complete.
TEMPORARY = re.compile(r"\.checkpoint-\d+\.(partial|deleted)|\.result\.partial|\.shared-\d+")

# How versions before 2026-11-25 named the fields of TrainState and SamplePlan. They had no hash of all rows.
OLD_FIELD_NAMES = {"run_id": "wandb_run_id", "rows": "num_rows", "processes": "num_processes"}


@dataclass
class TrainState:
    """What a checkpoint contains besides weights, optimizer and random states."""

    global_step: int = 0
    plan: dict | None = None  # the fields of SamplePlan; None in a new run, whose data are not loaded yet
    settings: dict | None = None  # the flags of the run that wrote it
    wandb_run_id: str = field(default_factory=lambda: f"{random.getrandbits(40):010x}")


def sample_digest(file: Path) -> str:
    """A hash of the first 4 KB of each MB of a file, which costs far less than to write it. Other weights
    differ in all of them."""
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as content:
        for offset in range(0, file.stat().st_size, 2**20):
            content.seek(offset)
            digest.update(content.read(4096))
    return digest.hexdigest()


def is_complete(checkpoint: Path) -> bool:
    """Whether all files that the checkpoint lists exist with their sizes, as not in a partial copy."""
    try:
        files = json.loads((checkpoint / STATE_FILE).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def is_intact(checkpoint: Path) -> bool:
    """Whether a complete checkpoint's files have the content that was written."""
    digests = json.loads((checkpoint / STATE_FILE).read_text()).get("digests", {})
    return all(sample_digest(checkpoint / name) == digest for name, digest in digests.items())


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = output_dir.resolve().glob("checkpoint-*")
    found = [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name) and is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume: the newest usable one for "latest", or that path. None starts a new run."""
    if resume_from is None:
        return None
    if resume_from != "latest":
        for path in (Path(resume_from), output_dir / resume_from):
            if is_complete(path):
                if not is_intact(path):
                    raise SystemExit(f"--resume_from_checkpoint={resume_from}: its files were changed")
                return path.resolve()
        raise SystemExit(f"--resume_from_checkpoint={resume_from}: there is no complete checkpoint there")
    checkpoints = list_checkpoints(output_dir)
    for path in sorted(set(output_dir.resolve().glob("checkpoint*")) - set(checkpoints)):
        logger.warning(f"Ignored {path}: it is not a complete checkpoint")
    for checkpoint in reversed(checkpoints):
        if is_intact(checkpoint):
            return checkpoint
        logger.warning(f"Ignored {checkpoint}: its files were changed")
    logger.info(f"--resume_from_checkpoint=latest: there is none in {output_dir}, so this is a new run")
    return None


def find_stale_checkpoints(output_dir: Path, checkpoint: Path | None, overwrite: bool) -> list[Path]:
    """The checkpoints in the output folder that this run does not resume: another run's, or newer ones.
    Unless they may be deleted, they are an error, since the checkpoints of two runs would be mixed."""
    stale = list_checkpoints(output_dir)
    if checkpoint in stale:
        stale = stale[stale.index(checkpoint) + 1 :]
    if stale and not overwrite:
        raise SystemExit(
            f"--output_dir={output_dir} contains {stale[-1].name} of an earlier run: "
            "--resume_from_checkpoint=latest continues it, --overwrite_output_dir deletes it"
        )
    return stale


def check_output_dir(args: argparse.Namespace, checkpoint: Path | None) -> list[Path]:
    """Refuses a folder in which this run would replace what it did not write: a new run any of the names that
    it writes, one that `latest` starts anew only a result, since its first attempt may have left logs.
    Returns the checkpoints to delete."""
    output_dir = Path(args.output_dir)
    stale_checkpoints = find_stale_checkpoints(output_dir, checkpoint, args.overwrite_output_dir)
    is_own = checkpoint is not None and checkpoint.parent == output_dir.resolve()
    if is_own or args.overwrite_output_dir:
        return stale_checkpoints
    names = RESULT_FOLDERS + RESULT_FILES
    if args.resume_from_checkpoint != "latest":
        names = names + LOG_FILES + [args.logging_dir]
    found = [name for name in names if (output_dir / name).exists()]
    if found:
        raise SystemExit(
            f"--output_dir={output_dir} contains {', '.join(found)}, which this run would replace: choose "
            "another folder, --resume_from_checkpoint=latest to continue a run with checkpoints there, or "
            "--overwrite_output_dir to replace them"
        )
    return stale_checkpoints


def load_train_state(checkpoint: Path | None, stale_checkpoints: list[Path], output_dir: Path) -> TrainState:
    """Where the run starts: at the checkpoint, or at step 0."""
    state = TrainState()
    if checkpoint is not None:
        saved = json.loads((checkpoint / STATE_FILE).read_text())
        saved = {OLD_FIELD_NAMES.get(name, name): value for name, value in saved.items()}
        state.global_step = saved["global_step"]
        state.plan = {OLD_FIELD_NAMES.get(name, name): value for name, value in saved["plan"].items()}
        state.settings = saved.get("settings")
        # wandb ignores steps that a run has had already, so a branch is a new run.
        is_branch = stale_checkpoints or checkpoint.parent != output_dir.resolve()
        if not is_branch:
            state.wandb_run_id = saved.get("wandb_run_id", state.wandb_run_id)
    if broadcast_object_list([state.global_step])[0] != state.global_step:
        raise SystemExit(f"--output_dir={output_dir}: the nodes see different checkpoints; share the folder")
    return state


def check_same_plan(plan: SamplePlan, state: TrainState, checkpoint: Path | None):
    """Refuses to resume a run with other samples, since they would not continue. The same samples a step may
    be split up otherwise into processes, accumulation and, without buckets, micro-batches."""
    if state.plan is None:
        return
    known = {name: value for name, value in state.plan.items() if name in asdict(plan)}
    saved = SamplePlan(**asdict(plan) | {"bucket_rows": {}} | known)  # older versions lacked some
    compared = ["seed", "num_rows", "rows_hash", "bucket_rows", "samples_per_step"]
    if plan.bucket_rows:
        compared.append("train_batch_size")
    for name in compared:
        old, new = getattr(saved, name), getattr(plan, name)
        if old != new:
            difference = f"{name}={old}, this one {new}"
            if name == "rows_hash":
                difference = "other images or captions"
            elif name == "samples_per_step":
                difference = f"{saved.describe_step()}, this one {plan.describe_step()}"
            raise SystemExit(f"{checkpoint} cannot be resumed exactly: its run had {difference}")


def report_settings(args: argparse.Namespace, plan: SamplePlan, state: TrainState, checkpoint: Path | None):
    """Logs sizes that are possible but rarely meant, and which flags differ from those of the run that is
    resumed. Another optimizer is an error."""
    if args.resolution % STRIDE:
        side = math.ceil(args.resolution / STRIDE)
        as_with = f"images become {side} x {side} latents, as with {side * STRIDE}"
        logger.warning(f"--resolution={args.resolution} is not a multiple of {STRIDE}: {as_with}")
    if plan.samples_per_step > plan.num_rows:
        logger.warning(
            f"There are fewer rows, {plan.num_rows}, than samples in a step, {plan.samples_per_step}: "
            "each step has some of them more than once"
        )
    if state.global_step >= args.max_train_steps:
        logger.info(f"{checkpoint}: nothing is left to train, only to save")
    if state.settings is None:
        return
    used = state.settings.get("optimizer")
    if used is None:  # older versions had --use_8bit_adam only
        used = "adamw8bit" if state.settings["use_8bit_adam"] else "adamw"
    if used != args.optimizer:
        raise SystemExit(f"--optimizer={args.optimizer}: {checkpoint} is of a run with --optimizer={used}")
    changed = []
    for name, value in public_settings(args).items():
        if name in state.settings and state.settings[name] != value:
            changed.append(f"--{name}={value} (was {state.settings[name]})")
    if changed:
        logger.warning(f"Changed since {checkpoint.name}: {', '.join(changed)}")


def register_checkpoint_hooks(accelerator: Accelerator, ema_prior: EMAModel | None):
    """Makes `save_state` write the prior and its average in diffusers' format, and `load_state` skip them."""

    def save_prior(models: list, weights: list, folder: str):
        weights.clear()
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save_pretrained(os.path.join(folder, "prior"))
            if ema_prior is not None:
                ema_prior.save_pretrained(os.path.join(folder, "prior_ema"))

    def skip_prior(models: list, folder: str):
        models.clear()  # `load_prior` has loaded it from there

    accelerator.register_save_state_pre_hook(save_prior)
    accelerator.register_load_state_pre_hook(skip_prior)


def save_checkpoint(accelerator: Accelerator, output_dir: Path, state: TrainState, limit: int | None) -> bool:
    """Writes checkpoint-N under a temporary name, flushes and renames it, then deletes those over the limit.

    If that fails, say on a full disk, the older checkpoints remain, the run continues, and the result is
    False.
    """
    checkpoint = output_dir / f"checkpoint-{state.global_step}"
    partial = output_dir / f".{checkpoint.name}.partial"
    error_text = ""
    try:
        accelerator.save_state(str(partial))  # on every rank, since each has random states of its own
    except Exception as error:
        error_text = str(error) or type(error).__name__
    wait_for_slow_ranks(accelerator)
    errors = [text for text in gather_object([error_text]) if text]
    saved = False
    if accelerator.is_main_process:
        try:
            if errors:
                raise OSError(errors[0])
            write_state_file(partial, state)
            for path in [*partial.rglob("*"), partial]:
                flush_to_disk(path)
            delete(checkpoint)  # an incomplete one
            partial.rename(checkpoint)
            flush_to_disk(output_dir)
            saved = True
            logger.info(f"Saved {checkpoint}")
            if limit is not None:
                delete_checkpoints(list_checkpoints(output_dir)[:-limit], output_dir)
        except OSError as error:
            if saved:
                logger.error(f"Old checkpoints could not be deleted: {error}")
            else:
                logger.error(f"{checkpoint} could not be written, the run continues without it: {error}")
                shutil.rmtree(partial, ignore_errors=True)
    wait_for_slow_ranks(accelerator)
    return broadcast_object_list([saved])[0]


def write_state_file(folder: Path, state: TrainState):
    """Writes the state and a list of the checkpoint's files, with which it is complete."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    digests = {str(path.relative_to(folder)): sample_digest(path) for path in files}
    content = asdict(state) | {"files": sizes, "digests": digests}
    (folder / STATE_FILE).write_text(json.dumps(content, indent=2))


def flush_to_disk(path: Path):
    """Returns when a file's or folder's content would survive a power failure."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # some network file systems cannot flush folders
                raise
        finally:
            os.close(descriptor)


def delete(path: Path):
    """Deletes a folder, a file or a link, but not what the link refers to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_checkpoints(checkpoints: list[Path], output_dir: Path):
    """Deletes checkpoints. They are renamed first, so that what a crash leaves is not taken for a checkpoint;
    such remains of this and of earlier runs are deleted, too."""
    for checkpoint in checkpoints:
        checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.deleted"))
    for path in output_dir.iterdir():
        if TEMPORARY.fullmatch(path.name):
            delete(path)


def stop_training(accelerator: Accelerator, output_dir: Path, saved: bool, status: int):
    """Ends the process with the signal's status or, if the checkpoint could not be saved, with EX_IOERR
    (74)."""
    if saved:
        logger.info("Stopped; the same command with --resume_from_checkpoint=latest continues")
    else:
        logger.error(f"Stopped, but the checkpoint could not be saved; {describe_last(output_dir)}")
    end_training(accelerator)
    sys.exit(status if saved else 74)


# ---------------------------------------------------------------------------------------------------- logging
WARNED: set[str] = set()


@contextlib.contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Logs an error of something that is only shown, such as a curve, once, instead of ending the run."""
    try:
        yield
    except Exception as error:
        if what not in WARNED:
            WARNED.add(what)
            logger.warning(
                f"{what} failed, the run continues: {type(error).__name__}: {printable(str(error))}"
            )


def log_metrics(accelerator: Accelerator, metrics: dict[str, float], global_step: int):
    """Passes metrics to the trackers and appends them to loss.jsonl, one line a step."""
    with only_warn("Logging to the trackers"):
        accelerator.log(metrics, step=global_step)
    if accelerator.is_main_process and metrics:
        with only_warn("Writing loss.jsonl"), open(Path(accelerator.project_dir, "loss.jsonl"), "a") as file:
            file.write(json.dumps({"step": global_step} | metrics) + "\n")


def read_metrics(
    output_dir: Path, name: str | None = None, max_rows: int | None = None
) -> list[dict[str, float]]:
    """The lines of loss.jsonl, all or those with the metric `name`, and of these about `max_rows` evenly
    spaced ones. Without lines that a crash truncated. Older versions called a step an update."""
    file = output_dir / "loss.jsonl"
    if not file.exists():
        return []
    with open(file, errors="replace") as lines:
        lines = [line for line in lines if name is None or f'"{name}"' in line]
    if max_rows is not None and len(lines) > max_rows:
        lines = lines[:: math.ceil(len(lines) / max_rows)]
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "update" in row:
                row = {"step": row.pop("update")} | row
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def sample_file(output_dir: Path, global_step: int, index: int, size: tuple[int, int] | None = None) -> Path:
    """The file of one of the `validation_images`."""
    suffix = f"-{size[0]}x{size[1]}" if size else ""
    return output_dir / "samples" / f"step-{global_step:07d}-prompt-{index}{suffix}.png"


def list_sample_steps(output_dir: Path) -> list[int]:
    """The steps for which there are images in samples/."""
    files = (output_dir / "samples").glob("step-*-prompt-*.png")
    return sorted({int(file.name.split("-")[1]) for file in files})


def truncate_logs(output_dir: Path, global_step: int):
    """Removes from loss.jsonl and samples/ what a run that continues after `global_step` writes again."""
    rows = [row for row in read_metrics(output_dir) if row["step"] <= global_step]
    partial = output_dir / ".loss.jsonl"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(output_dir / "loss.jsonl")
    samples = output_dir / "samples"
    for file in samples.glob("update-*-prompt-*.png"):  # as older versions named them
        file.rename(samples / file.name.replace("update", "step", 1))
    for file in samples.glob("step-*-prompt-*.png"):
        if int(file.name.split("-")[1]) > global_step:
            file.unlink()


def log_images(
    accelerator: Accelerator, args: argparse.Namespace, images: list[Image.Image], global_step: int
):
    """Logs images and their prompts to each tracker and to samples/."""
    if not images:
        return
    generated = validation_images(args)
    prompts = [args.validation_prompts[index] for index, _ in generated]
    captioned = list(zip(prompts, images, strict=True))
    for tracker in accelerator.trackers:
        with only_warn(f"Logging images to {tracker.name}"):
            log_images_to_tracker(tracker, captioned, global_step)
    output_dir = Path(args.output_dir)
    with only_warn("Writing samples/"):
        for (prompt, image), image_of in zip(captioned, generated, strict=True):
            text = PngInfo()
            text.add_itxt("prompt", prompt)
            text.add_itxt("settings", public_args(args))
            text.add_itxt("prior_guidance_scale", str(GUIDANCE_SCALE))
            file = sample_file(output_dir, global_step, *image_of)
            file.parent.mkdir(exist_ok=True)
            partial = file.with_name("partial.png")  # renamed when it is complete
            image.save(partial, pnginfo=text)
            partial.rename(file)
        sizes = list(dict.fromkeys(size for _, size in generated))
        save_contact_sheet(output_dir, args.validation_prompts, sizes)


def log_images_to_tracker(tracker, captioned: list[tuple[str, Image.Image]], global_step: int):
    """Logs pairs of prompts and images. Add trackers here: Accelerate's own `log_images` has no captions."""
    if tracker.name == "tensorboard":
        for index, (prompt, image) in enumerate(captioned):
            name, pixels = f"validation/{index}", np.asarray(image)[None]
            tracker.log_images({name: pixels}, step=global_step, dataformats="NHWC")
            tracker.log({name: prompt}, step=global_step)
    elif tracker.name == "wandb":
        wandb = importlib.import_module("wandb")
        logged = [wandb.Image(image, caption=prompt) for prompt, image in captioned]
        tracker.log({"validation": logged}, step=global_step)
    elif tracker.name == "trackio":
        trackio = importlib.import_module("trackio")
        for index, (prompt, image) in enumerate(captioned):  # it ignores lists of images
            tracker.log({f"validation/{index}": trackio.Image(image, caption=prompt)}, step=global_step)
    elif tracker.name == "comet_ml":
        for prompt, image in captioned:
            tracker.tracker.log_image(image, name=prompt, step=global_step)
    else:
        logger.warning(f"{tracker.name} does not get the validation images; they are in samples/")


def save_contact_sheet(
    output_dir: Path,
    prompts: list[str],
    sizes: Sequence[tuple[int, int] | None] = (None,),
    max_columns: int = 12,
    max_images: int = 256,  # to read each takes 50 ms
    cell: int = 192,
):
    """Writes samples/contact-sheet.png: prompts of each size down, steps across, the first and the last among
    them. Of many prompts there are fewer steps, but at least three."""
    rows = [(prompt, f"{size[0]}x{size[1]}" if size else "") for size in sizes for prompt in prompts]
    steps = list_sample_steps(output_dir)
    num_columns = min(len(steps), max_columns, max(3, max_images // len(rows)))
    columns = np.linspace(0, len(steps) - 1, num_columns).round().astype(int)
    steps = [steps[column] for column in columns]
    blank, cells = Image.new("RGB", (cell, cell), "white"), {}
    for step in steps:
        for file in (output_dir / "samples").glob(f"step-{step:07d}-prompt-*.png"):
            size = "".join(file.stem.split("-")[4:])
            with Image.open(file) as image:  # by its own prompt: a run may be resumed with others
                padded = ImageOps.pad(image, (cell, cell), color="white")
                cells[image.info.get("prompt"), size, step] = padded
    images = [cells.get((*row, step), blank) for row in rows for step in steps]
    sheet = make_image_grid(images, rows=len(rows), cols=len(steps))
    figure = Figure(figsize=(sheet.width / 74, sheet.height / 74), dpi=96)  # the axes take 77 % of it
    axes = figure.subplots()
    axes.imshow(sheet)
    axes.set_xticks(cell * (np.arange(len(steps)) + 0.5), labels=[f"step {step}" for step in steps])
    wrapped = [textwrap.fill(prompt, 24, max_lines=9, placeholder=" ...") for prompt, _ in rows]
    labels = [f"{prompt}\n{size}".strip() for prompt, (_, size) in zip(wrapped, rows, strict=True)]
    axes.set_yticks(cell * (np.arange(len(rows)) + 0.5), labels=labels, parse_math=False)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    save_figure(figure, output_dir / "samples" / "contact-sheet.png")


def save_loss_curve(output_dir: Path):
    """Writes loss.png: the training loss and its running mean, and the held-out loss, by step."""
    with only_warn("Writing loss.png"):
        train_rows = read_metrics(output_dir, "train_loss", max_rows=MAX_CURVE_POINTS)
        held_out_rows = read_metrics(output_dir, "val_loss")
        train, held_out = (  # without those that overflowed in fp16
            [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
            for name, rows in (("train_loss", train_rows), ("val_loss", held_out_rows))
        )
        mean, means = 0.0, []
        for count, (_, loss) in enumerate(train, 1):
            mean += (loss - mean) * max(1 / count, 0.02)  # of all steps, and then of the last 50 or so
            means.append(mean)
        figure = Figure(figsize=(10, 5), dpi=100)
        axes = figure.subplots()
        axes.set(xlabel="step", ylabel="loss")
        if train:
            steps, losses = zip(*train, strict=True)
            marker = "o" if len(steps) == 1 else None  # a line of one point is invisible
            axes.plot(steps, losses, color="lightgray", marker=marker, label="training loss")
            axes.plot(steps, means, color="tab:blue", label="training loss, running mean")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color="tab:red", marker="o", label="held-out loss")
        if train or held_out:
            top = 1.2 * max([*means, *(loss for _, loss in held_out)])
            axes.set_ylim(0, top)  # the training loss of single steps may be larger
            axes.legend()
        save_figure(figure, output_dir / "loss.png")


def save_figure(figure: Figure, file: Path):
    """Writes a figure, without warnings about characters that matplotlib's font does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, bbox_inches="tight", pil_kwargs={"compress_level": 1})


# ------------------------------------------------------------------------------------------------- publishing
def save_components(components: dict, folder: Path):
    """Saves a pipeline's components; of a tokenizer also the files that transformers 4 reads."""
    for name, component in components.items():
        if isinstance(component, diffusers.ModelMixin):
            component.register_to_config(_name_or_path="")  # it would publish a local path
        component.save_pretrained(folder / name)
        if isinstance(component, CLIPTokenizerFast):
            component.backend_tokenizer.model.save(str(folder / name))  # vocab.json and merges.txt


def link_folder(source: Path, target: Path):
    """Makes `target` a second name of the same files, or a copy where the file system has no hard links."""
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except OSError:
        shutil.copytree(source, target, dirs_exist_ok=True)


def move_into_place(source: Path, target: Path):
    """Replaces `target` by `source`, which is complete. What was there is deleted afterwards."""
    old = source.with_name(f"old-{target.name}")
    if target.exists() or target.is_symlink():
        target.rename(old)
    source.rename(target)
    delete(old)


def save_pipeline(
    args: argparse.Namespace,
    prior: wuerstchen.WuerstchenPrior,
    tokenizer: CLIPTokenizerFast,
    noise_scheduler: DDPMWuerstchenScheduler,
) -> int | None:
    """Writes `prior_pipeline/` and then the whole pipeline at the root, all in float32. Each is complete in a
    temporary folder before it replaces an older result. Returns the side in pixels of the images, or None
    without a decoder."""
    output_dir = Path(args.output_dir)
    partial = output_dir / ".result.partial"
    prior_folder = partial / "prior_pipeline"
    with explain_errors("--output_dir", output_dir):
        delete(partial)
        text_encoder = load_text_encoder(args, torch.float32)  # the one in use may be in half precision
        components = {"prior": prior, "text_encoder": text_encoder}
        components |= {"tokenizer": tokenizer, "scheduler": noise_scheduler}
        save_components(components, prior_folder)
        wuerstchen.WuerstchenPriorPipeline(**components).save_config(prior_folder)  # model_index.json
        for name in components:
            link_folder(prior_folder / name, partial / f"prior_{name}")
        move_into_place(prior_folder, output_dir / "prior_pipeline")
    try:
        decoder = load_decoder(args, torch.float32)
        save_components(decoder.components, partial)
        prior_components = {f"prior_{name}": component for name, component in components.items()}
        pipeline = wuerstchen.WuerstchenCombinedPipeline(**decoder.components, **prior_components)
        pipeline.save_config(partial)
        for name in [*prior_components, *decoder.components, "model_index.json"]:
            move_into_place(partial / name, output_dir / name)
        delete(partial)
        return decoder_image_size(decoder, args.resolution)
    except Exception as error:
        logger.warning(f"{output_dir} will not load as a pipeline, only its prior_pipeline/: {error}")
        return None


MODEL_CARD = """
---
{{ card_data }}
---

# {{ repo_id }}

The Würstchen prior **{{ base_model }}**, fine-tuned on **{{ dataset }}**.
{% if has_images %}
{% for prompt in prompts %}* {{ prompt }}
{% endfor %}
![images of these prompts](grid.png)
{% endif %}
## How to use it

```python
import diffusers
import torch

if not hasattr(diffusers.pipelines, "wuerstchen"):  # from 0.38 on
    from diffusers.pipelines.deprecated import wuerstchen
    diffusers.pipelines.wuerstchen = wuerstchen

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
source = {{ source }}
pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(source, torch_dtype=dtype).to(device)
prompt = {{ prompt }}
size, guidance_scale = {{ size }}, {{ guidance_scale }}
image = pipeline(prompt, width=size, height=size, prior_guidance_scale=guidance_scale).images[0]
image.save("image.png")
```

The weights are float32. The prior alone, with its text encoder, is the pipeline in `prior_pipeline/`.

## How it was trained

For {{ global_step }} steps of {{ plan.samples_per_step }} samples, {{ epochs }} epochs of
{{ plan.num_rows }} rows, in {{ duration }} on {{ plan.num_processes }} x {{ device }}, with

```bash
{{ settings }}
```

![training loss](loss.png)
"""


def save_model_card(
    args: argparse.Namespace, image_size: int | None, global_step: int, plan: SamplePlan, device: torch.device
):
    """Writes README.md: what was trained on what, for how long and how, images, and code to generate more."""
    output_dir = Path(args.output_dir)
    prompts = args.validation_prompts or []
    base_model, dataset = args.pretrained_prior_model_name_or_path, args.dataset_name
    base_is_local = Path(base_model).exists()
    dataset_is_local = dataset is None or Path(dataset).exists()
    license_name = None
    with contextlib.suppress(Exception):  # there may be no card, or no connection to the Hub
        base_card = hub.ModelCard.load(Path(base_model, "README.md") if base_is_local else base_model)
        license_name = base_card.data.license
    files = [sample_file(output_dir, global_step, index) for index in range(len(prompts))]
    files = [file for file in files if file.exists()]
    if files:
        grid = make_image_grid([Image.open(file) for file in files], rows=1, cols=len(files))
        grid.save(output_dir / "grid.png")
    captioned = zip(prompts, files, strict=False)
    widget = [{"text": prompt, "output": {"url": f"samples/{file.name}"}} for prompt, file in captioned]
    card_data = hub.ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["wuerstchen", "text-to-image", "diffusers", "diffusers-training"],
        license=license_name,
        base_model=None if base_is_local else base_model,
        datasets=None if dataset_is_local else [dataset],
        widget=widget or None,
    )
    # A result that is not uploaded can be loaded from any folder, too.
    source = args.hub_model_id if args.push_to_hub else str(output_dir.resolve())
    card = hub.ModelCard.from_template(
        card_data,
        template_str=MODEL_CARD.lstrip(),
        repo_id=args.hub_model_id,
        source=json.dumps(source, ensure_ascii=False),
        base_model=Path(base_model).name if base_is_local else base_model,
        dataset="local images" if dataset_is_local else dataset,
        prompts=prompts,
        has_images=bool(files),
        prompt=json.dumps((prompts or ["a photo"])[0], ensure_ascii=False),
        size=image_size,
        guidance_scale=GUIDANCE_SCALE,
        global_step=global_step,
        plan=plan,
        epochs=f"{global_step * plan.samples_per_step / plan.num_rows:.1f}",
        duration=format_duration(sum(step_durations(output_dir, plan))),
        device=torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        settings=f"accelerate launch {Path(__file__).name} {public_args(args)}",
    )
    card.save(output_dir / "README.md")


def step_durations(output_dir: Path, plan: SamplePlan) -> list[float]:
    """The seconds of each logged step, also of those before the run was resumed."""
    speeds = [row["images_per_second"] for row in read_metrics(output_dir) if "images_per_second" in row]
    return [plan.samples_per_step / speed for speed in speeds]


def format_duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


@only_warn("The summary")
def log_summary(args: argparse.Namespace, global_step: int, plan: SamplePlan):
    """Says what a run that has ended has left where, and what can be done next."""
    output_dir = Path(args.output_dir)
    lines = [f"{global_step} steps"]
    durations = step_durations(output_dir, plan)
    if durations:
        speed = plan.samples_per_step / np.mean(durations)
        lines[0] += f" in {format_duration(sum(durations))}, {speed:.1f} images/s"
    losses = [(row["step"], row["val_loss"]) for row in read_metrics(output_dir, "val_loss")]
    if losses:
        values = [f"{loss:.4f} at step {step}" for step, loss in dict.fromkeys((losses[0], losses[-1]))]
        lines.append(f"held-out loss: {', '.join(values)}")
    lines.append(f"curve of the loss: {output_dir / 'loss.png'}")
    if list_sample_steps(output_dir):
        lines.append(f"images: {output_dir / 'samples' / 'contact-sheet.png'}")
    lines.append(f"result: {output_dir}, and how to generate images with it: {output_dir / 'README.md'}")
    resume = "the same command with --resume_from_checkpoint=latest and"
    lines.append(f"to train on: {resume} --max_train_steps={2 * global_step}")
    if args.push_to_hub:
        lines.append(f"published on the Hub as {args.hub_model_id}")
    else:
        lines.append(f"to publish: {resume} --push_to_hub")
    logger.info("\n  ".join(["Done", *lines]))


def push_to_hub(repo_id: str, output_dir: Path, global_step: int, token: str | None):
    """Uploads what a user of the model needs, and nothing else. During a Hub outage it is tried again."""
    patterns = ["README.md", "model_index.json", "grid.png", "loss.png", f"samples/step-{global_step:07d}-*"]
    patterns += [f"{folder}/*" for folder in RESULT_FOLDERS]
    for delay in (*PUSH_RETRY_DELAYS, None):
        try:
            # The prior's weights first: then their second copy is recognized and not sent again.
            files = output_dir.glob("prior_*/*/*.safetensors")
            weights = [hub.CommitOperationAdd(file.name, file) for file in files]
            hub.preupload_lfs_files(repo_id, weights, token=token)
            hub.upload_folder(
                repo_id=repo_id,
                folder_path=output_dir,
                allow_patterns=patterns,
                token=token,
                commit_message="End of training",
            )
            return
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            is_refusal = status is not None and 400 <= status < 500 and status not in (408, 429)
            if delay is None or is_refusal:
                raise SystemExit(
                    f"--push_to_hub: {error}\nThe result is complete in {output_dir}; to push it later: "
                    f"{upload_command(repo_id, output_dir, patterns)}"
                ) from None
            logger.warning(f"The upload failed ({type(error).__name__}); next attempt in {delay} seconds")
            time.sleep(delay)


def upload_command(repo_id: str, output_dir: Path, patterns: list[str]) -> str:
    """The shell command that uploads the same files."""
    include = [f"--include={pattern}" for pattern in patterns]
    if hub.__version__ < "1":  # there the command takes all patterns after one flag
        include = ["--include", *patterns]
    return shlex.join(["hf", "upload", repo_id, str(output_dir), ".", *include])


# ------------------------------------ --cache_latents: the encoders' outputs, kept on disk (need not be read)
CACHE_BATCH_SIZE = 32  # rows that are encoded at once
CACHE_SHARD_SIZE, MAX_CACHE_SHARDS = 2048, 256  # rows in a file at least, and files at most


def tensor_to_bytes(tensor: torch.Tensor) -> bytes:
    """The values of a CPU tensor of any dtype, as Arrow can store them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_from_bytes(value: bytes, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `tensor_to_bytes`, (n,)."""
    return torch.frombuffer(bytearray(value), dtype=dtype)


def hash_model(model: torch.nn.Module) -> str:
    """A hash of a model's architecture and weights."""
    digest = hashlib.blake2b(repr(model).encode(), digest_size=16)  # repr: activations and strides
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor_to_bytes(tensor.cpu()))
    return digest.hexdigest()


def cache_key(rows: SizedRows, args: argparse.Namespace, tokenizer, text_encoder, image_encoder) -> str:
    """A hash of all that the cache depends on: rows and their sizes, columns, dtype, tokenizer, the encoders'
    weights, and the source of the functions below. After an edit of other code, set another --cache_dir."""
    reading = (load_image, resize_to_cover, make_image_transforms, normalize_pixels, list_captions)
    encoding = (tokenize_captions, embed_captions, embed_images)
    sources = [inspect.getsource(function) for function in (*reading, *encoding)]
    sizes = (rows.sizes, rows.buckets.tobytes())
    settings = (args.image_column, args.caption_column, sizes, str(text_encoder.dtype))
    models = (tokenizer.backend_tokenizer.to_str(), hash_model(text_encoder), hash_model(image_encoder))
    fingerprints = (rows.dataset._fingerprint, hash_rows(rows.dataset, args))
    return Hasher.hash((fingerprints, settings, models, sources))


class RowDataset(Dataset):
    """Rows as pixels and captions, or the error that reading them raised."""

    def __init__(self, rows: SizedRows, args: argparse.Namespace):
        self.rows = rows
        self.args = args

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        try:
            row = self.rows[index]
            captions = list_captions(row, self.args)
            image = load_image(row[self.args.image_column], image_folders(self.args))
            pixels = make_image_transforms(self.rows.size(index))(image)
            return {"pixels": pixels, "captions": captions, "error": ""}
        except ValueError as error:  # from `load_image` or `list_captions`
            return {"captions": [], "error": str(error)}


def collate_rows(rows: list[dict]) -> dict:
    """A batch of rows, in which the pixels of those that could be read are stacked by size: {size: pixels},
    in the order of the rows."""
    pixels = {}
    for row in rows:
        if not row["error"]:
            pixels.setdefault(row["pixels"].shape, []).append(row["pixels"])
    return {
        "pixels": {size: default_collate(images) for size, images in pixels.items()},
        "sizes": [None if row["error"] else row["pixels"].shape for row in rows],
        "captions": [row["captions"] for row in rows],
        "errors": [row["error"] for row in rows],
    }


def encode_rows(
    dataloader: DataLoader, first_row: int, args, tokenizer, text_encoder, image_encoder, progress: tqdm
) -> Iterator[list[dict]]:
    """Yields the encoders' outputs for batches of rows, from `first_row` on, and their captions, as bytes."""
    row = first_row
    for batch in dataloader:
        latents = {
            size: iter(embed_images(pixels, image_encoder).cpu()) for size, pixels in batch["pixels"].items()
        }
        captions = [caption for captions in batch["captions"] for caption in captions]
        prompt_embeds = iter(())
        if captions:
            prompt_embeds = iter(embed_captions(tokenize_captions(captions, tokenizer), text_encoder).cpu())
        rows = []
        for size, captions, error in zip(batch["sizes"], batch["captions"], batch["errors"], strict=True):
            if error and not args.skip_bad_rows:
                raise SystemExit(f"row {row}: {error}; fix it, or skip such rows with --skip_bad_rows")
            embeds_bytes = [tensor_to_bytes(next(prompt_embeds)) for _ in captions]
            latents_bytes = b"" if error else tensor_to_bytes(next(latents[size]))
            rows.append({"latents": latents_bytes, "prompt_embeds": embeds_bytes, "error": error})
            row += 1
        yield rows
        progress.update(len(rows))


def write_shard(file: Path, batches: Iterator[list[dict]]):
    """Writes a shard of the cache, under a temporary name until it is complete."""
    binary = datasets.Value("large_binary")
    columns = {"latents": binary, "prompt_embeds": datasets.List(binary), "error": datasets.Value("string")}
    schema = datasets.Features(columns).arrow_schema
    partial = file.with_suffix(".partial")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for rows in batches:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def load_shard(file: Path, rows: RowDataset) -> datasets.Dataset | None:
    """Maps a shard of the cache, unless it is missing, truncated, or lacks rows that are readable now."""
    try:
        shard = datasets.Dataset.from_file(str(file))
    except (OSError, ValueError):  # pyarrow's errors are subclasses of ValueError
        return None
    errors = [index for index, error in enumerate(shard["error"]) if error]
    if len(shard) != len(rows) or not all(rows[index]["error"] for index in errors):
        return None
    return shard


def cache_latents(
    accelerator: Accelerator,
    rows: SizedRows,
    args: argparse.Namespace,
    tokenizer,
    text_encoder,
    image_encoder,
) -> SizedRows:
    """The rows as the encoders' outputs: computed once, kept on disk by `cache_key`, and memory-mapped.

    The ranks share the shards, those of each node by themselves if nodes have caches of their own. An
    interrupted pass continues at the next shard, with any number of ranks.
    """
    key = cache_key(rows, args, tokenizer, text_encoder, image_encoder)
    folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "wuerstchen_latents", key)
    size = max(CACHE_SHARD_SIZE, math.ceil(len(rows) / MAX_CACHE_SHARDS))
    shards = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    location = f"True (--cache_dir={args.cache_dir or datasets.config.HF_DATASETS_CACHE})"
    with explain_errors("--cache_latents", location, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        num_separate = count_separate_ranks(accelerator, folder)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    if num_separate:
        rank = accelerator.local_process_index
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    own_shards = shards[rank::num_ranks]
    total, is_main_process = sum(map(len, own_shards)), accelerator.is_main_process
    progress = tqdm(total=total, desc="Encoding", unit="row", disable=not is_main_process)
    encoders = (tokenizer, text_encoder, image_encoder)

    def load_or_encode(shard: range) -> datasets.Dataset:
        file = folder / f"{shard.start:09d}-{shard.stop:09d}.arrow"
        shard_rows = RowDataset(rows.select(shard), args)
        with filelock.FileLock(f"{file}.lock"):  # another run may be encoding it
            if load_shard(file, shard_rows) is None:
                dataloader = DataLoader(
                    shard_rows,
                    batch_size=CACHE_BATCH_SIZE,
                    collate_fn=collate_rows,
                    num_workers=args.dataloader_num_workers,
                    worker_init_fn=ignore_signals,
                )
                write_shard(file, encode_rows(dataloader, shard.start, args, *encoders, progress))
            return load_shard(file, shard_rows)

    worker_errors = explain_worker_errors(args.dataloader_num_workers)
    with progress, explain_errors("--cache_latents", location, OSError), worker_errors:
        num_done = 0
        for shard in own_shards:
            load_or_encode(shard)
            num_done += len(shard)
            progress.update(num_done - progress.n)  # by the rows of a shard that existed already
        wait_for_slow_ranks(accelerator)
        encoded = datasets.concatenate_datasets([load_or_encode(shard) for shard in shards])
    return replace(rows, dataset=encoded)


def preprocess_cached(
    row: dict, size: tuple[int, int], empty_embeds: torch.Tensor, caption_dropout: float
) -> dict[str, torch.Tensor]:
    """As `preprocess_train`, for a row of `cache_latents`: latents (16, height / 32, width / 32) and
    prompt_embeds (77, width), for which `empty_embeds` is that of the empty caption."""
    if row["error"]:
        raise ValueError(row["error"])
    height, width = (math.ceil(side / STRIDE) for side in size)
    latents = tensor_from_bytes(row["latents"], empty_embeds.dtype).view(-1, height, width)
    prompt_embeds = choose_caption(row["prompt_embeds"], caption_dropout, empty=empty_embeds)
    if prompt_embeds is not empty_embeds:
        prompt_embeds = tensor_from_bytes(prompt_embeds, empty_embeds.dtype).view(empty_embeds.shape)
    return {"latents": latents, "prompt_embeds": prompt_embeds}


# --------------------------------------------- --compile: the prior's steps as CUDA graphs (need not be read)
# The order in which the compiled prior asks for an attention kernel, the fastest on an H100 first.
ATTENTION_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
CHECKPOINTING_BUDGET = 0.5  # share of the activations that --gradient_checkpointing lets the compiler keep


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
        # Of what a backward pass needs, keep the results of matrix products and recompute what is cheap.
        functorch_config = torch._functorch.config
        for reason in ("used_far_apart", "long_fusible_chains", "materialized_backward"):
            setattr(functorch_config, f"ban_recompute_{reason}", False)
        budget = CHECKPOINTING_BUDGET if args.gradient_checkpointing else 1.0
        functorch_config.activation_memory_budget = budget
        prior.forward = make_compiled_forward(prior)
        with sdpa_kernel(ATTENTION_KERNELS, set_priority=True), accelerator.autocast():
            graphed_forward = torch.cuda.make_graphed_callables(prior.train(), inputs).forward
    except Exception as error:  # for example no C compiler, or a GPU that Triton does not support
        prior.forward = eager_forward
        logger.warning(f"--compile is ignored: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return

    def forward(*inputs):
        return graphed_forward(*inputs) if prior.training else eager_forward(*inputs)

    prior.forward = forward
    if args.gradient_accumulation_steps > 1:
        # The first micro-step's gradient is the graph's own memory, which the next one would overwrite.
        for weight in filter(lambda weight: weight.requires_grad, prior.parameters()):
            weight.register_hook(lambda grad, weight=weight: grad.clone() if weight.grad is None else grad)


# ------------------------------------------------------------------------------------------------------- main
@explain_lost_ranks()
def main(argv: list[str] | None = None):  # noqa: C901  the training loop is not split up
    args = parse_args(argv)
    accelerator = setup_accelerator(args)
    device, rank, is_main_process = accelerator.device, accelerator.process_index, accelerator.is_main_process
    output_dir = Path(args.output_dir)

    # Where the run starts: at step 0, or at a checkpoint, whose seed it keeps.
    lock_output_dir(accelerator, output_dir)
    checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
    stale_checkpoints = check_output_dir(args, checkpoint)
    state = load_train_state(checkpoint, stale_checkpoints, output_dir)
    first_step = state.global_step
    if args.seed is None:
        args.seed = state.plan["seed"] if state.plan else random.getrandbits(31)
    if is_main_process:
        args.hub_model_id = check_destinations(args)
    args.seed, args.hub_model_id = broadcast_object_list([args.seed, args.hub_model_id])

    # The data, and which samples each step trains on. Batches run on over an epoch's end, so that each one is
    # full and each row is used once an epoch.
    tokenizer = load_tokenizer(args)
    with local_main_process_first(accelerator):
        dataset, rows_hash = load_rows(args, tokenizer)
    train_rows, held_out_rows = split_held_out(len(dataset), args.validation_split, args.seed)
    plan = SamplePlan(
        seed=args.seed,
        num_rows=len(train_rows),
        rows_hash=rows_hash,
        num_processes=accelerator.num_processes,
        train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        bucket_rows=dataset.describe() if args.aspect_ratio_buckets else {},
    )
    check_same_plan(plan, state, checkpoint)
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * plan.num_rows / plan.samples_per_step)
    report_settings(args, plan, state, checkpoint)
    state.plan, state.settings = asdict(plan), public_settings(args)

    # The models. The encoders are frozen, in half precision under mixed precision; the prior is float32.
    text_encoder, image_encoder = load_encoders(args, frozen_dtype(accelerator), device)
    prior = load_prior(args, checkpoint, text_encoder, image_encoder).to(device)
    ema_prior = load_ema(args, prior, checkpoint, device)
    noise_scheduler = load_noise_scheduler(device)
    prompts = ["", *(args.validation_prompts or [])]
    empty_embeds, *validation_embeds = embed_prompts(prompts, tokenizer, text_encoder)
    if args.cache_latents:
        dataset = cache_latents(accelerator, dataset, args, tokenizer, text_encoder, image_encoder)
        text_encoder = image_encoder = None  # frees their memory
    encode = functools.partial(encode_batch, text_encoder=text_encoder, image_encoder=image_encoder)

    # The data loaders.
    preprocess = make_preprocess(args, tokenizer, empty_embeds, train=True)
    train_dataset = dataset.select(train_rows)
    batches = SampleOrder(train_dataset, plan).train_batches(rank, first_step, args.max_train_steps)
    train_dataloader = make_dataloader(train_dataset, preprocess, batches, args, device)
    held_out_dataloader = None
    if args.validation_split is not None:
        preprocess = make_preprocess(args, tokenizer, empty_embeds, train=False)
        held_out_dataset = dataset.select(held_out_rows)
        batches = plan.held_out_batches(rank, held_out_dataset)
        held_out_dataloader = make_dataloader(held_out_dataset, preprocess, batches, args, device)

    # The optimizer and the learning rate. The prior is the checkpoint's already, the optimizer follows.
    if args.compile:
        compile_prior(prior, accelerator, args, empty_embeds)
    with explain_errors("--optimizer", args.optimizer):
        optimizer = make_optimizer(prior, args, device)
    register_checkpoint_hooks(accelerator, ema_prior)
    wait_for_slow_ranks(accelerator)  # models may have been downloaded
    prior, optimizer = accelerator.prepare(prior, optimizer)
    if checkpoint is not None:
        with explain_errors("--resume_from_checkpoint", checkpoint):
            accelerator.load_state(str(checkpoint))
        accelerator.step = 0  # of the micro-steps in a step, whose number may have changed
    with explain_errors("--lr_scheduler", args.lr_scheduler):
        lr_scheduler = make_lr_scheduler(optimizer.optimizer, args, first_step)

    # Trackers continue at the checkpoint's step, and so do loss.jsonl and samples/.
    if is_main_process:
        init_trackers(accelerator, args, state)
        with only_warn("Truncating loss.jsonl"):
            truncate_logs(output_dir, first_step if checkpoint else -1)
    logger.info(f"Training from step {first_step} to {args.max_train_steps} on {device.type}: {plan}")
    signals = []
    validator = Validator(
        accelerator=accelerator,
        args=args,
        prior=accelerator.unwrap_model(prior),
        ema_prior=ema_prior,
        noise_scheduler=noise_scheduler,
        encode=encode,
        empty_embeds=empty_embeds,
        prompt_embeds=validation_embeds,
        held_out_dataloader=held_out_dataloader,
        signals=signals,
    )

    batches = iterate_batches(train_dataloader, device, skipped_rows=set(), signals=signals)
    prior.train()
    stop = False
    progress = tqdm(total=args.max_train_steps, initial=first_step, desc="Steps", disable=not is_main_process)
    worker_errors = explain_worker_errors(args.dataloader_num_workers)
    with deferred_signals(signals), worker_errors, progress, logging_redirect_tqdm():
        # Each turn does what is due after `global_step` steps and then takes a step: the first one validates
        # the untrained prior, the last one saves a checkpoint and takes no step. A signal is obeyed after the
        # turn's step; after the loop it ends the process at once.
        while True:
            is_new, is_last = state.global_step > first_step, state.global_step >= args.max_train_steps
            if is_new and (stop or is_last or state.global_step % args.checkpointing_steps == 0):
                check_finite_weights(prior, output_dir, state.global_step)
                saved = save_checkpoint(accelerator, output_dir, state, args.checkpoints_total_limit)
            if stop:
                stop_training(accelerator, output_dir, saved, 128 + max(signals, default=signal.SIGTERM))
            if is_last:
                break
            if is_validation_due(state.global_step, args, plan):
                validator.log_validation(state.global_step)

            # All random numbers follow from the seed and the samples' positions, whatever the rank.
            started = time.perf_counter()
            train_loss, rows, all_timesteps = torch.zeros((), device=device), [], []
            for _ in range(args.gradient_accumulation_steps):
                batch = next(batches)
                with accelerator.accumulate(prior):
                    latents, prompt_embeds = encode(batch)
                    noise, u = sample_noise(batch["positions"], latents.shape[1:], device, args.seed, "noise")
                    timesteps = sample_timesteps(u, args.timestep_sampling)
                    seed_dropout(derive_seed(args.seed, "dropout", batch["positions"][0]), device)
                    loss = diffusion_loss(
                        prior, noise_scheduler, latents, prompt_embeds, noise, timesteps, args.loss_weighting
                    ).mean()
                    accelerator.backward(loss)
                train_loss += loss.detach() / args.gradient_accumulation_steps
                rows += batch["rows"]
                all_timesteps.append(timesteps)

            grad_norm = accelerator.clip_grad_norm_(prior.parameters(), args.max_grad_norm)
            train_loss, grad_norm, stop = reduce_metrics(accelerator, train_loss, grad_norm, bool(signals))
            step = state.global_step + 1
            check_finite(accelerator, output_dir, step, train_loss, grad_norm, rows, all_timesteps)
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
            update_ema(ema_prior, prior)
            state.global_step = step

            metrics = {
                "train_loss": train_loss,
                "lr": lr_scheduler.get_last_lr()[0],
                "grad_norm": grad_norm,
                "images_per_second": plan.samples_per_step / (time.perf_counter() - started),
                "epoch": step * plan.samples_per_step / plan.num_rows,
            }
            if device.type == "cuda":
                metrics["memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
            log_metrics(accelerator, metrics, step)
            if stale_checkpoints and is_main_process:  # not before a step has succeeded
                delete_checkpoints(stale_checkpoints, output_dir)
            stale_checkpoints = []
            progress.set_postfix_str(
                f"loss {train_loss:.4f}, lr {metrics['lr']:.2e}, {metrics['images_per_second']:.1f} images/s",
                refresh=False,
            )
            progress.update()

    # The result is on disk before anything is validated or uploaded.
    exit_on_signals(signals)
    with ema_weights(validator.prior, ema_prior):
        save_args = (args, validator.prior, tokenizer, noise_scheduler)
        image_size = save_pipeline(*save_args) if is_main_process else None
    validator.log_validation(state.global_step)
    if is_main_process:
        with only_warn("Writing README.md"):
            save_model_card(args, image_size, state.global_step, plan, device)
        if args.push_to_hub:
            push_to_hub(args.hub_model_id, output_dir, state.global_step, args.hub_token)
        log_summary(args, state.global_step, plan)
    end_training(accelerator)


if __name__ == "__main__":
    main()
