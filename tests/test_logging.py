# SPDX-License-Identifier: Apache-2.0
"""What a run logs: trackers, loss.jsonl, samples/, the contact sheet and the loss curve. What one place shows
is compared with what the others do, what is drawn with the files it is drawn from, and a resumed run with an
uninterrupted one."""

import functools
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import struct
import sys
import warnings
from io import BytesIO
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import accelerate.tracking
import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import LoggerType
from conftest import equal_images, read_curve, read_samples, tiny_args
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import train_text_to_image_prior as script

PROMPTS = ["a red apple", "an owl at night 🦉", "雪の結晶"]
TOKEN = "hf_pQmRnVbXcZkJhGfDsLwY"
# An epoch is two steps of eight samples; six of the 14 rows are held out.
RUN = {
    "train_batch_size": 4,
    "max_train_samples": 14,
    "max_train_steps": 7,
    "checkpointing_steps": 3,
    "learning_rate": 3e-4,
    "random_flip": True,
    "caption_dropout": 0.5,
    "validation_prompts": PROMPTS,
    "validation_steps": 2,
    "validation_split": 6,
}
TRACKED = RUN | {
    "use_ema": True,
    "loss_weighting": "p2",
    "report_to": "tensorboard,wandb",
    "hub_token": TOKEN,
}
VALIDATED = [0, 2, 4, 6, 7]
TRAIN_METRICS = ("train_loss", "lr", "grad_norm", "images_per_second", "epoch")
VAL_METRICS = ("val_loss", "val_loss_t0.0", "val_loss_t0.25", "val_loss_t0.5", "val_loss_t0.75")


# --------------------------------------------------------------------------------- runs, and what they write


def main_with_patch(main, patch, argv):
    patch()
    main(argv)


@pytest.fixture(scope="module")
def start_run(run_main, models, pictures, tmp_path_factory):
    """start_run(folder=None, patch=None, **flags): a run of the command with these flags.

    `patch` is called in the child before `main`, to patch what it likes. The run has its `returncode`,
    `output`, `folder` and the folder of wandb's files, `wandb`.
    """

    def start_run(folder=None, patch=None, **flags):
        folder = folder or tmp_path_factory.mktemp("run") / "out"
        wandb = tmp_path_factory.mktemp("wandb")
        with pytest.MonkeyPatch.context() as monkeypatch:
            if patch is not None:
                monkeypatch.setattr(script, "main", functools.partial(main_with_patch, script.main, patch))
            run = run_main(tiny_args(models, pictures, folder, **flags), WANDB_DIR=str(wandb))
        run.folder, run.wandb = folder, wandb
        return run

    return start_run


@pytest.fixture(scope="module")
def uninterrupted(start_run):
    run = start_run(**TRACKED)
    assert run.returncode == 0, run
    return run


def kill_in_step(step):
    """Kills the process in the given step, of those that it takes itself, after its backward pass."""
    reduce_metrics, calls = script.reduce_metrics, itertools.count(1)

    def killing(*args, **kwargs):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return reduce_metrics(*args, **kwargs)

    script.reduce_metrics = killing


def kill_in_validation(step):
    log_validation = script.Validator.log_validation

    def killing(self, global_step):
        if global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        log_validation(self, global_step)

    script.Validator.log_validation = killing


def read_tensorboard(folder):
    """What TensorBoard shows: {tag: {step: number, text or pixels}}. No step may come twice."""
    path, shown = str(folder / "logs" / "text2image-fine-tune"), {}
    events = EventAccumulator(path, {"tensors": 0}).Reload()
    for tag in events.Tags()["tensors"]:
        values = [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        if tag.endswith("/text_summary"):
            shown[tag] = [(step, value.item().decode()) for step, value in values]
        elif tag.startswith("validation/"):  # width, height, image
            shown[tag] = [(step, np.asarray(Image.open(BytesIO(value[2])))) for step, value in values]
        elif not tag.startswith("_"):
            shown[tag] = [(step, value.item()) for step, value in values]
    for tag, entries in shown.items():
        assert [step for step, _ in entries] == sorted({step for step, _ in entries}), tag
    return {tag: dict(entries) for tag, entries in shown.items()}


def read_wandb(folder):
    """The records of wandb's offline file. It is in LevelDB's log format: fragments with a header of 7 bytes,
    in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = folder.glob("wandb/offline-run-*/*.wandb")
    data = max(files, key=lambda file: file.parent.name).read_bytes()
    at, payload = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        payload += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last fragment of one
            yield Record.FromString(payload)
            payload = b""


# --------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_shows_what_loss_jsonl_and_samples_hold(uninterrupted):
    shown = read_tensorboard(uninterrupted.folder)
    for column in (*TRAIN_METRICS, *VAL_METRICS):
        numbers = read_curve(uninterrupted.folder, column)
        assert list(numbers) == (VALIDATED if column in VAL_METRICS else list(range(1, 8))), column
        assert shown[column] == pytest.approx(numbers, rel=1e-6), column
    samples = read_samples(uninterrupted.folder)
    assert list(samples) == list(itertools.product(VALIDATED, range(3)))
    for index, prompt in enumerate(PROMPTS):
        images = {(step, index): image for step, image in shown[f"validation/{index}"].items()}
        assert equal_images(images, {key: image for key, image in samples.items() if key[1] == index})
        assert shown[f"validation/{index}/text_summary"] == dict.fromkeys(VALIDATED, prompt)


def test_wandb_has_what_loss_jsonl_and_samples_hold(uninterrupted):
    logged, settings = {}, {}
    for record in read_wandb(uninterrupted.wandb):
        items = record.history.item
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        for name, value in values.items():
            first = logged.setdefault(name, {}).setdefault(values["_step"], value)
            assert first == value, "a step comes once"
        settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
    for column in (*TRAIN_METRICS, *VAL_METRICS):
        assert logged[column] == pytest.approx(read_curve(uninterrupted.folder, column), rel=1e-6), column

    assert logged["validation/captions"] == dict.fromkeys(VALIDATED, PROMPTS)
    files = {
        str(path.relative_to(folder)): path
        for folder in uninterrupted.wandb.glob("wandb/offline-run-*/files")
        for path in folder.rglob("*.png")
    }
    shown = {
        (step, index): np.asarray(Image.open(files[name]))
        for step, names in logged["validation/filenames"].items()
        for index, name in enumerate(names)
    }
    assert equal_images(shown, read_samples(uninterrupted.folder))

    assert settings["learning_rate"] == 3e-4
    assert settings["seed"] == 0
    assert settings["validation_prompts"] == str(PROMPTS)
    assert "hub_token" not in settings


class Comet(ModuleType):
    """A stand-in for comet_ml that records what is logged."""

    __version__ = "3.50.0"

    def __init__(self):
        super().__init__("comet_ml")
        self.logged = {"parameters": {}, "numbers": [], "images": []}

    def start(self, project_name):
        return self

    def set_step(self, step):
        pass

    def log_parameters(self, values):
        self.logged["parameters"] |= values

    def log_metric(self, name, value, step=None):
        self.logged["numbers"].append((name, value, step))

    def log_image(self, image_data, name=None, overwrite=False, image_format="png", step=None):
        self.logged["images"].append((name, step, np.asarray(image_data)))

    def end(self):
        torch.save(self.logged, os.environ["LOGGED"])


class Trackio(ModuleType):
    """A stand-in for trackio 0.43, which ignores what is neither a number, a string nor one of its own
    objects.

    A list of its images is ignored, too: it warns "Type is not JSON serializable: TrackioImage", and drops
    the key.
    """

    class Image:
        def __init__(self, value, caption=None):
            self.value, self.caption = value, caption

    def __init__(self):
        super().__init__("trackio")
        self.config = {}
        self.logged = {"parameters": self.config, "numbers": [], "images": []}

    def init(self, project):
        self.config.clear()
        return self

    def log(self, metrics, step=None):
        for name, value in metrics.items():
            if isinstance(value, self.Image):
                self.logged["images"].append((name, value.caption, step, np.asarray(value.value)))
            elif isinstance(value, (int, float, str)):
                self.logged["numbers"].append((name, value, step))

    def finish(self):
        torch.save(self.logged, f"{os.environ['LOGGED']}.trackio")


def install_stand_ins(file):
    """Puts stand-ins for trackers where Accelerate looks for them; what is logged is written to `file`."""
    os.environ["LOGGED"] = str(file)
    sys.modules |= {"comet_ml": Comet(), "trackio": Trackio()}
    sys.modules |= {"dvclive": MagicMock(), "dvclive.plots": MagicMock()}
    sys.modules["dvclive.plots"].Metric.could_log = lambda value: True
    available = map(LoggerType, ("tensorboard", "comet_ml", "trackio", "dvclive"))
    accelerate.tracking.get_available_trackers()[:] = available


@pytest.fixture(scope="module")
def several_trackers(start_run, tmp_path_factory):
    """A run with several trackers at once, and what was logged to comet_ml and trackio."""
    file = tmp_path_factory.mktemp("logged") / "logged.pt"
    flags = {"validation_prompts": PROMPTS[:2], "max_train_steps": 2, "hub_token": TOKEN}
    flags["report_to"] = "comet_ml,trackio,dvclive,tensorboard"
    run = start_run(patch=functools.partial(install_stand_ins, file), **RUN | flags)
    assert run.returncode == 0, run
    return SimpleNamespace(
        run=run,
        comet_ml=torch.load(file, weights_only=False),
        trackio=torch.load(f"{file}.trackio", weights_only=False),
    )


@pytest.mark.parametrize("name", ["comet_ml", "trackio"])
def test_each_of_several_trackers_gets_the_numbers_and_the_settings(several_trackers, name):
    logged, folder = getattr(several_trackers, name), several_trackers.run.folder
    for column in (*TRAIN_METRICS, "val_loss"):
        numbers = [(step, value) for tag, value, step in logged["numbers"] if tag == column]
        assert numbers == list(read_curve(folder, column).items()), column
        assert read_tensorboard(folder)[column] == pytest.approx(dict(numbers), rel=1e-6)
    assert logged["parameters"]["learning_rate"] == 3e-4
    assert logged["parameters"]["seed"] == 0
    assert TOKEN not in str(logged["parameters"])


def test_comet_ml_gets_the_images_with_their_prompts(several_trackers):
    images = several_trackers.comet_ml["images"]
    shown = {(step, PROMPTS.index(prompt)): image for prompt, step, image in images}
    assert len(images) == 4
    assert equal_images(shown, read_samples(several_trackers.run.folder))


def test_trackio_gets_the_images_with_their_prompts(several_trackers):
    images = several_trackers.trackio["images"]
    shown = {(step, PROMPTS.index(prompt)): image for _, prompt, step, image in images}
    assert len(images) == 4
    assert equal_images(shown, read_samples(several_trackers.run.folder))
    assert len({(name, step) for name, _, step, _ in images}) == 4, "each under a name of its own"


def test_a_tracker_that_the_script_does_not_know_gets_no_images_and_a_warning_says_so(several_trackers):
    lines = several_trackers.run.output.splitlines()
    messages = [line for line in lines if "dvclive" in line and "WARNING" in line]
    assert len(messages) == 2, "one for each validation"
    assert all("samples/" in message for message in messages)


def fail_to_log_images():
    """As wandb does on a full disk, to which it copies each image."""

    def log_images(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    accelerate.tracking.TensorBoardTracker.log_images = log_images


def test_a_tracker_that_fails_to_log_an_image_does_not_end_the_run(start_run):
    flags = {"validation_prompts": PROMPTS[:1], "max_train_steps": 2, "report_to": "tensorboard"}
    run = start_run(patch=fail_to_log_images, **RUN | flags)
    assert run.returncode == 0, run
    messages = [line for line in run.output.splitlines() if "No space left" in line and "WARNING" in line]
    assert len(messages) == 1, "once, of two validations"
    assert list(read_curve(run.folder, "val_loss")) == [0, 2]


# --------------------------------------------------------------------------------------------------- samples/


def test_samples_contain_their_prompt_and_the_settings(uninterrupted):
    files = list((uninterrupted.folder / "samples").glob("step-*"))
    assert len(files) == 15
    for path in files:
        text = Image.open(path).text
        assert text["prompt"] == PROMPTS[int(path.stem[-1])]
        for setting in (
            r"learning_rate\W+0\.0003",
            r"resolution\W+64",
            r"--use_ema\b",
            r"loss_weighting\W+p2",
        ):
            assert re.search(setting, text["settings"]), setting
        assert TOKEN not in str(text)


def test_a_run_says_what_it_left_and_what_comes_next(uninterrupted):
    text = uninterrupted.output
    rows = [json.loads(line) for line in (uninterrupted.folder / "loss.jsonl").read_text().splitlines()]
    last = max(row["step"] for row in rows)
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    for step, loss in losses.items():
        assert f"Held-out loss at step {step}: {loss:.4f}\n" in text
    summary = text[text.index("INFO [RANK 0] Done\n") :]
    assert re.search(rf"^  {last} steps in \d+ seconds, [\d.]+ images/s$", summary, re.MULTILINE)
    assert f"  held-out loss: {losses[0]:.4f} at step 0, {losses[last]:.4f} at step {last}\n" in summary
    for path in re.findall(rf"{re.escape(str(uninterrupted.folder))}[\w./-]*", summary):
        assert os.path.exists(path), path
    assert "samples/contact-sheet.png" in summary and "loss.png" in summary and "README.md" in summary
    assert f"--resume_from_checkpoint=latest and --max_train_steps={2 * last}\n" in summary


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 seconds"),
        (59, "59 seconds"),
        (90, "1.5 minutes"),
        (3500, "58.3 minutes"),
        (5400, "1.5 hours"),
    ],
)
def test_durations_have_a_unit_that_fits(seconds, text):
    assert script.format_duration(seconds) == text


def write_sample(folder, step, prompt_index, image, prompt):
    file = folder / "samples" / f"step-{step:07d}-prompt-{prompt_index}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_itxt("prompt", prompt)
    image.save(file, pnginfo=text)


@pytest.fixture
def parsed_args(tmp_path):
    PartialState()  # the logger needs it
    return script.parse_args(
        ["--train_data_dir=images", f"--output_dir={tmp_path}", "--validation_prompts", "an owl"]
    )


def test_samples_that_cannot_be_written_are_a_warning(parsed_args, tmp_path, caplog):
    (tmp_path / "samples").write_text("a file where the folder should be")
    script.log_images(SimpleNamespace(trackers=[]), parsed_args, [Image.new("RGB", (8, 8))], 0)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "samples/" in message
    assert "FileExistsError" in message


# ------------------------------------------------------------------------------------------ the contact sheet


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that the script has written."""
    figures, save_figure = [], script.save_figure

    def record_figure(figure, file):
        save_figure(figure, file)
        figures.append(figure)

    monkeypatch.setattr(script, "save_figure", record_figure)
    return figures


def read_pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def cell_colour(column, row):
    """A colour that tells a cell of the contact sheet apart; no text, background or blend with white has
    it."""
    return (20 * column, 25 * row, 128)


def find_cells(sheet, num_rows, num_columns):
    """Where a contact sheet of images in `cell_colour` has them: {(column, row): (left, top, right,
    bottom)}."""
    nearest = np.stack([sheet[..., 0] / 20, sheet[..., 1] / 25], axis=-1).round().astype(int)
    column, row = nearest[..., 0], nearest[..., 1]
    colour = np.stack([20 * column, 25 * row, np.full_like(row, 128)], axis=-1)
    index = np.where((np.abs(sheet - colour) <= 2).all(axis=2), row * 100 + column, -1)
    cells = {}
    for column, row in itertools.product(range(num_columns), range(num_rows)):
        rows, columns = np.nonzero(index == row * 100 + column)
        assert len(rows), f"the image in column {column} of row {row} is missing"
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert len(rows) == (right - left) * (bottom - top), "an unbroken rectangle"
        cells[column, row] = (left, top, right, bottom)
    return cells


def draw_sheet(folder, prompts, steps, size=(64, 64)):
    """Draws a contact sheet of images in `cell_colour`, and returns its pixels and cells."""
    for (column, step), row in itertools.product(enumerate(steps), range(len(prompts))):
        write_sample(folder, step, row, Image.new("RGB", size, cell_colour(column, row)), prompts[row])
    script.save_contact_sheet(folder, prompts)
    sheet = read_pixels(folder / "samples" / "contact-sheet.png")
    return sheet, find_cells(sheet, len(prompts), len(steps))


def to_pixels(figure):
    """A function from points of a figure that has been saved, cropped to its content, to (x, y) in the
    image."""
    crop = figure.get_tightbbox().padded(0.1)  # matplotlib's savefig.pad_inches
    return lambda x, y: (x - crop.x0 * figure.dpi, crop.y1 * figure.dpi - y)


def text_boxes(figure):
    """The texts of a figure that has been saved: [(text, (left, top, right, bottom))] in pixels."""
    boxes, convert = [], to_pixels(figure)
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text():
            box = text.get_window_extent()
            boxes.append((text.get_text(), (*convert(box.x0, box.y1), *convert(box.x1, box.y0))))
    return boxes


def is_text(pixels):
    """Where dark pixels are."""
    return (pixels.max(axis=-1) < 128).any()


@pytest.mark.parametrize(
    "prompts, steps",
    [
        (["a red apple"], [0]),
        (["a red apple", "an owl at night, in the rain, under a street lamp"], [0, 100, 200, 300, 1234567]),
        (["one", "two", "three", "four", "five", "six", "seven", "eight"], list(range(0, 1200, 100))),
    ],
    ids=["1 x 1", "2 x 5", "8 x 12"],
)
def test_the_contact_sheet_is_a_labelled_grid_of_prompts_by_steps(tmp_path, figures, prompts, steps):
    sheet, cells = draw_sheet(tmp_path, prompts, steps)
    (figure,) = figures
    lefts, tops, rights, bottoms = zip(*cells.values(), strict=True)
    sides = [right - left for left, right in zip(lefts, rights, strict=True)]
    sides += [bottom - top for top, bottom in zip(tops, bottoms, strict=True)]
    assert min(sides) > 150, "large enough to see something"
    assert max(sides) - min(sides) <= 2, "squares of one size"
    assert sheet.shape[0] < 1.3 * min(sides) * (len(prompts) + 0.2)
    assert sheet.shape[1] < 1.1 * min(sides) * (len(steps) + 1)
    for column, row in cells:
        left, top, right, bottom = cells[column, row]
        assert (left, right) == (cells[column, 0][0], cells[column, 0][2]), "columns are straight"
        assert (top, bottom) == (cells[0, row][1], cells[0, row][3]), "and so are rows"
        assert column == 0 or left >= cells[column - 1, row][2], "one step after the other"
        assert row == 0 or top >= cells[column, row - 1][3], "one prompt below the other"

    labels = [(" ".join(text.split()), box) for text, box in text_boxes(figure)]
    assert sorted(text for text, _ in labels) == sorted([*prompts, *(f"step {step}" for step in steps)])
    first_left, first_top = cells[0, 0][:2]
    for text, (left, top, right, bottom) in labels:
        assert min(left, top) >= 0 and right <= sheet.shape[1], f"{text!r} is cut off"
        assert is_text(sheet[int(top) : int(bottom) + 1, int(left) : int(right) + 1]), text
        if text in prompts:
            cell = cells[0, prompts.index(text)]
            assert right <= first_left, f"{text!r} runs into the images"
            assert cell[1] <= top and bottom <= cell[3], "beside its row"
        else:
            cell = cells[steps.index(int(text.removeprefix("step "))), 0]
            assert bottom <= first_top, f"{text!r} runs into the images"
            assert (left + right) / 2 == pytest.approx((cell[0] + cell[2]) / 2, abs=3), "above its column"


def shrink(pixels):
    """The mean colours of 12 x 12 areas of an image."""
    image = Image.fromarray(pixels.astype(np.uint8)).resize((12, 12), Image.Resampling.BOX)
    return np.asarray(image).astype(int)


def test_each_cell_of_the_contact_sheet_is_the_scaled_sample(tmp_path, pictures):
    steps = [0, 5, 10, 15]
    _, cells = draw_sheet(tmp_path / "cells", PROMPTS, steps)
    files, samples = sorted(pictures.glob("*.png")) + sorted(pictures.glob("*.jpg")), {}
    for (step, row), file in zip(itertools.product(steps, range(3)), files[:12], strict=True):
        image = Image.open(file).convert("RGB").resize((256, 256))
        write_sample(tmp_path, step, row, image, PROMPTS[row])
        samples[step, row] = np.asarray(image)
    script.save_contact_sheet(tmp_path, PROMPTS)
    sheet = read_pixels(tmp_path / "samples" / "contact-sheet.png")
    for (column, row), (left, top, right, bottom) in cells.items():
        shown = shrink(sheet[top:bottom, left:right])
        distances = {key: np.abs(shrink(sample) - shown).mean() for key, sample in samples.items()}
        assert min(distances, key=distances.get) == (steps[column], row)
        assert distances[steps[column], row] < 4, "of 255"


def test_the_runs_contact_sheet_shows_its_samples(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.folder / "samples", tmp_path / "samples")
    (tmp_path / "samples" / "contact-sheet.png").unlink()
    script.save_contact_sheet(tmp_path, PROMPTS)
    sheets = [
        read_pixels(path / "samples" / "contact-sheet.png") for path in (uninterrupted.folder, tmp_path)
    ]
    assert np.array_equal(*sheets)
    (tmp_path / "samples" / "step-0000004-prompt-1.png").unlink()
    script.save_contact_sheet(tmp_path, PROMPTS)
    assert not np.array_equal(sheets[0], read_pixels(tmp_path / "samples" / "contact-sheet.png"))


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 23, 24, 25, 36, 144, 150])
def test_the_contact_sheet_keeps_to_its_columns_and_to_the_first_and_last_step(
    parsed_args, tmp_path, figures, count
):
    """Each step's image is of one colour, which says which one it is."""
    images = [Image.new("RGB", (16, 16), (step, 255, 0)) for step in range(count)]
    for step, image in enumerate(images[:-1]):
        write_sample(tmp_path, 100 * step, 0, image, "an owl")
    script.log_images(SimpleNamespace(trackers=[]), parsed_args, images[-1:], 100 * (count - 1))
    sheet = read_pixels(tmp_path / "samples" / "contact-sheet.png")
    line = sheet[sheet.shape[0] - 40].tolist()
    runs = [(pixel, len(list(run))) for pixel, run in itertools.groupby(line)]
    shown = [red for (red, green, blue), length in runs if green > blue and length > 100]
    assert len(shown) == min(count, 12)
    assert shown == sorted(set(shown))
    assert (shown[0], shown[-1]) == (0, count - 1)
    gaps = np.diff(shown)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1, "evenly spaced"
    labels = [text for text, _ in text_boxes(figures[0]) if text.startswith("step ")]
    assert labels == [f"step {100 * step}" for step in shown]


@pytest.mark.parametrize(("num_prompts", "shown"), [(2, 12), (5, 6), (9, 3)])
def test_of_many_prompts_the_contact_sheet_shows_fewer_steps(tmp_path, figures, num_prompts, shown):
    prompts = [f"prompt {index}" for index in range(num_prompts)]
    for step in range(20):
        for index, prompt in enumerate(prompts):
            write_sample(tmp_path, step, index, Image.new("RGB", (16, 16)), prompt)
    script.save_contact_sheet(tmp_path, prompts, max_images=30, cell=48)
    labels = [text for text, _ in text_boxes(figures[0]) if text.startswith("step ")]
    assert len(labels) == shown and (labels[0], labels[-1]) == ("step 0", "step 19")


def test_a_missing_sample_leaves_its_cell_empty(tmp_path):
    """Where validation failed once, or where a prompt was added later."""
    sheet, cells = draw_sheet(tmp_path, PROMPTS, [0, 5, 10])
    (tmp_path / "samples" / "step-0000005-prompt-1.png").unlink()
    script.save_contact_sheet(tmp_path, PROMPTS)
    after = read_pixels(tmp_path / "samples" / "contact-sheet.png")
    for cell, (left, top, right, bottom) in cells.items():
        inside = (slice(top + 4, bottom - 4), slice(left + 4, right - 4))  # not its blurred edges
        assert np.array_equal(
            after[inside], np.full_like(sheet[inside], 255) if cell == (1, 1) else sheet[inside]
        )


HARD_PROMPTS = [
    "costs $5 and $10",
    "$\\frac{1}{2}$",
    "$unbalanced {",
    "snake_case^2 \\alpha % & # ~",
    "an owl 🦉 at night 👩\u200d🚀",
    "雪の結晶",
    "مرحبا بالعالم",
    "first line\nsecond line\r\n\tthird",
    "W" * 200,
    "",
    "a very long prompt " * 30,
]


@pytest.mark.filterwarnings("ignore:Glyph")  # where the test itself measures the texts
@pytest.mark.parametrize("prompt", HARD_PROMPTS, ids=range(len(HARD_PROMPTS)))
def test_the_contact_sheet_shows_any_prompt_literally_and_without_warnings(tmp_path, figures, caplog, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, cells = draw_sheet(tmp_path, [prompt, "an owl"], [0, 5])
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    texts = {" ".join(text.split()): box for text, box in text_boxes(figures[0])}
    assert texts.keys() >= {"an owl", "step 0", "step 5"}
    labels = texts.keys() - {"an owl", "step 0", "step 5"}
    shown, whole = "".join(labels).replace(" ", ""), "".join(prompt.split())
    assert shown == whole or (whole.startswith(shown.removesuffix("...")) and len(shown) > 100)
    if not prompt:
        return
    (box,) = (texts[label] for label in labels)
    assert cells[0, 0][1] <= box[1] and box[3] <= cells[0, 0][3], "beside its row"


def test_dollar_signs_in_a_prompt_are_no_mathematics(tmp_path, figures):
    """As mathematics, `$x_x$` would be drawn as an x with an index, without dollar signs."""
    widths = {}
    for prompt in ("x_x", "$x_x$"):
        draw_sheet(tmp_path / prompt, [prompt], [0])
        (box,) = (box for text, box in text_boxes(figures[-1]) if text == prompt)
        widths[prompt] = box[2] - box[0]
    assert widths["$x_x$"] > widths["x_x"]


# --------------------------------------------------------------------------------- loss.jsonl and the curve


@pytest.fixture
def log_to(tmp_path):
    """log_to(metrics, step): log_metrics to loss.jsonl in `tmp_path`, without trackers."""
    PartialState()  # the logger needs it
    accelerator = SimpleNamespace(log=lambda *_, **__: None, is_main_process=True, project_dir=tmp_path)
    return functools.partial(script.log_metrics, accelerator)


def lines_of(axes):
    """The data of a plot's lines by their labels, [(step, loss)]."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_the_loss_of_a_single_step_is_visible(tmp_path, log_to, figures):
    log_to({"train_loss": 0.5}, 1)
    script.save_loss_curve(tmp_path)
    (axes,) = figures[-1].axes
    markers = {line.get_label(): line.get_marker() for line in axes.get_lines()}
    assert markers["training loss"] == "o"
    log_to({"train_loss": 0.4}, 2)
    script.save_loss_curve(tmp_path)
    assert figures[-1].axes[0].get_lines()[0].get_marker() == "None"


def is_near(pixels, axes, point, colour):
    """Whether there is a pixel of a colour within two pixels of a point of a plot."""
    column, row = map(round, to_pixels(axes.figure)(*axes.transData.transform(point)))
    area = pixels[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
    return (np.abs(area - 255 * np.array(to_rgb(colour))) < 30).all(axis=2).any()


def test_the_curve_goes_through_the_numbers(log_to, tmp_path, figures):
    """The training loss is 1 for 50 steps and then 0.5, so its running mean falls by 2 % of the rest."""
    losses = [1.0] * 50 + [0.5] * 150
    means = [1.0] * 50 + [0.5 + 0.5 * 0.98**step for step in range(1, 151)]
    held_out = {0: 1.1, 100: 0.9, 200: 0.3}
    log_to({"val_loss": held_out[0]}, 0)
    for step, loss in enumerate(losses, 1):
        log_to({"train_loss": loss}, step)
        if step in held_out:
            log_to({"val_loss": held_out[step]}, step)
    script.save_loss_curve(tmp_path)
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    lines, steps = lines_of(axes), range(1, 201)
    assert lines["training loss"] == list(zip(steps, losses, strict=True))
    assert [step for step, _ in lines["training loss, running mean"]] == list(steps)
    assert [mean for _, mean in lines["training loss, running mean"]] == pytest.approx(means, abs=1e-9)
    assert lines["held-out loss"] == list(held_out.items())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)

    # And the image shows them.
    pixels = read_pixels(tmp_path / "loss.png")
    for point in held_out.items():
        assert is_near(pixels, axes, point, "tab:red"), point
    for step in (2, 20, 30, 60, 80, 120, 160, 199):
        assert is_near(pixels, axes, (step, means[step - 1]), "tab:blue"), step
    for step in (70, 120, 180):
        assert is_near(pixels, axes, (step, 0.5), "lightgray"), step
    assert not is_near(pixels, axes, (150, 0.15), "tab:blue"), "this can tell"


def test_the_curve_of_a_long_run_reads_evenly_spaced_steps(log_to, tmp_path, figures, monkeypatch):
    """But all held-out losses."""
    monkeypatch.setattr(script, "MAX_CURVE_POINTS", 100)
    with open(tmp_path / "loss.jsonl", "w") as file:
        for step in range(1, 951):
            file.write(json.dumps({"step": step, "train_loss": 1 / step}) + "\n")
            if step % 7 == 0:
                file.write(json.dumps({"step": step, "val_loss": 2 / step}) + "\n")
    script.save_loss_curve(tmp_path)
    lines = lines_of(figures[0].axes[0])
    assert lines["training loss"] == [(step, 1 / step) for step in range(1, 951, 10)]
    assert lines["held-out loss"] == [(step, 2 / step) for step in range(7, 951, 7)]


def test_outliers_of_single_steps_do_not_flatten_the_curve(log_to, tmp_path, figures):
    for step in range(1, 101):
        log_to({"train_loss": 1000.0 if step == 60 else 0.01}, step)
        log_to({"val_loss": 0.02}, step)
    script.save_loss_curve(tmp_path)
    (axes,) = figures[0].axes
    lowest, highest = axes.get_ylim()
    assert lowest == 0
    assert 20 < highest < 25, "the running mean rises to 20, and just fits"


@pytest.mark.parametrize("metrics", [{}, {"train_loss": 0.5}, {"val_loss": 0.5}], ids=str)
def test_the_curve_of_a_run_that_has_only_begun_is_drawn_without_warnings(log_to, tmp_path, caplog, metrics):
    log_to(metrics, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        script.save_loss_curve(tmp_path)
    width, height = Image.open(tmp_path / "loss.png").size
    assert 800 < width <= 1000 and 400 < height <= 500
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_loss_that_is_not_finite_does_not_keep_the_curve_from_being_drawn(log_to, tmp_path, figures):
    """As fp16's loss may be in a step that the gradient scaler skips."""
    for step, loss in enumerate([0.5, 0.4, float("nan"), 0.3, float("inf"), 0.2], 1):
        log_to({"train_loss": loss}, step)
        log_to({"val_loss": loss}, step)
    script.save_loss_curve(tmp_path)
    (axes,) = figures[0].axes
    for label, points in lines_of(axes).items():
        assert {step for step, loss in points if np.isfinite(loss)} == {1, 2, 4, 6}, label
    assert np.isfinite(axes.get_ylim()).all()


def test_the_runs_curve_shows_its_loss_jsonl(uninterrupted, tmp_path, figures):
    shutil.copy(uninterrupted.folder / "loss.jsonl", tmp_path)
    script.save_loss_curve(tmp_path)
    (axes,) = figures[0].axes
    train_losses = list(read_curve(tmp_path, "train_loss").items())
    lines = lines_of(axes)
    assert lines["training loss"] == train_losses
    means = [np.mean([loss for _, loss in train_losses[:count]]) for count in range(1, 8)]
    assert [mean for _, mean in lines["training loss, running mean"]] == pytest.approx(means)
    assert lines["held-out loss"] == list(read_curve(tmp_path, "val_loss").items())
    drawn_by_run = read_pixels(uninterrupted.folder / "loss.png")
    assert np.array_equal(drawn_by_run, read_pixels(tmp_path / "loss.png"))
    for colour in ("tab:blue", "tab:red", "lightgray"):
        matches = np.abs(drawn_by_run - 255 * np.array(to_rgb(colour))) < 1
        assert matches.all(axis=2).any(), colour


def test_logs_that_cannot_be_written_are_a_warning(log_to, tmp_path, caplog):
    for name in ("loss.jsonl", "loss.png"):
        (tmp_path / name).mkdir()
    log_to({"train_loss": 0.5}, 1)
    script.save_loss_curve(tmp_path)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for name, message in zip(("loss.jsonl", "loss.png"), messages, strict=True):
        assert f"Writing {name} failed, the run continues: IsADirectoryError" in message


# ------------------------------------------------------------------------------ resuming and starting again


def assert_logged_alike(folder, expected):
    """loss.jsonl, TensorBoard and samples/ have each step once, with the numbers and images of the run in
    `expected`."""
    for column in (*TRAIN_METRICS, *VAL_METRICS):
        if column == "images_per_second":
            assert list(read_curve(folder, column)) == list(read_curve(expected, column))
        else:
            assert read_curve(folder, column) == read_curve(expected, column), column
    assert equal_images(read_samples(folder), read_samples(expected))
    shown, right = read_tensorboard(folder), read_tensorboard(expected)
    assert shown.keys() == right.keys()
    for tag in shown.keys() - {"images_per_second"}:
        if tag.startswith("validation/") and not tag.endswith("text_summary"):
            assert equal_images(shown[tag], right[tag]), tag
        else:
            assert shown[tag] == right[tag], tag
    for name in ("samples/contact-sheet.png", "loss.png"):
        assert np.array_equal(read_pixels(folder / name), read_pixels(expected / name)), name


@pytest.fixture(scope="module")
def killed_and_resumed(start_run):
    """A run that is killed in step 6, when checkpoint-3 is its last, and its continuation."""
    killed = start_run(patch=functools.partial(kill_in_step, 6), **TRACKED)
    assert killed.returncode == -signal.SIGKILL, killed
    assert max(read_curve(killed.folder, "train_loss")) == 5
    assert max(read_curve(killed.folder, "val_loss")) == 4
    resumed = start_run(killed.folder, **TRACKED, resume_from_checkpoint="latest")
    assert resumed.returncode == 0, resumed
    assert "Training from step 3 to 7" in resumed.output
    return killed, resumed


@pytest.mark.slow
def test_a_killed_and_resumed_run_logs_each_step_once_with_the_uninterrupted_runs_numbers(
    killed_and_resumed, uninterrupted
):
    assert_logged_alike(killed_and_resumed[1].folder, uninterrupted.folder)


@pytest.mark.slow
def test_a_resumed_run_continues_its_wandb_run(killed_and_resumed, uninterrupted):
    ids = []
    for run in (*killed_and_resumed, uninterrupted):
        (name,) = {path.name.rpartition("-")[2] for path in run.wandb.glob("wandb/offline-run-*")}
        ids.append(name)
    assert ids[0] == ids[1] != ids[2]
    records = list(read_wandb(killed_and_resumed[1].wandb))
    assert {record.run.run_id for record in records if record.run.run_id} == {ids[0]}
    steps = {record.history.step.num for record in records} - {0}
    assert steps == {4, 5, 6, 7}, "what follows checkpoint-3"


@pytest.mark.slow
def test_a_run_killed_while_it_validates_lacks_no_validation(start_run, uninterrupted, tmp_path):
    """It validates at step 6, after it has saved checkpoint-6, from which it is resumed."""
    folder = tmp_path / "run"
    flags = TRACKED | {"report_to": "tensorboard", "resume_from_checkpoint": "latest"}
    shutil.copytree(uninterrupted.folder, folder)
    shutil.rmtree(folder / "checkpoint-6")
    shutil.rmtree(folder / "checkpoint-7")
    killed = start_run(folder, patch=functools.partial(kill_in_validation, 6), **flags)
    assert killed.returncode == -signal.SIGKILL, killed
    assert max(read_curve(folder, "train_loss")) == 6
    assert max(read_curve(folder, "val_loss")) == 4
    resumed = start_run(folder, **flags)
    assert resumed.returncode == 0, resumed
    assert "Training from step 6 to 7" in resumed.output
    assert_logged_alike(folder, uninterrupted.folder)


@pytest.mark.parametrize("torn", ['{"step": 4, "train_l', "\0" * 40], ids=["cut off", "zeros"])
def test_a_last_line_truncated_by_a_power_failure_does_not_keep_a_run_from_resuming(
    uninterrupted, tmp_path, torn
):
    lines = (uninterrupted.folder / "loss.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "loss.jsonl").write_text("".join(lines) + torn)
    script.truncate_logs(tmp_path, 3)
    script.save_loss_curve(tmp_path)
    assert (tmp_path / "loss.png").exists()
    for name in ("train_loss", "val_loss"):
        numbers = read_curve(uninterrupted.folder, name).items()
        assert read_curve(tmp_path, name) == {step: number for step, number in numbers if step <= 3}


def test_resuming_a_finished_run_logs_no_step_twice(start_run, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    flags = TRACKED | {"report_to": "tensorboard", "max_train_steps": 6}
    shutil.copytree(uninterrupted.folder, folder)
    shutil.rmtree(folder / "checkpoint-7")
    resumed = start_run(folder, **flags, resume_from_checkpoint="latest")
    assert resumed.returncode == 0, resumed
    assert "nothing is left to train" in resumed.output
    for name in ("train_loss", "val_loss"):
        numbers = read_curve(uninterrupted.folder, name).items()
        before = {step: number for step, number in numbers if step <= 6}
        assert read_curve(folder, name) == before
        assert read_tensorboard(folder)[name] == pytest.approx(before, rel=1e-6)
    images = {key: image for key, image in read_samples(uninterrupted.folder).items() if key[0] <= 6}
    assert equal_images(read_samples(folder), images)


def test_overwriting_the_output_folder_starts_all_logs_again(start_run, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.folder, folder)
    flags = {"max_train_steps": 2, "validation_prompts": PROMPTS[:1], "seed": 1, "report_to": "tensorboard"}
    run = start_run(folder, **RUN | flags, overwrite_output_dir=True)
    assert run.returncode == 0, run
    assert list(read_curve(folder, "train_loss")) == [1, 2]
    assert list(read_curve(folder, "val_loss")) == [0, 2]
    images, shown = read_samples(folder), read_tensorboard(folder)
    assert list(images) == [(0, 0), (2, 0)]
    for column in ("train_loss", "val_loss", "lr"):
        assert shown[column] == pytest.approx(read_curve(folder, column), rel=1e-6)
    assert equal_images(shown["validation/0"], {step: image for (step, _), image in images.items()})
    assert shown.get("validation/1", {}) == {}
    sheet = read_pixels(folder / "samples" / "contact-sheet.png")
    blank, _ = draw_sheet(tmp_path / "blank", PROMPTS[:1], [0, 2])
    assert sheet.shape == blank.shape, "one prompt and two steps"


def test_logs_of_an_older_version_are_continued(tmp_path, log_to):
    """It said "update" for a step, in loss.jsonl and in the names of samples."""
    rows = [{"update": step, "train_loss": 1 / step} for step in range(1, 7)]
    rows += [{"update": step, "val_loss": 2 / step} for step in (2, 4, 6)]
    (tmp_path / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "samples").mkdir()
    images = {
        (step, index): np.full((8, 8, 3), 30 * step + index, np.uint8)
        for step in (2, 4, 6)
        for index in (0, 1)
    }
    for (step, index), image in images.items():
        Image.fromarray(image).save(tmp_path / "samples" / f"update-{step:07d}-prompt-{index}.png")
    script.truncate_logs(tmp_path, 4)
    log_to({"train_loss": 0.125}, 5)
    assert read_curve(tmp_path, "train_loss") == {1: 1.0, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4, 5: 0.125}
    assert read_curve(tmp_path, "val_loss") == {2: 1.0, 4: 0.5}
    assert equal_images(read_samples(tmp_path), {key: image for key, image in images.items() if key[0] <= 4})


TOKEN = "hf_xKqTbWnVmZsLpRdFgHjY"


@pytest.fixture
def tensorboard_run(finished_runs, run_main, models, pictures, tmp_path_factory):
    """The output_dir of a run with TensorBoard, and its events."""
    if "tensorboard" not in finished_runs:
        output_dir = tmp_path_factory.mktemp("tensorboard") / "out"
        args = tiny_args(
            models,
            pictures,
            output_dir,
            report_to="tensorboard",
            validation_prompts=["a red apple", "new moon"],
            validation_epochs=1,
            max_train_samples=8,
            max_train_steps=5,
            gradient_accumulation_steps=2,
            train_batch_size=2,
            hub_token=TOKEN,
        )
        done = run_main(args)
        assert done.returncode == 0, done
        folder = output_dir / "logs" / "text2image-fine-tune"
        limits = {"scalars": 0, "images": 0, "tensors": 0}
        events = event_accumulator.EventAccumulator(str(folder), limits).Reload()
        finished_runs["tensorboard"] = output_dir, events
    return finished_runs["tensorboard"]


@pytest.mark.parametrize("tag", ["train_loss", "lr", "grad_norm"])
def test_tensorboard_has_each_metric_once_per_step(tensorboard_run, tag):
    _, events = tensorboard_run
    scalars = events.Scalars(tag)
    assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(scalar.value) and scalar.value > 0 for scalar in scalars)


def test_tensorboard_has_the_images_in_samples_and_their_prompts(tensorboard_run):
    output_dir, events = tensorboard_run
    samples = {path.name for path in (output_dir / "samples").glob("step-*")}
    assert samples == {f"step-{step:07d}-prompt-{index}.png" for step in (0, 2, 4, 5) for index in (0, 1)}
    for index, prompt in enumerate(("a red apple", "new moon")):
        images = events.Images(f"validation/{index}")
        assert [image.step for image in images] == [0, 2, 4, 5]
        for image in images:
            file = output_dir / "samples" / f"step-{image.step:07d}-prompt-{index}.png"
            logged = Image.open(BytesIO(image.encoded_image_string))
            assert np.array_equal(np.asarray(logged), np.asarray(Image.open(file)))
        texts = events.Tensors(f"validation/{index}/text_summary")
        assert [text.tensor_proto.string_val[0].decode() for text in texts] == [prompt] * 4


def test_tensorboard_has_the_settings_without_the_token(tensorboard_run):
    output_dir, _ = tensorboard_run
    (settings,) = (output_dir / "logs").rglob("hparams.yml")
    text = settings.read_text()
    assert re.search(r"^learning_rate: 0.0001$", text, re.MULTILINE)
    assert re.search(r"^seed: 0$", text, re.MULTILINE)
    assert "hub_token" not in text
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
