# SPDX-License-Identifier: Apache-2.0
"""What all tests share: tiny models, real pictures, and two ways to run the real command.

`run_script` starts a fresh process, as a user does, and pays ten seconds for the imports. `run_main` forks this
process, which has imported everything already, and calls `main`; what a test has monkeypatched is patched in there
too. Both run in an empty folder and never reach the network.
"""

import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
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
    PYTORCH_NVML_BASED_CUDA_CHECK="1",  # to ask whether there is a GPU must not start CUDA: it does not survive a fork
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
    os.environ.pop(name, None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

# Threads do not survive a fork: had torch started its pool here, the first matrix product in a child would wait for it
# for ever. With one thread it starts none.
torch.set_num_threads(1)


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


def tiny_args(models, pictures, output_dir, **flags):
    """The command line of a quick run: three updates on four pictures each.

    `flags` override and add: True is a bare flag, None or False removes one, a list stands for several values.
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
    """A run of `main` that has ended: its exit status (-N: killed by signal N), what it wrote to stdout and stderr."""

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
    # Torch renews its thread pool at the first call after a fork, and that once failed ("Invalid thread pool!") where
    # the threads in which transformers loads weights made it. Here the main thread does, and weights load in it, too.
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

    import train_text_to_image_prior

    try:
        train_text_to_image_prior.main(args)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = 1 if isinstance(end.code, str) else end.code or 0
    else:
        status = 0
    # As a process that ends does, and a forked child does not: let go of the frames, and so of the loader's workers.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@pytest.fixture(scope="session")
def pictures():
    """A folder of 64 captioned pictures with metadata.jsonl."""
    return PICTURES


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with tiny models in `prior`, `decoder` and `encoder`. Shared by all tests: do not write to it."""
    from tiny_models import make_tiny_models

    folder = tmp_path_factory.mktemp("models")
    make_tiny_models(folder)
    return folder


@pytest.fixture
def run_script(tmp_path_factory):
    """run_script(args, launcher=(), timeout=600, **env): the script in a fresh process, a CompletedProcess of text.

    `launcher` goes between python and the script: ("-m", "torch.distributed.run", "--nproc_per_node", "2"). An
    environment variable that is None is removed.
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


@pytest.fixture(scope="session")
def run_main(tmp_path_factory):
    """run_main(args, timeout=300, **env): the script's `main` in a fork of this process, as a `Finished`.

    `env` works as in `run_script`, except for what libraries read when they are imported (HF_HUB_OFFLINE, HF_ENDPOINT,
    OMP_NUM_THREADS, ...): that needs a fresh process.
    """
    import train_text_to_image_prior  # noqa: F401  here, so that no fork has to

    def run(args, timeout=300, **env):
        folder = tmp_path_factory.mktemp("cwd")
        log = folder.parent / f"{folder.name}.log"
        child = multiprocessing.get_context("fork").Process(
            target=main_in_child, args=([str(arg) for arg in args], env, folder, log)
        )
        child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            child.join()
            pytest.fail(f"main did not end in {timeout} seconds; it wrote:\n{log.read_text(errors='replace')}")
        return Finished(child.exitcode, log.read_text(errors="replace"))

    return run
