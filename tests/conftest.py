# SPDX-License-Identifier: Apache-2.0
"""What all tests share. Three fixtures run the real command, with tiny models, 64 real images and no network:

    run = train(max_train_steps=2)                  in a fork of this process, which has all imports done
    run = train_fresh(launcher=("-m", "torch.distributed.run"))     in a new process, 10 seconds slower
    runs = train_ranks(ranks=2)                     in a fork for each rank; they train together, over gloo

Keywords are the command's flags, on top of those in `tiny_args`; others are explained at each fixture. A run
starts in an empty folder of its own. A `Run` has its exit status, its output, and readers of what it wrote.

A fork has what the test has monkeypatched, and runs what is given as `patch`; it cannot have another value of
what libraries read when they are imported (HF_ENDPOINT, OMP_NUM_THREADS): that needs a new process. To save
time, forks make images in few steps, and their image encoder is a small one.
"""

import functools
import gc
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from contextlib import contextmanager, nullcontext, suppress
from io import BytesIO
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "train_text_to_image_prior.py"
IMAGES = TESTS / "data" / "emoji-64"
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
import tiny_models  # noqa: E402
import torch  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from diffusers import DDPMWuerstchenScheduler  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # noqa: E402
from tensorboard.util.tensor_util import make_ndarray  # noqa: E402
from torch.utils._pytree import tree_flatten_with_path  # noqa: E402
from transformers import CLIPTextModel  # noqa: E402

import train_text_to_image_prior as script  # noqa: E402
from modeling_efficient_net_encoder import EfficientNetEncoder  # noqa: E402

# Threads do not survive a fork: had torch started its pool here, the first matrix product in a child would
# wait for it for ever. With one thread it starts none.
torch.set_num_threads(1)
# A fork makes torch's other pool anew, when it is first asked for: not by two threads of autograd at once.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
PartialState(cpu=True)  # the script's logger asks it for the rank
gc.freeze()  # or a child's garbage collector touches, and so copies, the memory of all imports
FORKING = threading.Lock()  # two threads that fork at the same time can block each other's child


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items):  # the longest files first: see pytest.ini
    items.sort(key=lambda item: not re.search("demo|learning|publishing", item.path.name))


# --------------------------------------------------------------------------------- models, images and flags


def run_in_fork(function, statuses=(0,)):
    """Calls a function in a fork and returns its exit status, one of these (-N: killed by signal N).

    Tests use autograd in a fork only: later forks of this process could not use it.
    """
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(300)
    assert process.exitcode in statuses, "what it wrote is in the captured output"
    return process.exitcode


@pytest.fixture(scope="session")
def images():
    """A folder of 64 captioned images with metadata.jsonl."""
    return IMAGES


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with tiny models in `prior`, `decoder` and `encoder`. Do not write to it. The encoder has a
    small backbone that only this process and its forks know; new processes get `full_encoder`."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make_tiny_models(folder, effnet="small")
    return folder


@pytest.fixture(scope="session")
def full_encoder(tmp_path_factory):
    """A folder with an encoder of the published size."""
    folder = tmp_path_factory.mktemp("full") / "encoder"
    tiny_models.make_encoder(seed=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def steady_prior(models, tmp_path_factory):
    """A folder with the tiny prior's pipeline, its dropout at 0, so that a test can compute a step again."""
    folder = tmp_path_factory.mktemp("steady") / "prior"
    shutil.copytree(models / "prior", folder)
    config = folder / "prior" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout": 0.0}))
    return folder


def tiny_args(models, images, output_dir, **flags):
    """The command line of a quick run: three steps of four images each.

    `flags` override and add: True is a bare flag, None or False removes one, a list gives several.
    """
    sources = {"prior_model": "prior", "decoder_model": "decoder", "image_encoder": "encoder"}
    settings = {f"pretrained_{name}_name_or_path": models / folder for name, folder in sources.items()}
    settings |= {"train_data_dir": images, "output_dir": output_dir, "resolution": 64, "train_batch_size": 4}
    settings |= {"max_train_steps": 3, "lr_scheduler": "constant", "seed": 0, "report_to": "none"}
    args = []
    for flag, value in (settings | flags).items():
        if value is not None and value is not False:
            values = value if isinstance(value, (list, tuple)) else [value]
            args += [f"--{flag}", *(str(each) for each in values if each is not True)]
    return args


# --------------------------------------------------------------------------------------------------- readers


def load_weights(folder):
    """The weights of a diffusers model in its folder."""
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


def load_optimizer_state(checkpoint):
    """The optimizer's moments and counts in a checkpoint, by name."""
    saved = torch.load(checkpoint / "optimizer.bin", map_location="cpu", weights_only=True)
    leaves, _ = tree_flatten_with_path(saved["optimizer"]["state"])  # the 8-bit optimizer nests more dicts
    return {".".join(str(key.key) for key in path): torch.as_tensor(value) for path, value in leaves}


def read_wandb(folder):
    """The records of wandb's newest offline file below a folder (WANDB_DIR of the run), in wandb's own type.

    It is in LevelDB's log format: fragments with a header of 7 bytes, in blocks of 32 KiB.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    files = folder.glob("wandb/offline-run-*/*.wandb")  # Accelerate 1.10 starts a run twice
    data = max(files, key=lambda file: file.parent.name).read_bytes()
    at, payload, records = 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        payload += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last fragment of one
            records.append(Record.FromString(payload))
            payload = b""
    return records


class Output:
    """An --output_dir, `folder`, and readers of what is in there. No step may come twice."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def prior(self, step=None, name="prior"):
        """The weights of the prior, in the checkpoint of a step or in the result."""
        return load_weights(self.folder / ("prior_pipeline" if step is None else f"checkpoint-{step}") / name)

    def checkpoints(self):
        """The steps of the complete checkpoints, oldest first."""
        return [script.read_state(folder)["global_step"] for folder in script.list_checkpoints(self.folder)]

    def losses(self, column="train_loss"):
        """A column of loss.jsonl, {step: number}."""
        rows = [json.loads(line) for line in (self.folder / "loss.jsonl").read_text().splitlines()]
        numbers = [(row["step"], row[column]) for row in rows if column in row]
        assert [step for step, _ in numbers] == sorted({step for step, _ in numbers}), column
        return dict(numbers)

    def samples(self):
        """The validation images, {(step, index of the prompt): pixels}."""
        pattern = re.compile(r"step-(\d{7})-prompt-(\d+)\.png")
        found = {path: pattern.fullmatch(path.name) for path in sorted((self.folder / "samples").iterdir())}
        assert [path.name for path, match in found.items() if not match] in ([], ["contact-sheet.png"])
        return {(int(m[1]), int(m[2])): np.asarray(Image.open(path)) for path, m in found.items() if m}

    def logged(self, tag=None):
        """What TensorBoard shows of a tag, {step: number, text or pixels}, or of each, {tag: {step: ...}}."""
        shown, folder = {}, self.folder / "logs" / "text2image-fine-tune"
        events = EventAccumulator(str(folder), {"tensors": 0}).Reload()
        for name in events.Tags()["tensors"]:
            if name.startswith("_"):  # of TensorBoard's plugin for settings
                continue
            values = [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(name)]
            assert [step for step, _ in values] == sorted({step for step, _ in values}), name
            if name.endswith("/text_summary"):
                shown[name] = {step: value.item().decode() for step, value in values}
            elif name.startswith("validation/"):  # width, height, image
                shown[name] = {step: np.asarray(Image.open(BytesIO(value[2]))) for step, value in values}
            else:
                shown[name] = {step: value.item() for step, value in values}
        return shown if tag is None else shown[tag]


class Run(Output):
    """A run of the command. `returncode` is -N if signal N killed it, and None while it runs.

    `cwd` is the folder it started in, `process` a Popen (of `train_fresh`) or a multiprocessing.Process.
    Either leads a process group of its own.
    """

    def __init__(self, tmp_path_factory, output_dir=None):
        self.place = tmp_path_factory.mktemp("run")
        self.cwd, self.log, self.record_file = (self.place / name for name in ("cwd", "log", "record.pt"))
        self.cwd.mkdir()
        super().__init__(self.cwd / (output_dir or self.place / "out"))
        self.process = self.returncode = None

    def __repr__(self):  # pytest shows it when an assertion about it fails
        return f"exit status {self.returncode} after:\n{self.output}"

    def finish(self, timeout=300):
        """Waits for the end. After `timeout` seconds it kills the run and fails the test."""
        fresh = isinstance(self.process, subprocess.Popen)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout) if fresh else self.process.join(timeout)
        self.returncode = self.process.returncode if fresh else self.process.exitcode
        if self.returncode is None:
            self.kill()
            pytest.fail(f"the run did not end in {timeout} seconds; it wrote:\n{self.output}")
        return self

    def ok(self):
        """This run, after a check that it has succeeded."""
        assert self.returncode == 0, self
        return self

    def error(self):
        """The last line of a run that has ended with exit status 1 and without a traceback."""
        assert self.returncode == 1 and "Traceback" not in self.output, self
        return self.output.strip().splitlines()[-1]

    def kill(self):
        """Kills the run and its processes, if it has not finished."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()

    @property
    def output(self):
        """What it has written to stdout and stderr so far."""
        return self.log.read_text(errors="replace")

    @functools.cached_property
    def record(self):
        """What `record_models` has recorded, if the run had record=True."""
        return torch.load(self.record_file, map_location="cpu")

    def all(self, name):
        """A recorded tensor of every micro-step as one batch."""
        return torch.cat([step[name] for step in self.record["steps"]])


# ---------------------------------------------------------------------------------------------- runs in forks


def at_call(owner, name, call, action, rank=None):
    """Calls `action` at the start of a function's `call`-th call, in each process or in that of a rank."""
    function, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(function)
    def counted(*args, **kwargs):
        if next(calls) == call and rank in (None, os.environ.get("RANK")):
            action()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


# The prior's and the decoder's steps for a validation image in a fork. By the defaults, which a `patch` of
# `sample_finely` restores, images take most of the time of a run that has some.
STEPS_OF_IMAGES = ([1.0, 0.6, 0.3, 0.0], 2)


def set_steps_of_images(timesteps, decoder_steps):
    script.wuerstchen.DEFAULT_STAGE_C_TIMESTEPS = timesteps
    decoder = script.wuerstchen.WuerstchenDecoderPipeline
    decoder.__call__ = functools.partialmethod(decoder.__call__, num_inference_steps=decoder_steps)


sample_finely = functools.partial(set_steps_of_images, script.wuerstchen.DEFAULT_STAGE_C_TIMESTEPS, 12)


def new_environment(env):
    """This process's environment with these changes; a variable that is None is removed."""
    return {name: str(value) for name, value in (os.environ | (env or {})).items() if value is not None}


def main_in_child(run, argv, env, patch, record):
    """Makes a forked process look like one that has just been started, and runs the script's `main` in it."""
    os.setsid()
    output = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
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

    os.chdir(run.cwd)
    env = new_environment(env)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [str(SCRIPT), *argv]
    status = 0
    try:
        with record_models(run.record_file) if record else nullcontext():
            set_steps_of_images(*STEPS_OF_IMAGES)
            if patch is not None:
                patch()
            sys.modules[script.__name__].main(argv)  # a patch may have put an edited script there
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        status = traceback.format_exc().strip()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    # A forked child would wait for the loader's workers, whereas they end when their parent does.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(status, str) else status)


@contextmanager
def record_models(file):
    """In the child, around `main`: records what goes in and out of the models, and saves that.

    `steps` has a dict for each micro-step, `rates` and `clipped` the rate and the gradient's norm of each
    step, `images` and `texts` the checksums of each batch that an encoder received, `frozen` the `checksums`
    of the encoders at the end.
    """
    record = {"steps": [], "rates": [], "clipped": [], "images": [], "texts": [], "frozen": {}}
    latest, frozen = {}, {}

    def note_after(cls, name, note):  # calls `note` after each call of a method
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            note(self, result, *args, **kwargs)
            return result

        setattr(cls, name, method)

    def note_encoder(encoder, latents, pixels):
        frozen.setdefault("image_encoder", encoder)
        record["images"].append([checksum(image) for image in pixels])
        latest.update(pixels=pixels, latents=latents, image_encoder_training=encoder.training)

    def note_text(encoder, output, input_ids, attention_mask, **_):
        frozen.setdefault("text_encoder", encoder)
        record["texts"].append([checksum(ids) for ids in input_ids])
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

    def note_rate(optimizer, _, *args):
        record["rates"].append(optimizer.param_groups[0]["lr"])

    def note_gradients(optimizer, *_):
        if optimizer.gradient_state.sync_gradients:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            record["clipped"].append(torch.stack([g.double().norm() for g in gradients]).norm().item())

    note_after(EfficientNetEncoder, "forward", note_encoder)
    note_after(CLIPTextModel, "forward", note_text)
    note_after(DDPMWuerstchenScheduler, "add_noise", note_noise)
    note_after(script.wuerstchen.WuerstchenPrior, "forward", note_prior)
    note_after(torch.optim.AdamW, "step", note_rate)
    note_after(AcceleratedOptimizer, "step", note_gradients)
    try:
        yield
    finally:
        record["frozen"] = {name: checksums(model) for name, model in frozen.items()}
        torch.save(record, file)


@pytest.fixture(scope="session")
def start_run(models, images, tmp_path_factory):
    """start_run(launch, argv, **flags): a Run; launch(run, argv) is called to start its process."""

    def start(launch, argv=None, **flags):
        run = Run(tmp_path_factory, flags.get("output_dir"))
        run.encoder = {name: flags[name] for name in flags if "image_encoder" in name}
        flags = {"output_dir": run.folder, "report_to": "tensorboard"} | flags
        argv = argv or tiny_args(models, images, **flags)
        with FORKING:
            run.process = launch(run, [str(word) for word in argv])
        return run

    return start


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


FINISHED = {}  # finished runs by their arguments
PATCHED = []  # not empty while a test runs that has `monkeypatch`


@pytest.fixture
def monkeypatch(monkeypatch):
    """pytest's own. A test that has it gets no earlier run, as its patches are not in there."""
    PATCHED.append(True)
    yield monkeypatch
    PATCHED.pop()


@pytest.fixture(scope="session")
def train_ranks(start_run, tmp_path_factory):
    """train_ranks(patch=None, ranks=2, env=None, timeout=120, record=False, argv=None, **flags): the finished
    Run of each rank.

    patch: called in the child before `main`.
    env(rank): environment variables of a rank; None removes one.
    record: whether to record what goes in and out of the models (`Run.record`, `Run.all`).
    argv: the whole command line, in place of that which is made from `flags`; then give `output_dir`, too.

    A run with the same arguments is not run again, unless the test has `monkeypatch`, or gives output_dir or
    resume_from_checkpoint.
    """

    def fork(*args, **options):
        process = multiprocessing.get_context("fork").Process(target=main_in_child, args=args, kwargs=options)
        process.start()
        return process

    def train_ranks(patch=None, ranks=2, env=None, timeout=120, record=False, argv=None, **flags):
        envs = [(env and env(rank)) or {} for rank in range(ranks)]
        key = repr((envs, patch, argv, sorted(flags.items())))
        reusable = not PATCHED and not {"output_dir", "resume_from_checkpoint"} & flags.keys()
        if reusable and key in FINISHED and record <= FINISHED[key][1]:
            return FINISHED[key][0]
        runs, place = [], {}
        with store_of_ranks() if ranks > 1 else nullcontext() as port:
            if ranks > 1:
                flags = {"output_dir": tmp_path_factory.mktemp("ranks") / "out"} | flags
                place = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
                place |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            try:
                for rank, env in enumerate(envs):
                    env = place | ({"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}) | env
                    launch = functools.partial(fork, env=env, patch=patch, record=record)
                    runs.append(start_run(launch, argv, **flags))
                for run in runs:
                    run.finish(timeout)
            finally:
                for run in runs:
                    run.kill()
        if reusable:
            FINISHED[key] = runs, record, patch  # with `patch`, whose address is in the key
        return runs

    return train_ranks


@pytest.fixture(scope="session")
def train(train_ranks):
    """train(patch=None, env=None, timeout=300, ...): a finished Run of one process. As `train_ranks`, except
    that `env` is a dict."""

    def train(patch=None, env=None, timeout=300, **options):
        return train_ranks(patch, 1, lambda rank: env, timeout, **options)[0]

    return train


# ------------------------------------------------------------------------------------ runs in new processes

PATCHED_SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import train_text_to_image_prior as script
{patch}
script.main()
"""


def run_command(command, env=None, cwd=None, timeout=300):
    """Any other command in a new process: a CompletedProcess, whose `stdout` has both streams as text."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=new_environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def train_fresh(start_run, full_encoder):
    """train_fresh(launcher=(), env=None, timeout=600, patch="", wrapper=(), wait=True, argv=None, **flags):
    a Run.

    launcher: words between python and the script: ("-m", "torch.distributed.run", "--nproc_per_node", "2").
    patch: lines of Python that run before `main`, in which `script` is the script.
    wrapper: words before python: ("nice", "-n", "19").
    wait: whether to wait for the end; otherwise call `finish()`. Meanwhile `run.output` can be read, and
        signals be sent to `run.process`.
    env, argv: as for `train`. Nothing is reused.
    """
    runs = []

    def train_fresh(launcher=(), env=None, timeout=600, patch="", wrapper=(), wait=True, argv=None, **flags):
        def launch(run, argv):
            program = run.place / "patched.py" if patch else SCRIPT
            if patch:
                program.write_text(PATCHED_SCRIPT.format(folder=str(SCRIPT.parent), patch=patch))
            with open(run.log, "w") as log:
                return subprocess.Popen(
                    [*wrapper, sys.executable, *launcher, str(program), *argv],
                    cwd=run.cwd,
                    env=new_environment(env),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

        flags = {"pretrained_image_encoder_name_or_path": full_encoder} | flags
        runs.append(start_run(launch, argv, **flags))
        return runs[-1].finish(timeout) if wait else runs[-1]

    yield train_fresh
    for run in runs:
        run.kill()


# ------------------------------------------------------------------------------------------------ comparisons


def same_weights(left, right):
    """Whether two sets of weights are the same, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def checksum(tensor):
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def checksums(model):
    """The dtype and the checksum of each tensor, {name: (dtype, number)}: an encoder has 80 MB."""
    return {name: (tensor.dtype, checksum(tensor)) for name, tensor in model.state_dict().items()}


def distance(left, right):
    """The largest difference between two sets of weights."""
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def equal_images(left, right):
    """Whether two dicts hold the same images."""
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def resumed(train, run, step, tmp_path, by="latest", **flags):
    """The run continued from one of its checkpoints, in a folder that holds that checkpoint alone."""
    folder = tmp_path / f"from-{step}"
    shutil.copytree(run.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    by = folder / f"checkpoint-{step}" if by == "path" else by
    return train(**run.encoder | flags, output_dir=folder, resume_from_checkpoint=by).ok()


def assert_continues_as(again, run, step, last):
    """Everything after `step` is what the uninterrupted run has."""
    for later in range(step + 1, last + 1):
        assert same_weights(again.prior(later), run.prior(later)), f"the weights of step {later}"
        here, there = (load_optimizer_state(r.folder / f"checkpoint-{later}") for r in (again, run))
        assert same_weights(here, there), f"the optimizer's state of step {later}"
        if (run.folder / f"checkpoint-{later}" / "prior_ema").exists():
            average, expected = (r.prior(later, "prior_ema") for r in (again, run))
            assert same_weights(average, expected), f"the average of step {later}"
    assert same_weights(again.prior(), run.prior())
    logged, expected = again.logged(), run.logged()
    for tag in ("train_loss", "grad_norm", "lr"):
        assert logged[tag] == {at: value for at, value in expected[tag].items() if at > step}, tag
    for image in (again.folder / "samples").glob("step-*.png"):
        assert image.read_bytes() == (run.folder / "samples" / image.name).read_bytes(), image.name
