# SPDX-License-Identifier: Apache-2.0
"""What comes before the prior: the image encoder of Würstchen, an EfficientNetV2 whose features are mapped to 16
normalised channels; how a data set's rows are read, and in which order; what encoders give for them, kept on disk. And
two things that need not be read: the pictures that show how a run goes, and the prior's fast path (`--compile`).

The published weights are one entry, `effnet_state_dict`, of the multi-gigabyte training file `model_v2_stage_b.pt`
in the Hub repo dome272/wuerstchen. `EfficientNetEncoder.load` takes it from there; `save_pretrained` keeps the 80 MB
that matter, for `load` or `from_pretrained`.
"""

import argparse
import functools
import hashlib
import inspect
import json
import math
import os
import random
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import DistributedType
from accelerate.logging import get_logger
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import models
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms
from tqdm.auto import tqdm

logger = get_logger(__name__, log_level="INFO")

BACKBONES = {"efficientnet_v2_s": models.efficientnet_v2_s, "efficientnet_v2_l": models.efficientnet_v2_l}
# What torchvision's EfficientNet weights were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PICTURE_SUFFIXES = frozenset(Image.registered_extensions())
STRIDE = 32  # pixels a latent, in each direction, of what is encoded
RESOLUTION_MULTIPLE = 42.67  # of what is drawn: the published prior pipeline's `resolution_multiple`
TILE, SHEET_COLUMNS = 192, 12  # the contact sheet's pictures: pixels a side, updates across
STRIP = 8  # a picture longer than this times its width is cut to it before it is resized
PUBLISHED_FILE = "model_v2_stage_b.pt"
BAD_ROWS_IN_A_ROW = 12  # so many broken rows drawn one after the other mean that most of the data set is broken
SAME_STOP = 2.0  # seconds in which two SIGTERMs are one: a scheduler and torchrun may both send it
PUBLISHED_KEY = "effnet_state_dict"
ENCODING_BATCH, ENCODING_PIECE = 32, 2048  # rows that are encoded at once, and that are kept as one file, at least
ENCODING_PIECES = 256  # such files, at most
# Of what a compiled backward pass needs, the share that --gradient_checkpointing lets it keep; and the order in which
# it asks for an attention, the fastest on an H100 first.
CHECKPOINTING_BUDGET = 0.5
ATTENTION_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
ATTENTION_KERNELS += [SDPBackend.MATH]


class EfficientNetEncoder(ModelMixin, ConfigMixin):
    """Maps pictures to the latents that the prior is trained on, 32 times smaller in each direction.

    Args:
        c_latent: channels of the latents.
        c_cond: channels of the backbone's last feature map (1280 for both backbones).
        effnet: `"efficientnet_v2_s"` or `"efficientnet_v2_l"`. Nothing is downloaded: the weights start out random.

    Raises:
        ValueError: if `effnet` is neither of the two.
    """

    @register_to_config
    def __init__(self, c_latent: int = 16, c_cond: int = 1280, effnet: str = "efficientnet_v2_s"):
        super().__init__()
        if effnet not in BACKBONES:
            raise ValueError(f"effnet must be one of {', '.join(BACKBONES)}, not {effnet!r}")
        self.backbone = BACKBONES[effnet](weights=None).features
        self.mapper = nn.Sequential(nn.Conv2d(c_cond, c_latent, kernel_size=1, bias=False), nn.BatchNorm2d(c_latent))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float, RGB normalised by ImageNet's mean and deviation, to (B, c_latent, H/32, W/32)."""
        return self.mapper(self.backbone(pixels))

    @classmethod
    def load(cls, name_or_path: str, cache_dir: str | None = None) -> "EfficientNetEncoder":
        """The encoder from wherever it may be: a training file of the original authors, or a folder or Hub repo that
        holds either `model_v2_stage_b.pt` or what `save_pretrained` wrote."""
        path = Path(name_or_path)
        if path.is_file():
            return cls.from_published(path)
        if (path / PUBLISHED_FILE).is_file():
            return cls.from_published(path / PUBLISHED_FILE)
        if not path.is_dir():
            try:
                return cls.from_published(hf_hub_download(name_or_path, PUBLISHED_FILE, cache_dir=cache_dir))
            except EntryNotFoundError:
                pass
        return cls.from_pretrained(name_or_path, cache_dir=cache_dir)

    @classmethod
    def from_published(cls, file: str | Path, **config) -> "EfficientNetEncoder":
        """The encoder in a training file of the original authors; `config` goes to the constructor.

        The file is mapped, not read: only the encoder's own tensors ever reach memory. It is unpickled with
        `weights_only=True`, which cannot run code.

        Raises:
            KeyError: if the file has no `effnet_state_dict`.
            RuntimeError: if its tensors do not fit the architecture that `config` names.
        """
        state_dict = torch.load(file, map_location="cpu", mmap=True, weights_only=True)[PUBLISHED_KEY]
        encoder = cls(**config)
        encoder.load_state_dict(state_dict)
        return encoder


# -------------------------------------------------------------------------------------------- rows and pictures
def load_split(split: str, source: str, config_name: str | None, cache_dir: str | None, local: bool):
    """A split of a data set on the Hub or in a folder, of whatever kind its files are.

    A folder that is not `local`, and has a README.md, is a copy of a repo on the Hub, and read by its rules.

    Raises:
        ValueError: if the data set has no such split, or no rows in it.
    """
    splits = load_splits(source, config_name, cache_dir, local)
    if not len(splits.get(split, ())):
        raise ValueError(f"no rows in a split named {split}; there is {', '.join(splits)}")
    return splits[split]


def load_splits(source: str, config_name: str | None, cache_dir: str | None, local: bool) -> dict:
    """All splits, see `load_split`."""
    folder = Path(source)
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(folder)
    if (folder / "state.json").is_file():
        return {"train": datasets.load_from_disk(folder)}
    if not folder.is_dir() or (not local and (folder / "README.md").is_file()):
        return datasets.load_dataset(source, config_name, cache_dir=cache_dir)
    suffixes = {path.suffix.lower() for path in folder.rglob("*")}
    here = escape(str(folder.resolve()))  # `datasets` takes [brackets] in a folder's name for a pattern
    for kind in ("parquet", "arrow"):
        if f".{kind}" in suffixes:
            return datasets.load_dataset(kind, data_dir=here, cache_dir=cache_dir)
    if not suffixes & PICTURE_SUFFIXES:
        raise ValueError("there are no pictures, Parquet or Arrow files in it")
    # Named here, since `datasets` would take a picture called test.jpg for a split.
    found = [name for name in ("train", "validation", "test") if (folder / name).is_dir()]
    files = {name: f"{here}/{name}/**" for name in found} or {"train": f"{here}/**"}
    return datasets.load_dataset("imagefolder", data_files=files, cache_dir=cache_dir)


def find_column(rows: datasets.Dataset, name: str) -> str:
    """The column's name. Raises ValueError if there is no such column."""
    if name not in rows.column_names:
        raise ValueError(f"there is no such column, only {', '.join(rows.column_names)}")
    return name


def keep_encoded(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """The rows with a column's pictures as files or their bytes, not decoded. Raises ValueError if it has none."""
    feature = rows.features[find_column(rows, column)]
    encoded = {"bytes", "path"} <= feature.keys() if isinstance(feature, dict) else "binary" in str(feature)
    if not encoded and not isinstance(feature, datasets.Image):
        raise ValueError(f"the column holds {feature}, not pictures: cast it to Image")
    return rows.cast_column(column, datasets.Image(decode=False))


def picture_size(decoder_pipeline, resolution: int) -> int:
    """Pixels a side of the picture that latents trained at `resolution` stand for: 1024 for 768, which is 24 latents.

    The decoder halves its own latents, `latent_dim_scale` times as many, level by level, so only some numbers can be
    drawn: the nearest.
    """
    trained, config = math.ceil(resolution / STRIDE), decoder_pipeline.decoder.config
    divisor, scale = config.patch_size * 2 ** (len(config.c_hidden) - 1), decoder_pipeline.config.latent_dim_scale
    sides = [side for side in range(1, trained + 2 * divisor) if int(side * scale) % divisor == 0]
    return int(min(sides, key=lambda side: abs(side - trained)) * RESOLUTION_MULTIPLE)


def decode_picture(value: dict, folders: list[Path] | None = None) -> Image.Image:
    """The picture of a data set's row, {"bytes", "path"}, upright, as 8-bit RGB.

    16-bit greys are scaled, and what is transparent is laid on white.

    Raises:
        ValueError: with the file's name, whatever is wrong with it, or if it is a file outside of the `folders`.
    """
    path = (value or {}).get("path")
    if folders is not None and path and not value["bytes"] and "://" not in path:
        places = [place for f in folders for place in (f.absolute(), f.resolve())]  # a cache may be a link
        inside = (Path(path).absolute().is_relative_to(place) for place in places)
        if ".." in Path(path).parts or not any(inside):
            raise ValueError(f"the picture ({path}) lies outside the data set's folder")
    try:
        image = datasets.Image().decode_example(value)  # turns it as its EXIF says
        if image.mode.startswith("I"):  # 16-bit greyscale, which convert() would clip to white
            grey, clear = np.asarray(image), image.info.get("transparency")
            image = Image.fromarray((grey.clip(0, 65535) / 257).round().astype(np.uint8))
            if clear is not None:
                image.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:
        file = (value or {}).get("path") or "no file name"
        raise ValueError(f"the picture ({file}) cannot be read: {type(error).__name__}: {error}") from error


def crop_square(image: Image.Image, resolution: int, draw: random.Random | None = None) -> Image.Image:
    """Resizes the short side to `resolution` pixels (bilinear, antialiased) and crops a square of that side: the
    centre, or one that is drawn."""
    width, height = image.size
    longest = STRIP * min(width, height)
    if max(width, height) > longest:  # a banner of 60000 x 1 would be resized to 30 million x 512
        image = transforms.center_crop(image, (min(height, longest), min(width, longest)))
    image = transforms.resize(image, resolution, interpolation=InterpolationMode.BILINEAR, antialias=True)
    if draw is None:
        return transforms.center_crop(image, resolution)
    top, left = draw.randint(0, image.height - resolution), draw.randint(0, image.width - resolution)
    return transforms.crop(image, top, left, resolution, resolution)


def normalize_pixels(image: Image.Image) -> torch.Tensor:
    """A picture as the encoder takes it: (3, H, W) float32, normalised by ImageNet's mean and deviation."""
    return transforms.normalize(transforms.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


def split_rows(rows: datasets.Dataset, held_out: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows to train on and those held out, a number or, below 1, a share of them, drawn with the seed.

    Like `train_test_split` of `datasets`, which would write into the data set's folder. Raises ValueError if there are
    too few rows, or their number is not whole.
    """
    count = math.ceil(held_out * len(rows)) if held_out < 1 else held_out
    if count % 1 or count >= len(rows):
        raise ValueError(f"there are {len(rows)} rows; give a smaller whole number, or a share below 1")
    drawn = rows.shuffle(seed=seed, keep_in_memory=True)
    return drawn.select(range(int(count), len(rows))), drawn.select(range(int(count)))


def check_captions(captions, picture: dict | None) -> list[str]:
    """A row's captions, a string or a list of them, as a list. Raises ValueError, naming the picture, if it is not."""
    choices = [captions] if isinstance(captions, str) else captions
    if not isinstance(choices, (list, tuple)) or not choices or not all(isinstance(c, str) for c in choices):
        file = (picture or {}).get("path") or "no file name"
        raise ValueError(f"the caption is {captions!r}, not a string or a list of strings (picture: {file})")
    return list(choices)


def pick_caption(captions: list, draw: random.Random, caption_dropout: float, empty):
    """One of a row's captions, or with the probability `caption_dropout` the empty one."""
    caption = draw.choice(captions)
    return empty if draw.random() < caption_dropout else caption


READING = (check_captions, decode_picture, crop_square, normalize_pixels)  # what makes a row an encoder's input


# ------------------------------------------------------------------------------------------ the order of samples
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


def samples_per_update(plan: dict) -> int:
    """How many samples all ranks together take for an update."""
    return plan["train_batch_size"] * plan["gradient_accumulation_steps"] * plan["processes"]


def micro_batches(first_step: int, last_step: int, plan: dict, rank: int) -> Iterator[range]:
    """The positions of each of this rank's micro-batches for the updates [first_step, last_step)."""
    size, update = plan["train_batch_size"], samples_per_update(plan)
    starts = range(first_step * update + rank * size, last_step * update, size * plan["processes"])
    return (range(start, start + size) for start in starts)


def held_out_loader(rows: datasets.Dataset, preprocess, args, seed: int, rank: int, ranks: int, loading: dict):
    """A DataLoader of the held-out rows, in batches that share them out among the ranks. Captions are not dropped, nor
    pictures cropped or mirrored at random."""
    size, plain = args.train_batch_size, {"caption_dropout": 0.0, "random_crop": False, "random_flip": False}
    batches = [range(start, min(start + size, len(rows))) for start in range(rank * size, len(rows), ranks * size)]
    preprocess = functools.partial(preprocess, args=argparse.Namespace(**vars(args) | plain))
    samples = TrainSamples(rows, preprocess, seed, args.skip_bad_rows)
    return torch.utils.data.DataLoader(samples, batch_sampler=batches, **loading)


def next_batch(batches, device: torch.device, bad_rows: set) -> dict:
    """The next micro-batch, on the device; rows that were left out are named once and noted in `bad_rows`."""
    batch = next(batches)
    if "problem" in batch:
        raise SystemExit(batch["problem"])
    for row in batch["bad_rows"].keys() - bad_rows:
        logger.warning(f"Left out: {batch['bad_rows'][row]}", main_process_only=False)
    bad_rows.update(batch["bad_rows"])
    return {name: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for name, v in batch.items()}


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within it, SIGTERM and SIGINT are put into the list, for the loop to look at; a second one ends the process."""
    received, received_at = [], [-math.inf]

    def note(number, frame):
        if number == signal.SIGTERM and time.monotonic() - received_at[0] < SAME_STOP:
            return
        if received:
            os._exit(128 + number)
        received_at[0] = time.monotonic()
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


# ------------------------------------------------------------------------------------- what encoders give, on disk
def to_bytes(tensor: torch.Tensor) -> bytes:
    """The values of a tensor on the CPU, of whatever dtype, as Arrow can keep them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fingerprint(*parts) -> str:
    """A hash of what something follows from: models by their weights, functions by their source, all else by repr."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, nn.Module):
            digest.update(repr(part).encode())  # which tells activations and strides
            for name, tensor in part.state_dict().items():
                digest.update(name.encode() + to_bytes(tensor.cpu()))
        else:
            digest.update((inspect.getsource(part) if inspect.isfunction(part) else repr(part)).encode())
    return digest.hexdigest()


def from_bytes(value: bytes, like: torch.Tensor) -> torch.Tensor:
    """The values that `to_bytes` gave, (n,), of the dtype of `like`."""
    return torch.frombuffer(bytearray(value), dtype=like.dtype)


class RowReader(torch.utils.data.Dataset):
    """Rows as `read` gives them, with "" or the reason why it could not."""

    def __init__(self, rows: datasets.Dataset, read: Callable):
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple:
        try:
            return self.read(self.rows[index]), ""
        except Exception as error:  # a decoder may raise anything
            return None, str(error) or type(error).__name__


def encodings(loader, first: int, tokenize, encode, skip_bad_rows: bool, progress: tqdm) -> Iterator[dict]:
    """What the encoders give for a RowReader's batches, row by row; the first is row `first` of the data set."""
    for batch in loader:
        prompt_embeds = latents = iter(())
        if good := [read for read, problem in batch if not problem]:
            pixels, captions = zip(*good, strict=True)
            ids, mask = tokenize([caption for own in captions for caption in own])
            inputs = {"effnet_pixel_values": torch.stack(pixels), "text_input_ids": ids, "text_mask": mask}
            prompt_embeds, latents = (map(to_bytes, tensor.cpu()) for tensor in encode(inputs))
        for number, (read, problem) in enumerate(batch, first):
            if problem and not skip_bad_rows:
                raise SystemExit(f"row {number}: {problem}; mend it, or leave such rows out with --skip_bad_rows")
            texts = [] if problem else [next(prompt_embeds) for _ in read[1]]
            yield {"latents": b"" if problem else next(latents), "prompt_embeds": texts, "problem": problem}
        first += len(batch)
        progress.update(len(batch))


def encode_once(accelerator, rows: datasets.Dataset, key: str, read, tokenize, encode, args) -> datasets.Dataset:
    """A data set of what the encoders give for `rows`: made once, kept on disk under `key`, and mapped from there.

    The ranks share the work out. It is kept in pieces, each written aside and then renamed by `datasets`, so that a
    pass that was interrupted goes on at the next piece, with whatever number of ranks.

    Args:
        read: gives a row's pixels and captions, in the loader's processes. What it raises becomes the row's `problem`
            or, without `--skip_bad_rows`, ends the pass.
        tokenize: makes captions tokens and their mask.
        encode: takes a batch of those and pixels, as training does, and gives embeddings and latents.
    """
    loading = {"collate_fn": list, "num_workers": args.dataloader_num_workers, "worker_init_fn": ignore_signals}
    kind = datasets.Value("large_binary")
    columns = {"latents": kind, "prompt_embeds": datasets.List(kind), "problem": datasets.Value("string")}
    size = max(ENCODING_PIECE, math.ceil(len(rows) / ENCODING_PIECES))
    pieces = [range(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]
    mine = pieces[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(total=sum(map(len, mine)), desc="Encoding", unit="row", disable=not accelerator.is_main_process)

    def load(piece: range) -> datasets.Dataset:
        reader = RowReader(rows.select(piece), read)
        loader = torch.utils.data.DataLoader(reader, ENCODING_BATCH, **loading)
        given = {"loader": loader, "first": piece.start, "tokenize": tokenize, "encode": encode}
        return datasets.Dataset.from_generator(
            encodings,
            features=datasets.Features(columns),
            cache_dir=args.cache_dir,
            writer_batch_size=ENCODING_BATCH,  # the default, 1000 rows, is 200 MB and more
            gen_kwargs=given | {"skip_bad_rows": args.skip_bad_rows, "progress": progress},
            fingerprint=f"{key}-{piece.start}-{piece.stop}",
        )

    datasets.disable_progress_bars()  # one bar for all pieces, not one each
    with progress:
        before = 0
        for piece in mine:
            load(piece)
            before += len(piece)
            progress.update(before - progress.n)  # by the rows of a piece that was there already
    datasets.enable_progress_bars()
    accelerator.wait_for_everyone()
    return datasets.concatenate_datasets([load(piece) for piece in pieces])


def read_cached(row: dict, draw: random.Random, empty: torch.Tensor, args) -> dict:
    """A row of `encode_once` as tensors, latents (16, side, side) and prompt_embeds (77, width) of the dtype of
    `empty`, the empty caption's embedding; it draws its caption as those do that read pictures."""
    if row["problem"]:
        raise ValueError(row["problem"])
    side = math.ceil(args.resolution / STRIDE)
    text = pick_caption(row["prompt_embeds"], draw, args.caption_dropout, empty=None)
    prompt_embeds = empty if text is None else from_bytes(text, empty).view(empty.shape)
    return {"latents": from_bytes(row["latents"], empty).view(-1, side, side), "prompt_embeds": prompt_embeds}


# ------------------------------------------------------------------------------------------------ how a run goes
def contact_sheet(folder: Path, prompts: list[str]) -> Image.Image:
    """A folder's pictures update-N-prompt-K.png in one: prompts down, updates across, SHEET_COLUMNS at most."""
    updates = sorted({file.name.split("-")[1] for file in folder.glob("update-*.png")})
    updates = updates[:-1][:: max(1, math.ceil((len(updates) - 1) / (SHEET_COLUMNS - 1)))] + updates[-1:]
    sheet = Image.new("RGB", (TILE * (1 + len(updates)), 20 + TILE * len(prompts)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        pen.text((4, 24 + TILE * row), textwrap.fill(prompt, 28), "black")
        for column, update in enumerate(updates, 1):
            pen.text((4 + TILE * column, 4), f"update {int(update)}", "black")
            if (file := folder / f"update-{update}-prompt-{row}.png").exists():
                sheet.paste(Image.open(file).resize((TILE, TILE)), (TILE * column, 20 + TILE * row))
    return sheet


def loss_curve(rows: list[dict[str, float]]) -> Image.Image:
    """Losses by update: those of training (`train_loss`, grey), their running mean (blue), held-out ones (red)."""
    train, held_out = ([(row["update"], row[k]) for row in rows if k in row] for k in ("train_loss", "val_loss"))
    means = train[:1]
    for count, (update, loss) in enumerate(train[1:], 2):
        means.append((update, means[-1][1] + (loss - means[-1][1]) * max(1 / count, 0.02)))
    shown = means + held_out or [(1, 1.0)]
    last, top = max(1, *(update for update, _ in shown)), 1.2 * max(loss for _, loss in shown) or 1
    plot = Image.new("RGB", (1000, 500), "white")
    pen = ImageDraw.Draw(plot)
    for points, colour, width in ((train, "lightgrey", 1), (means, "blue", 2), (held_out, "red", 3)):
        pen.line([(60 + 920 * u / last, 470 - 450 * min(loss / top, 1)) for u, loss in points], colour, width)
    for tick in range(6):
        pen.text((4, 464 - 90 * tick), f"{top * tick / 5:.3g}", "black")
        pen.text((60 + 180 * tick, 480), f"{last * tick / 5:.0f}", "black")
    return plot


def read_losses(output_dir: Path) -> list[dict[str, float]]:
    """The lines of loss.jsonl; none if there is no such file."""
    file = output_dir / "loss.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def forget_what_follows(output_dir: Path, global_step: int):
    """Takes out of loss.jsonl and samples/ what a run that goes on after update `global_step` will write again."""
    rows = [row for row in read_losses(output_dir) if row["update"] <= global_step]
    (output_dir / ".loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (output_dir / ".loss.jsonl").replace(output_dir / "loss.jsonl")
    for file in (output_dir / "samples").glob("update-*.png"):
        if int(file.name.split("-")[1]) > global_step:
            file.unlink()


# --------------------------------------------------------------------------------------------- the prior, compiled
def compile_prior(prior: nn.Module, accelerator, args: argparse.Namespace, prompt_embeds: torch.Tensor):
    """Makes the prior's training steps replay two CUDA graphs, forward and backward, in which one compiled function
    serves all triplets of blocks. Validation runs the prior as it is. Where that cannot be, it says so and changes
    nothing.

    The graphs read the weights where these lie now, so change them in place only. Micro-batches must be of one size,
    `args.train_batch_size`, with embeddings like `prompt_embeds`, which are any caption's, (1, 77, width).
    """
    state, whole = accelerator.state, prior.forward
    kinds = (DistributedType.NO, DistributedType.MULTI_GPU)
    if accelerator.device.type != "cuda" or state.distributed_type not in kinds or state.dynamo_plugin.backend != "NO":
        logger.warning("--compile is left out: it is for CUDA, without DeepSpeed, FSDP or --dynamo_backend")
        return

    @functools.partial(torch.compile, dynamic=False)
    def triplet(blocks, x, r_embed, c_embed):
        res, timestep, attention = blocks
        return attention(timestep(res(x), r_embed), c_embed)

    def forward(noisy_latents, timesteps, prompt_embeds):  # does what WuerstchenPrior's does, channels last
        x = prior.projection(noisy_latents).contiguous(memory_format=torch.channels_last)
        r_embed, c_embed = prior.gen_r_embedding(timesteps), prior.cond_mapper(prompt_embeds)
        for blocks in zip(*[iter(prior.blocks)] * 3, strict=True):
            x = triplet(blocks, x, r_embed, c_embed)
        a, b = prior.out(x).chunk(2, dim=1)
        return (noisy_latents - a) / ((1 - b).abs() + 1e-5)

    logger.info("Compiling the prior, which may take a minute; less the next time")
    count, side = args.train_batch_size, math.ceil(args.resolution / STRIDE)
    latents = torch.zeros(count, prior.config.c_in, side, side, device=accelerator.device)
    samples = (latents, torch.zeros(count, device=accelerator.device), prompt_embeds.repeat(count, 1, 1))
    try:  # of what a backward pass needs, keep what matrix products give, and make again what is cheap
        for reason in ("used_far_apart", "long_fusible_chains", "materialized_backward"):
            setattr(torch._functorch.config, f"ban_recompute_{reason}", False)
        torch._functorch.config.activation_memory_budget = CHECKPOINTING_BUDGET if args.gradient_checkpointing else 1.0
        prior.forward = forward
        with sdpa_kernel(ATTENTION_KERNELS, set_priority=True), accelerator.autocast():
            replay = torch.cuda.make_graphed_callables(prior.train(), samples).forward
    except Exception as error:  # there may be no C compiler, or a card that Triton does not know
        prior.forward = whole
        logger.warning(f"--compile is left out: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    prior.forward = lambda *inputs: (replay if prior.training else whole)(*inputs)
    for weight in prior.parameters() if args.gradient_accumulation_steps > 1 else []:
        # The first micro-step's gradient is the graph's own memory, which the next one's would overwrite.
        weight.register_hook(lambda grad, weight=weight: grad.clone() if weight.grad is None else grad)
