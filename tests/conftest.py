# SPDX-License-Identifier: Apache-2.0
"""What all tests share: tiny models, real pictures, and two ways to run the real command.

`run_script` starts a fresh process, as a user does, and pays ten seconds for the imports. `run_main` forks
this process, which has imported everything already, and calls `main`; what a test has monkeypatched is
patched in there too. Both run in an empty folder and never reach the network.
"""

import functools
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "train_text_to_image_prior.py"
PICTURES = TESTS / "data" / "emoji-64"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

# The libraries read all of these when they are imported.
CACHE = tempfile.mkdtemp(prefix="tests-hf-")
os.environ.update(
    HF_HOME=CACHE,
    HF_DATASETS_CACHE=str(Path(CACHE) / "datasets"),
    HF_HUB_CACHE=str(Path(CACHE) / "hub"),
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    PYTORCH_NVML_BASED_CUDA_CHECK="1",  # asking for a GPU must not start CUDA, which does not survive a fork
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
    os.environ.pop(name, None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from diffusers import DDPMWuerstchenScheduler  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from transformers import CLIPTextModel  # noqa: E402

import train_text_to_image_prior as script  # noqa: E402
from modeling_efficient_net_encoder import EfficientNetEncoder  # noqa: E402

# Threads do not survive a fork: had torch started its pool here, the first matrix product in a child would
# wait for it for ever. With one thread it starts none.
torch.set_num_threads(1)
PartialState(cpu=True)  # the script's logger asks it for the rank


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


def tiny_args(models, pictures, output_dir, **flags):
    """The command line of a quick run: three updates on four pictures each.

    `flags` override and add: True is a bare flag, None or False removes one, a list stands for several
    values.
    """
    settings = {
        "pretrained_prior_model_name_or_path": models / "prior",
        "pretrained_decoder_model_name_or_path": models / "decoder",
        "pretrained_image_encoder_name_or_path": models / "encoder",
        "train_data_dir": pictures,
        "output_dir": output_dir,
        "resolution": 64,
        "train_batch_size": 4,
        "max_train_steps": 3,
        "lr_scheduler": "constant",
        "seed": 0,
        "report_to": "none",
    } | flags
    args = []
    for flag, value in settings.items():
        if value is None or value is False:
            continue
        args.append(f"--{flag}")
        if isinstance(value, (list, tuple)):
            args += map(str, value)
        elif value is not True:
            args.append(str(value))
    return args


class Finished:
    """A run of `main` that has ended: its exit status (-N: killed by signal N), what it wrote to stdout and
    stderr."""

    def __init__(self, returncode, output):
        self.returncode = returncode
        self.output = output

    def __repr__(self):  # pytest shows it when an assertion about it fails
        return f"exit status {self.returncode} after:\n{self.output}"


def main_in_child(args, env, folder, log):
    """Make a forked process look like one that has just been started, then run the script's `main` in it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.stdout.reconfigure(line_buffering=True)  # lines of both in the order they were written
    # Loggers that were set up under pytest write into its capture; pytest's own on the root logger would keep
    # logging.basicConfig from doing anything. Warnings go to pytest's recorder.
    logging.root.handlers.clear()
    for logger in list(logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", []):
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)
    warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: print(
        warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr
    )
    # Torch renews its thread pool at the first call after a fork, and that once failed ("Invalid thread
    # pool!") where the threads in which transformers loads weights made it. Here the main thread does, and
    # weights load in it, too.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    torch.set_num_threads(1)
    # What a test did with an Accelerator of its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # A run without --seed must not find the parent's random state, or all such runs would be alike.
    random.seed()
    np.random.seed()
    torch.seed()

    os.chdir(folder)
    for name, value in env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.argv = [str(SCRIPT), *args]

    try:
        script.main(args)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = 1 if isinstance(end.code, str) else end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    # A forked child would wait for the loader's workers, whereas they end when their parent does.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@pytest.fixture(scope="session")
def pictures():
    """A folder of 64 captioned pictures with metadata.jsonl."""
    return PICTURES


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with tiny models in `prior`, `decoder` and `encoder`. Shared by all tests: do not write to
    it."""
    from tiny_models import make_tiny_models

    folder = tmp_path_factory.mktemp("models")
    make_tiny_models(folder)
    return folder


@pytest.fixture
def run_script(tmp_path_factory):
    """run_script(args, launcher=(), timeout=600, **env): the script in a fresh process, a CompletedProcess of
    text.

    `launcher` goes between python and the script: ("-m", "torch.distributed.run", "--nproc_per_node", "2").
    An environment variable that is None is removed.
    """

    def run(args, launcher=(), timeout=600, **env):
        environment = {name: value for name, value in (os.environ | env).items() if value is not None}
        return subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), *map(str, args)],
            cwd=tmp_path_factory.mktemp("cwd"),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


FORKING = threading.Lock()  # two threads that fork at the same time can block each other's child


@pytest.fixture(scope="session")
def run_main(tmp_path_factory):
    """run_main(args, timeout=300, **env): the script's `main` in a fork of this process, as a `Finished`.

    `env` works as in `run_script`, except for what libraries read when they are imported (HF_HUB_OFFLINE,
    HF_ENDPOINT, OMP_NUM_THREADS, ...): that needs a fresh process.
    """

    def run(args, timeout=300, **env):
        folder = tmp_path_factory.mktemp("cwd")
        log = folder.parent / f"{folder.name}.log"
        child = multiprocessing.get_context("fork").Process(
            target=main_in_child, args=([str(arg) for arg in args], env, folder, log)
        )
        with FORKING:
            child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            child.join()
            pytest.fail(
                f"main did not end in {timeout} seconds; it wrote:\n{log.read_text(errors='replace')}"
            )
        return Finished(child.exitcode, log.read_text(errors="replace"))

    return run


# ------------------------------------------------------------- runs whose inputs and outputs are recorded


def watch_main(main, file, patch, argv):
    """In the forked child: runs `main`, writes down what went in and out of the models, and saves that to
    `file`.

    `steps` has a dict for each micro-step, `rates` and `clipped` the rate and the gradient's norm of each
    update.
    """
    record = {"steps": [], "rates": [], "clipped": [], "frozen": {}}
    latest, frozen = {}, {}

    def watch(cls, name, note):
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            note(self, result, *args, **kwargs)
            return result

        setattr(cls, name, method)

    def note_encoder(encoder, latents, pixels):
        frozen.setdefault("image_encoder", encoder)
        latest.update(pixels=pixels, latents=latents, image_encoder_training=encoder.training)

    def note_text(encoder, output, input_ids, attention_mask, **_):
        frozen.setdefault("text_encoder", encoder)
        latest.update(ids=input_ids, mask=attention_mask, text_encoder_training=encoder.training)

    def note_noise(scheduler, noisy, samples, noise, timesteps):
        if samples.dim() == 4:
            latest.update(image_embeds=samples, noise=noise, timesteps=timesteps)

    def note_prior(prior, pred_noise, x, r, c):  # the pipeline names its arguments
        if prior.training:
            step = {"noisy": x, "given": r, "prompt_embeds": c, "pred": pred_noise}
            step["weights_cached"] = torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
            record["steps"].append(
                {k: v.detach().clone() if torch.is_tensor(v) else v for k, v in (latest | step).items()}
            )

    def note_update(optimizer, _, *args):
        record["rates"].append(optimizer.param_groups[0]["lr"])

    def note_gradients(optimizer, *_):
        if optimizer.gradient_state.sync_gradients:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            record["clipped"].append(
                torch.stack([gradient.double().norm() for gradient in gradients]).norm().item()
            )

    watch(EfficientNetEncoder, "forward", note_encoder)
    watch(CLIPTextModel, "forward", note_text)
    watch(DDPMWuerstchenScheduler, "add_noise", note_noise)
    watch(script.wuerstchen.WuerstchenPrior, "forward", note_prior)
    watch(torch.optim.AdamW, "step", note_update)
    watch(AcceleratedOptimizer, "step", note_gradients)
    if patch is not None:
        patch()
    try:
        main(argv)
    finally:
        record["frozen"] = {name: dict(model.state_dict()) for name, model in frozen.items()}
        torch.save(record, file)


class Run:
    """A finished run of the command."""

    def __init__(self, finished, folder, record):
        self.returncode, self.output, self.folder = finished.returncode, finished.output, folder
        self.record = torch.load(record, map_location="cpu") if record.exists() else None

    def __repr__(self):
        return f"exit status {self.returncode} after:\n{self.output}"

    def logged(self, tag):
        """What TensorBoard shows of a number: {update: value}."""
        events = EventAccumulator(str(self.folder / "logs" / "text2image-fine-tune"), {"scalars": 0}).Reload()
        scalars = events.Scalars(tag)
        assert len({scalar.step for scalar in scalars}) == len(scalars), (
            f"{tag} is logged twice for an update"
        )
        return {scalar.step: scalar.value for scalar in scalars}

    def prior(self, step=None, name="prior"):
        """The weights of the prior, in the checkpoint of an update or in the result."""
        folder = self.folder / ("prior_pipeline" if step is None else f"checkpoint-{step}") / name
        return load_file(folder / "diffusion_pytorch_model.safetensors")

    def all(self, name):
        """A recorded tensor of every micro-step as one batch."""
        return torch.cat([step[name] for step in self.record["steps"]])


@pytest.fixture(scope="session")
def finished_runs():
    return {}


@pytest.fixture
def train(run_main, finished_runs, models, pictures, tmp_path_factory, monkeypatch):
    """train(patch=None, env=None, **flags): a Run with these flags; what has been run before is not run
    again.

    `patch` is called in the child before `main`, to patch what it likes.
    """

    def train(patch=None, env=None, **flags):
        key = repr((patch, env, sorted(flags.items())))
        if key not in finished_runs or "resume_from_checkpoint" in flags:
            folder = Path(flags.get("output_dir") or tmp_path_factory.mktemp("run") / "out")
            record = tmp_path_factory.mktemp("record") / "record.pt"
            monkeypatch.setattr(script, "main", functools.partial(watch_main, script.main, record, patch))
            settings = {"report_to": "tensorboard", "output_dir": folder} | flags
            done = run_main(tiny_args(models, pictures, **settings), **(env or {}))
            monkeypatch.undo()
            finished_runs[key] = Run(done, folder, record)
        return finished_runs[key]

    return train


@pytest.fixture(scope="session")
def steady_prior(models, tmp_path_factory):
    """The tiny prior with its dropout at 0, so that a step can be computed anew."""
    folder = tmp_path_factory.mktemp("steady") / "prior"
    shutil.copytree(models / "prior", folder)
    config = folder / "prior" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout": 0.0}))
    return folder


def same_weights(left, right):
    """Whether two sets of weights are the same, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left, right):
    """The largest difference between two sets of weights."""
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def load_optimizer_state(checkpoint):
    """AdamW's moments and counts in a checkpoint, by name."""
    state = torch.load(checkpoint / "optimizer.bin", map_location="cpu", weights_only=True)["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index in state for name, value in state[index].items()
    }


def resumed(train, run, update, tmp_path, by="latest", **flags):
    """The run taken up again from one of its checkpoints, in a folder that holds that checkpoint alone."""
    folder = tmp_path / f"from-{update}"
    shutil.copytree(run.folder / f"checkpoint-{update}", folder / f"checkpoint-{update}")
    by = folder / f"checkpoint-{update}" if by == "path" else by
    again = train(**flags, output_dir=folder, resume_from_checkpoint=by)
    assert again.returncode == 0, again
    return again


def assert_continues_as(again, run, update, last):
    """Everything after `update` is what the unbroken run has."""
    for later in range(update + 1, last + 1):
        assert same_weights(again.prior(later), run.prior(later)), f"the weights of update {later}"
        here, there = (load_optimizer_state(r.folder / f"checkpoint-{later}") for r in (again, run))
        assert same_weights(here, there), f"the optimizer's state of update {later}"
        if (run.folder / f"checkpoint-{later}" / "prior_ema").exists():
            assert same_weights(again.prior(later, "prior_ema"), run.prior(later, "prior_ema")), (
                f"the average, {later}"
            )
    assert same_weights(again.prior(), run.prior())
    for tag in ("train_loss", "grad_norm", "lr"):
        expected = {step: value for step, value in run.logged(tag).items() if step > update}
        assert again.logged(tag) == expected, tag
    for picture in (again.folder / "samples").glob("step-*.png"):
        assert picture.read_bytes() == (run.folder / "samples" / picture.name).read_bytes(), picture.name


@contextmanager
def store_of_ranks():
    """The port of a store which, like torchrun's, outlives each rank. It is in a process of its own: forks of
    the one that has it would share its connections."""

    def serve(port):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.send(store.port)
        time.sleep(1000)

    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(theirs,))
    with FORKING:
        server.start()
    try:
        assert ours.poll(60), "no port"
        yield str(ours.recv())
    finally:
        server.kill()
        server.join()


def read_curve(folder, column):
    """A column of loss.jsonl, {step: number}. No step may come twice."""
    rows = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    numbers = [(row["step"], row[column]) for row in rows if column in row]
    assert [step for step, _ in numbers] == sorted({step for step, _ in numbers}), column
    return dict(numbers)


def read_samples(folder):
    """The validation images in samples/, {(step, index of the prompt): pixels}."""
    pattern = re.compile(r"step-(\d{7})-prompt-(\d+)\.png")
    found = {path: pattern.fullmatch(path.name) for path in sorted((folder / "samples").iterdir())}
    assert [path.name for path, match in found.items() if not match] in ([], ["contact-sheet.png"])
    return {(int(m[1]), int(m[2])): np.asarray(Image.open(path)) for path, m in found.items() if m}


def equal_images(left, right):
    """Whether two dicts hold the same images."""
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


class Samples:
    """The script's samples by position, of rows whose images all have one size."""

    def __init__(self, rows, preprocess, seed, skip_bad_rows, resolution=64):
        self.rows = script.SizedRows(rows, [(resolution, resolution)], np.zeros(len(rows), np.int64))
        plan = script.SamplePlan(
            seed=seed,
            num_rows=len(rows),
            rows_hash="",
            num_processes=1,
            train_batch_size=1,
            gradient_accumulation_steps=1,
        )
        self.order = script.SampleOrder(self.rows, plan)
        self.dataset = script.SampleDataset(self.rows, preprocess, seed, skip_bad_rows)

    def __getitem__(self, position):
        return self.dataset[position, self.order.row(position)]


@pytest.fixture
def train_ranks(run_main, finished_runs, models, pictures, tmp_path_factory, monkeypatch):
    """As `train`, with ranks over gloo in as many forks, by default two; gives the Run of each.

    `env` gives one rank's environment, from its number.
    """

    def train_ranks(patch=None, ranks=2, env=lambda rank: {}, **flags):
        key = repr(("ranks", ranks, patch, env(1), sorted(flags.items())))
        if key not in finished_runs or "resume_from_checkpoint" in flags:
            folder = Path(flags.get("output_dir") or tmp_path_factory.mktemp("ranks") / "out")
            settings = {"report_to": "tensorboard", "output_dir": folder} | flags
            args, main = tiny_args(models, pictures, **settings), script.main
            records = [tmp_path_factory.mktemp("record") / "record.pt" for _ in range(ranks)]
            monkeypatch.setattr(
                script,
                "main",
                lambda argv: watch_main(main, records[int(script.os.environ["RANK"])], patch, argv),
            )
            torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            runs = [None] * ranks

            def start(rank, port):
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
                place |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                place |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                runs[rank] = run_main(args, timeout=120, **torchrun | place | env(rank))

            with store_of_ranks() as port:
                threads = [threading.Thread(target=start, args=(rank, port)) for rank in range(ranks)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            monkeypatch.undo()
            finished_runs[key] = [Run(run, folder, record) for run, record in zip(runs, records, strict=True)]
        return finished_runs[key]

    return train_ranks
