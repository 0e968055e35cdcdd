# SPDX-License-Identifier: Apache-2.0
"""What a run logs: trackers, loss.jsonl, samples/, the contact sheet and the loss curve. What one place shows
is compared with the others, what is drawn with the files it is drawn from, and a resumed run with an
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
import sys
import warnings
from types import SimpleNamespace
from unittest.mock import MagicMock

import accelerate.tracking
import numpy as np
import pytest
import torch
from accelerate.utils import LoggerType
from conftest import equal_images, read_wandb
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

import train_text_to_image_prior as script

PROMPTS = ["a red apple", "an owl at night 🦉", "雪の結晶"]
TOKEN = "hf_pQmRnVbXcZkJhGfDsLwY"
# An epoch is two steps of four samples; six of the 14 rows are held out.
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
TRACKED = RUN | {"use_ema": True, "loss_weighting": "p2", "report_to": "tensorboard,wandb"}
VALIDATED = [0, 2, 4, 6, 7]
TRAIN_METRICS = ("train_loss", "lr", "grad_norm", "images_per_second", "epoch")
VAL_METRICS = ("val_loss", "val_loss_t0.0", "val_loss_t0.25", "val_loss_t0.5", "val_loss_t0.75")


@pytest.fixture(scope="module")
def uninterrupted(train):
    run = train(**TRACKED).ok()
    return run


# --------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_shows_what_loss_jsonl_and_samples_hold(uninterrupted):
    shown, samples = uninterrupted.logged(), uninterrupted.samples()
    for column in (*TRAIN_METRICS, *VAL_METRICS):
        numbers = uninterrupted.losses(column)
        assert list(numbers) == (VALIDATED if column in VAL_METRICS else list(range(1, 8))), column
        assert shown[column] == pytest.approx(numbers, rel=1e-6), column
    assert list(samples) == list(itertools.product(VALIDATED, range(3)))
    for index, prompt in enumerate(PROMPTS):
        images = {(step, index): image for step, image in shown[f"validation/{index}"].items()}
        assert equal_images(images, {key: image for key, image in samples.items() if key[1] == index})
        assert shown[f"validation/{index}/text_summary"] == dict.fromkeys(VALIDATED, prompt)


def test_wandb_has_what_loss_jsonl_and_samples_hold(uninterrupted):
    logged, settings = {}, {}
    for record in read_wandb(uninterrupted.cwd):
        items = record.history.item
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        for name, value in values.items():
            first = logged.setdefault(name, {}).setdefault(values["_step"], value)
            assert first == value, "a step comes once"
        settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
    for column in (*TRAIN_METRICS, *VAL_METRICS):
        assert logged[column] == pytest.approx(uninterrupted.losses(column), rel=1e-6), column
    folders = list(uninterrupted.cwd.glob("wandb/offline-run-*/files"))
    files = {str(path.relative_to(folder)): path for folder in folders for path in folder.rglob("*.png")}
    shown = {
        (step, index): np.asarray(Image.open(files[name]))
        for index in range(3)
        for step, name in logged[f"validation/{index}/path"].items()
    }
    assert equal_images(shown, uninterrupted.samples())
    assert (settings["learning_rate"], settings["seed"]) == (3e-4, 0)
    assert settings["validation_prompts"] == str(PROMPTS)


def install_stand_ins(file):
    """Puts stand-ins for comet_ml and trackio where Accelerate looks for them, which write to `file` what is
    logged to them: settings, (name, step, number) and (prompt, step, pixels).

    Trackio 0.43 ignores what is neither a number, a string nor one of its own images, also a list of images.
    """
    logged = {name: {"settings": {}, "numbers": [], "images": []} for name in ("comet_ml", "trackio")}
    comet, trackio = MagicMock(__version__="3.50.0"), MagicMock()
    trackio.Image = type("Image", (SimpleNamespace,), {})
    trackio.Image.__init__ = lambda self, value, caption: vars(self).update(pixels=value, prompt=caption)

    def log(values, step):
        images = [value for value in values.values() if isinstance(value, trackio.Image)]
        logged["trackio"]["images"] += [(image.prompt, step, np.asarray(image.pixels)) for image in images]
        numbers = [(name, step, value) for name, value in values.items() if isinstance(value, float)]
        logged["trackio"]["numbers"] += numbers

    trackio.init.return_value.log = log
    trackio.config.update = lambda values, **_: logged["trackio"]["settings"].update(values)
    experiment = comet.start.return_value
    experiment.log_parameters = logged["comet_ml"]["settings"].update
    numbers, images = (logged["comet_ml"][kind] for kind in ("numbers", "images"))
    experiment.log_metric = lambda name, value, step: numbers.append((name, step, value))
    experiment.log_image = lambda image, name, step: images.append((name, step, np.asarray(image)))
    for end in (experiment, trackio.init.return_value):  # the last one writes all
        end.end = end.finish = lambda: torch.save(logged, file)
    sys.modules |= {"comet_ml": comet, "trackio": trackio}
    accelerate.tracking.get_available_trackers()[:] = map(LoggerType, ("tensorboard", "comet_ml", "trackio"))


def test_each_of_several_trackers_gets_numbers_settings_and_images_with_prompts(train, tmp_path):
    flags = {"validation_prompts": PROMPTS[:2], "max_train_steps": 2, "hub_token": TOKEN}
    flags |= {"report_to": "comet_ml,trackio,tensorboard"}
    run = train(functools.partial(install_stand_ins, tmp_path / "logged.pt"), **RUN | flags).ok()
    for logged in torch.load(tmp_path / "logged.pt", weights_only=False).values():
        for column in (*TRAIN_METRICS, "val_loss"):
            numbers = {step: value for tag, step, value in logged["numbers"] if tag == column}
            assert numbers == run.losses(column), column
            assert run.logged(column) == pytest.approx(numbers, rel=1e-6)
        assert (logged["settings"]["learning_rate"], logged["settings"]["seed"]) == (3e-4, 0)
        assert TOKEN not in str(logged["settings"])
        images = {(step, PROMPTS.index(prompt)): image for prompt, step, image in logged["images"]}
        assert len(logged["images"]) == 4 and equal_images(images, run.samples())


def test_a_run_says_what_it_left_and_what_comes_next(uninterrupted):
    losses, text = uninterrupted.losses("val_loss"), uninterrupted.output
    summary = text[text.index("Done after 7 steps\n") :]
    assert f"{losses[0]:.4f} at step 0, {losses[7]:.4f} at step 7\n" in summary
    paths = re.findall(rf"{re.escape(str(uninterrupted.folder))}[\w./-]*", summary)
    names = {os.path.relpath(path, uninterrupted.folder) for path in paths if os.path.exists(path)}
    assert names == {"samples/contact-sheet.png", "loss.png", "README.md"}
    assert len(paths) == 3
    assert "--resume_from_checkpoint=latest and --max_train_steps=14\n" in summary


# --------------------------------------------------------------------------- samples/ and the contact sheet


def test_samples_contain_their_prompt(uninterrupted):
    files = list((uninterrupted.folder / "samples").glob("step-*"))
    assert len(files) == 15
    for path in files:
        assert Image.open(path).text["prompt"] == PROMPTS[int(path.stem[-1])]


@pytest.fixture
def sheet_args(tmp_path):
    """sheet_args(prompts, *sizes): the arguments of a run in `tmp_path` with these validation images."""

    def parse(prompts, *sizes):
        flags = [f"--output_dir={tmp_path}", "--train_data_dir=images", "--validation_prompts", *prompts]
        args = script.parse_args(flags + (["--validation_size", *map(str, sizes)] if sizes else []))
        args.output_dir = tmp_path
        return args

    return parse


def write_sample(folder, step, name, image, prompt):
    text = PngInfo()
    text.add_itxt("prompt", prompt)
    (folder / "samples").mkdir(exist_ok=True)
    image.save(folder / "samples" / f"step-{step:07d}-prompt-{name}.png", pnginfo=text)


def read_pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def read_sheet(folder):
    """The cells of a run's contact sheet: (prompts, steps, 260, 192, 3)."""
    sheet = read_pixels(folder / "samples" / "contact-sheet.png")
    height, width, _ = sheet.shape
    return sheet.reshape(height // 260, 260, width // 192, 192, 3).swapaxes(1, 2)


def draw_sheet(args):
    script.save_contact_sheet(args)
    return read_sheet(args.output_dir)


def fitted(image):
    """An image as a cell shows it, below its label."""
    return np.asarray(ImageOps.pad(image, (184, 184), color="white"))


LONG_PROMPT = "a very detailed oil painting of an owl at night, in the rain, under a street lamp, by the sea"
SHEETS = {
    "1 x 1": (["a red apple"], [0], []),
    "long": ([LONG_PROMPT, "a red apple"], [0, 100, 200, 300, 1234567], []),
    "8 x 12": ([str(i) for i in range(8)], list(range(0, 1200, 100)), []),
    "sizes": (["one", "two"], [0, 5], [512, 1024, 1024, 512]),
    "dollars": (["costs $5 and $10, $\\frac{1}{2}$, $unbalanced {"], [0], []),
    "signs": (["snake_case^2 \\alpha % & # ~"], [0], []),
    "emoji": (["an owl 🦉 at night 👩\u200d🚀"], [0], []),
    "scripts": (["雪の結晶", "مرحبا بالعالم"], [0], []),
    "lines": (["first line\nsecond line\r\n\tthird"], [0], []),
    "no spaces": (["W" * 200], [0, 1, 2], []),
    "empty": (["", "an owl"], [0], []),
}


@pytest.mark.parametrize("name", SHEETS)
def test_the_contact_sheet_is_a_labelled_grid_of_prompts_by_steps(sheet_args, monkeypatch, caplog, name):
    prompts, steps, sizes = SHEETS[name]
    args, labels, draw_text = sheet_args(prompts, *sizes), [], ImageDraw.ImageDraw.text

    def note(draw, position, text, *rest, **options):
        known = len(labels)
        draw_text(draw, position, text, *rest, **options)
        labels[known:] = [text]  # older versions of Pillow draw each line by a call of their own

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    rows = script.validation_images(args)
    places = list(itertools.product(enumerate(rows), enumerate(steps)))
    for (row, (prompt, suffix, _)), (column, step) in places:
        image = Image.new("RGB", (64, 64), (20 * column, 25 * row, 128))
        write_sample(args.output_dir, step, suffix.removeprefix("prompt-"), image, prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells = draw_sheet(args)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert cells.shape[:2] == (len(rows), len(steps)) and len(labels) == len(places)
    for ((row, (prompt, *_)), (column, step)), label in zip(places, labels, strict=True):
        cell = cells[row, column]
        assert (cell[72:256, 4:188] == (20 * column, 25 * row, 128)).all()
        # The label above the image: complete, and apart from the neighbors.
        number, *lines = label.split("\n")
        assert number == f"step {step}"
        shown, whole = "".join(lines).replace(" ", ""), "".join(prompt.split())
        assert shown == whole or (whole.startswith(shown.removesuffix("...")) and len(shown) > 50)
        ys, xs = np.nonzero(cell[:72].max(axis=2) < 128)
        assert len(ys), "there is a text"
        assert ys.max() < 70 and xs.min() >= 4 and xs.max() < 186, "within its cell"


def test_each_cell_of_the_contact_sheet_is_the_scaled_sample_or_empty(sheet_args, images):
    """Empty where validation failed once, or the sample is of another prompt."""
    steps, args = [0, 5, 10, 15], sheet_args(PROMPTS)
    files, samples = sorted(images.glob("*.png")) + sorted(images.glob("*.jpg")), {}
    for (row, (column, step)), file in zip(
        itertools.product(range(3), enumerate(steps)), files, strict=False
    ):
        image = Image.open(file).convert("RGB").resize((256, 128) if row else (256, 256))
        write_sample(args.output_dir, step, row, image, PROMPTS[row])
        samples[row, column] = fitted(image)
    white = Image.new("RGB", (184, 184), "white")
    samples[2, 1] = samples[1, 2] = fitted(white)
    write_sample(args.output_dir, 5, 2, Image.new("RGB", (256, 256)), "another prompt")
    (args.output_dir / "samples" / "step-0000010-prompt-1.png").unlink()
    cells = draw_sheet(args)
    assert len(samples) == 12
    for place, sample in samples.items():
        assert np.array_equal(cells[place][72:256, 4:188], sample), place


@pytest.mark.parametrize(
    ("count", "num_prompts", "num_shown"),
    [(1, 1, 1), (2, 1, 2), (12, 1, 12), (13, 1, 12), (24, 1, 12), (150, 1, 12), (9, 3, 9)],
)
def test_the_contact_sheet_shows_the_first_the_last_and_evenly_spaced_steps(
    sheet_args, count, num_prompts, num_shown
):
    """Each step's image is of one color, which says which one it is."""
    args = sheet_args([f"prompt {index}" for index in range(num_prompts)])
    for step, index in itertools.product(range(count), range(num_prompts)):
        image = Image.new("RGB", (16, 16), (step, 255, 0))
        write_sample(args.output_dir, 100 * step, index, image, f"prompt {index}")
    colors = draw_sheet(args)[-1, :, 160, 96]
    assert (colors[:, 1:] == (255, 0)).all()
    shown = colors[:, 0].tolist()
    assert len(shown) == num_shown and shown == sorted(set(shown))
    assert (shown[0], shown[-1]) == (0, count - 1)
    gaps = np.diff(shown)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


# ---------------------------------------------------------------------------------- loss.jsonl and the curve


@pytest.fixture
def log_to(tmp_path):
    """log_to(metrics, step): log_metrics to loss.jsonl in `tmp_path`, without trackers."""
    accelerator = SimpleNamespace(log=lambda *_, **__: None, is_main_process=True, project_dir=tmp_path)
    return functools.partial(script.log_metrics, accelerator)


@pytest.fixture
def draw_curve(monkeypatch):
    """draw_curve(folder): the axes of the curve that `save_loss_curve` writes to loss.png."""
    figures = []

    class NotedFigure(script.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(script, "Figure", NotedFigure)

    def draw(folder):
        script.save_loss_curve(folder)
        (axes,) = figures[-1].axes
        return axes

    return draw


def lines_of(axes):
    """The points of a plot's lines, [[(step, loss)]]: training loss, its mean, held-out loss, its mean."""
    return [[(x, y) for x, y in zip(*line.get_data(), strict=True)] for line in axes.get_lines()]


def is_near(pixels, axes, point, color):
    """Whether there is a pixel of a color within two pixels of a point of a plot."""
    x, y = axes.transData.transform(point)
    column, row = round(x), round(len(pixels) - y)
    area = pixels[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
    return (np.abs(area - 255 * np.array(to_rgb(color))) < 40).all(axis=2).any()


def test_the_curve_goes_through_the_numbers_and_their_means(log_to, tmp_path, draw_curve):
    """Of 200 steps five are averaged. The loss is 1 for 50 steps and then 0.5, with one outlier."""
    losses = [1.0] * 50 + [0.5] * 150
    losses[119] = 1.0
    held_out = {0: 1.1, 100: 0.9, 200: 0.3}
    log_to({"val_loss": held_out[0]}, 0)
    for step, loss in enumerate(losses, 1):
        log_to({"train_loss": loss}, step)
        if step in held_out:
            log_to({"val_loss": held_out[step]}, step)
    axes = draw_curve(tmp_path)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    train_loss, mean, val_loss, val_mean = lines_of(axes)
    assert train_loss == list(enumerate(losses, 1))
    assert [step for step, _ in mean] == list(range(5, 201)), "of the five steps up to this one"
    expected = dict.fromkeys(range(5, 51), 1.0) | {51: 0.9, 52: 0.8, 53: 0.7, 54: 0.6}
    expected |= dict.fromkeys(range(55, 201), 0.5) | dict.fromkeys(range(120, 125), 0.6)
    assert dict(mean) == pytest.approx(expected)
    assert val_loss == val_mean == list(held_out.items())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["train_loss, mean of 5", "val_loss, mean of 1"]

    # And the image shows them.
    pixels = read_pixels(tmp_path / "loss.png")
    for point in held_out.items():
        assert is_near(pixels, axes, point, "tab:red"), point
    for step in (10, 30, 70, 122, 160, 199):
        assert is_near(pixels, axes, (step, expected[step]), "tab:blue"), step
    assert is_near(pixels, axes, (120, 0.9), (0.7 + 0.3 * np.array(to_rgb("tab:blue"))).tolist())
    assert not is_near(pixels, axes, (150, 0.15), "tab:blue"), "this can tell"


@pytest.mark.parametrize(
    ("losses", "names"),
    [
        ([0.5], ["train_loss"]),
        ([0.5], ["val_loss"]),
        ([0.5, math.nan, 0.3, math.inf, 0.2], VAL_METRICS[:1]),
    ],
)
def test_the_curve_of_a_run_that_has_only_begun_or_overflowed_is_drawn_without_warnings(
    log_to, tmp_path, draw_curve, caplog, losses, names
):
    """A step that fp16's gradient scaler skips has no finite loss."""
    log_to({"lr": 0.1}, 0)
    script.save_loss_curve(tmp_path)
    assert not (tmp_path / "loss.png").exists(), "there is nothing to draw"
    for (step, loss), name in itertools.product(enumerate(losses), names):
        log_to({name: loss}, step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = draw_curve(tmp_path)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    points = [(step, loss) for step, loss in enumerate(losses) if math.isfinite(loss)]
    assert lines_of(axes) == [points] * 2 * len(names)
    assert np.isfinite(axes.get_ylim()).all()
    pixels = read_pixels(tmp_path / "loss.png")
    assert pixels.shape == (500, 1000, 3)
    color = "tab:red" if names != ["train_loss"] else "tab:blue"
    assert all(is_near(pixels, axes, point, color) for point in points), "also a single one"


def test_the_runs_sheet_and_curve_show_its_samples_and_loss_jsonl(
    uninterrupted, sheet_args, tmp_path, draw_curve
):
    shutil.copytree(uninterrupted.folder / "samples", tmp_path / "samples")
    shutil.copy(uninterrupted.folder / "loss.jsonl", tmp_path)
    train_loss, _, val_loss, _ = lines_of(draw_curve(tmp_path))
    assert train_loss == list(uninterrupted.losses().items())
    assert val_loss == list(uninterrupted.losses("val_loss").items())
    assert np.array_equal(read_pixels(uninterrupted.folder / "loss.png"), read_pixels(tmp_path / "loss.png"))
    cells = read_sheet(uninterrupted.folder)
    assert np.array_equal(cells, draw_sheet(sheet_args(PROMPTS)))
    (tmp_path / "samples" / "step-0000004-prompt-1.png").unlink()
    assert not np.array_equal(cells, draw_sheet(sheet_args(PROMPTS)))


# ------------------------------------------------------------------------------- resuming and starting again


def assert_logged_alike(run, expected):
    """loss.jsonl, TensorBoard and samples/ have each step once, with the numbers and images of `expected`."""
    for column in (*TRAIN_METRICS, *VAL_METRICS):
        numbers, right = run.losses(column), expected.losses(column)
        assert list(numbers) == list(right)
        assert numbers == right or column == "images_per_second", column
    assert equal_images(run.samples(), expected.samples())
    shown, right = run.logged(), expected.logged()
    for tag in right.keys() - {"images_per_second"}:
        if tag.startswith("validation/") and not tag.endswith("text_summary"):
            assert equal_images(shown[tag], right[tag]), tag
        else:
            assert shown[tag] == right[tag], tag
    assert not any(shown[tag] for tag in shown.keys() - right.keys())  # of what was purged, the name is left
    for name in ("samples/contact-sheet.png", "loss.png"):
        assert np.array_equal(read_pixels(run.folder / name), read_pixels(expected.folder / name)), name


def kill_at(name, step):
    """Kills the process in a step before the optimizer's, or in a validation before its images are written:
    in a function of the script whose fourth argument is the step."""
    function = getattr(script, name)

    def killing(*args):
        if args[3] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(script, name, killing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "step", "resumed_from"),
    [("log_images", 6, 3), ("check_finite", 7, 6)],
)
def test_a_killed_and_resumed_run_logs_each_step_once_with_the_uninterrupted_runs_numbers(
    train, uninterrupted, tmp_path, function, step, resumed_from
):
    """Step 6 ends with a validation and then a checkpoint."""
    flags = TRACKED | {"output_dir": tmp_path / "run"}
    killed = train(functools.partial(kill_at, function, step), **flags)
    assert killed.returncode == -signal.SIGKILL, killed
    assert max(killed.losses()) >= resumed_from
    resumed = train(**flags, resume_from_checkpoint="latest").ok()
    assert f"from step {resumed_from} to 7" in resumed.output
    assert_logged_alike(resumed, uninterrupted)
    ids = [
        {path.name.rpartition("-")[2] for path in run.cwd.glob("wandb/offline-run-*")}
        for run in (killed, resumed, uninterrupted)
    ]
    assert ids[0] == ids[1] != ids[2], "the wandb run is continued"
    assert len(ids[0]) == len(ids[2]) == 1
    steps = {record.history.step.num for record in read_wandb(resumed.cwd)} - {0}
    assert steps == {*range(resumed_from + 1, 8)}


def test_resuming_a_finished_run_logs_no_step_twice(train, uninterrupted, tmp_path):
    """Also from a checkpoint whose step was validated before."""
    shutil.copytree(uninterrupted.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-7")
    flags = TRACKED | {"report_to": "none", "max_train_steps": 6, "output_dir": tmp_path / "run"}
    resumed = train(**flags, resume_from_checkpoint="latest").ok()
    for name in ("train_loss", "val_loss"):
        numbers = uninterrupted.losses(name).items()
        assert resumed.losses(name) == {step: number for step, number in numbers if step <= 6}
    images = {key: image for key, image in uninterrupted.samples().items() if key[0] <= 6}
    assert equal_images(resumed.samples(), images)


def test_images_belong_to_their_prompts(train, tmp_path):
    """A finished run is resumed with another prompt, and with nothing left to train: card, contact sheet and
    samples show the image that a run with this prompt from the start has, and none of the old one."""
    flags = RUN | {"max_train_steps": 2, "validation_split": None, "report_to": "none"}
    tomato, llama = (train(**flags | {"validation_prompts": [name]}) for name in ("tomato", "llama"))
    shutil.copytree(tomato.folder, tmp_path, dirs_exist_ok=True)
    flags |= {"validation_prompts": ["llama"], "output_dir": tmp_path, "resume_from_checkpoint": "latest"}
    resumed = train(**flags).ok()
    old, new = tomato.samples(), llama.samples()
    assert not np.array_equal(old[2, 0], new[2, 0])
    assert equal_images(resumed.samples(), {(0, 0): old[0, 0], (2, 0): new[2, 0]})
    assert "(samples/step-0000002-prompt-0.png)" in (tmp_path / "README.md").read_text()
    cells = read_sheet(tmp_path)
    assert np.array_equal(cells[0, 1, 72:256, 4:188], fitted(Image.fromarray(new[2, 0])))
    assert (cells[0, 0, 72:256, 4:188] == 255).all(), "empty"


@pytest.mark.slow
def test_overwriting_the_output_folder_starts_all_logs_again(train, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.folder, tmp_path / "run")
    flags = {"max_train_steps": 2, "validation_prompts": PROMPTS[:1], "seed": 1}
    run = train(**RUN | flags, output_dir=tmp_path / "run", overwrite_output_dir=True).ok()
    assert_logged_alike(run, train(**RUN | flags))
