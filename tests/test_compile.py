# SPDX-License-Identifier: Apache-2.0
"""--compile trains as the prior does without it.

Without a GPU, CUDA graphs are played by `PlayedGraphs`, which has what is treacherous about them: outputs and
gradients lie in memory that the next replay overwrites, and what was not copied into the graphs' own inputs is not
seen. The compiler is PyTorch's own. The last tests are for a machine with a GPU, which skips the others:
`pytest tests/test_compile.py -m "slow or not slow"`.
"""

import functools
import itertools
import multiprocessing
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import test_training
import torch
from accelerate import DistributedType
from accelerate.utils import DynamoBackend
from test_training import assert_goes_on_as, distance, resumed, same
from tiny_models import PRIOR_TEXT_WIDTH, make_prior

import modeling_efficient_net_encoder as encoding

finished_runs, train, train_ranks = test_training.finished_runs, test_training.train, test_training.train_ranks
steady_prior = test_training.steady_prior

# Epochs of 14 rows end within updates, and validation is in between. AdamW's first step is the gradient's sign, which
# is rounding noise where the gradient is zero; with this epsilon it is not.
STEPS = {
    "max_train_steps": 5,
    "train_batch_size": 2,
    "checkpointing_steps": 1,
    "max_train_samples": 20,
    "validation_split": 6,
    "validation_steps": 2,
    "validation_prompts": "red apple",
    "use_ema": True,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.1,
}
LEFT_OUT = "--compile is left out: "
PARTITIONED = "aot_eager_decomp_partition"  # divides forward from backward as the real compiler, and stops there
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="plays a GPU where there is none")
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def steady(prior, accumulation):
    """STEPS of a prior without dropout."""
    return STEPS | {"gradient_accumulation_steps": accumulation, "pretrained_prior_model_name_or_path": prior}


# ------------------------------------------------------------------------------------- what stands in for a GPU


class PlayedGraphs:
    """torch.cuda.make_graphed_callables without a GPU, for one module: same memory, same order, no graphs."""

    def __init__(self, module, samples):
        self.module, self.run, self.training = module, module.forward, module.training
        self.weights = tuple(module.parameters())
        self.inputs = [sample.clone() for sample in samples]
        autocast = torch.is_autocast_enabled("cpu")
        assert not (autocast and torch.is_autocast_cache_enabled()), "it would keep weights from before an update"
        self.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, autocast, cache_enabled=False)
        for _ in range(3):
            output = self.run(*self.inputs)
            gradients = torch.autograd.grad(output, self.weights, torch.empty_like(output).fill_(float("nan")))
        self.output, self.gradients = output.detach().clone(), [gradient.clone() for gradient in gradients]
        module.forward = self.forward

    def forward(self, *inputs):
        assert self.module.training == self.training, "validation is not to be compiled, which would take long"
        return Replay.apply(self, *inputs, *self.weights)


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs, *inputs):
        print("replayed forward", flush=True)
        ctx.graphs = graphs
        for static, given in zip(graphs.inputs, inputs, strict=False):
            assert static.shape == given.shape and static.dtype == given.dtype
            static.copy_(given)
        with torch.enable_grad(), graphs.autocast():  # as when it was captured, whatever is around it now
            graphs.tape = graphs.run(*graphs.inputs)
        return graphs.output.copy_(graphs.tape.detach()).detach()

    @staticmethod
    def backward(ctx, gradient):
        print("replayed backward", flush=True)
        graphs = ctx.graphs
        found = torch.autograd.grad(graphs.tape, graphs.weights, gradient)
        for static, new in zip(graphs.gradients, found, strict=True):
            static.copy_(new)
        return None, None, None, None, *(static.detach() for static in graphs.gradients)


def played_graphs(module, samples):
    return PlayedGraphs(module, samples).module


def accelerators_state(kind, backend):
    return SimpleNamespace(distributed_type=kind, dynamo_plugin=SimpleNamespace(backend=backend))


class Cuda(str):
    type = "cuda"


def play(make=None, backend=PARTITIONED):
    """Makes compile_prior take the CPU for a GPU, and counts what is compiled."""
    compile_prior, compiled = encoding.compile_prior, torch.compile
    torch.cuda.make_graphed_callables = make or played_graphs
    torch.compile = functools.partial(compiled, backend=backend)

    def compile_as_if(prior, accelerator, args, prompt_embeds):
        ranks = {DistributedType.MULTI_CPU: DistributedType.MULTI_GPU}
        kind = ranks.get(accelerator.distributed_type, accelerator.distributed_type)
        state = accelerators_state(kind, accelerator.state.dynamo_plugin.backend)
        shown = SimpleNamespace(device=Cuda("cpu"), autocast=accelerator.autocast, state=state)
        compile_prior(prior, shown, args, prompt_embeds)
        print("compiled", torch._dynamo.utils.counters["stats"]["unique_graphs"], "times", flush=True)

    encoding.compile_prior = compile_as_if


def play_failure():
    play(make=fail)


def fail(*_):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")


# ------------------------------------------------------------------------------------------------ whole runs


def assert_trains_alike(compiled, plain, exact=None, tolerance=1e-4):
    """Weights and average of each update as those of `plain`, and what was logged. In half precision both differ from
    `exact`, a run in float32, and the compiled one must not do so by much more."""
    moved = distance(plain.prior(5), plain.prior(1))
    for update, name in itertools.product(range(1, 6), ("prior", "prior_ema")):
        here, there = compiled.prior(update, name), plain.prior(update, name)
        if exact is None:
            assert distance(here, there) < tolerance * moved, (update, name)
        else:
            rounding = distance(there, exact.prior(update, name))
            assert distance(here, exact.prior(update, name)) < 2 * rounding, (update, name)
    for tag in ("train_loss", "grad_norm", "lr", "val_loss"):
        assert compiled.logged(tag) == pytest.approx(plain.logged(tag), rel=tolerance), tag


CHECKPOINTING, BF16 = {"gradient_checkpointing": True, "cache_latents": True}, {"mixed_precision": "bf16"}
slow = pytest.mark.slow


@cpu_only
@pytest.mark.parametrize(
    ("accumulation", "flags", "backend"),
    [
        (3, {}, PARTITIONED),
        (1, CHECKPOINTING, PARTITIONED),
        pytest.param(1, {}, PARTITIONED, marks=slow),
        pytest.param(3, CHECKPOINTING, PARTITIONED, marks=slow),
        pytest.param(3, BF16, PARTITIONED, marks=slow),
        pytest.param(3, {}, "inductor", marks=slow),
        pytest.param(3, CHECKPOINTING | BF16, "inductor", marks=slow),
    ],
)
def test_a_run_is_that_of_the_uncompiled_prior(train, steady_prior, accumulation, flags, backend):
    """Weights, average, losses, norms and validation of each update; without dropout, of which each draws its own."""
    steps = steady(steady_prior, accumulation)
    compiled = train(functools.partial(play, backend=backend), **steps, **flags, compile=True)
    plain = train(**steps, **flags)
    assert compiled.returncode == plain.returncode == 0, (compiled, plain)
    assert compiled.output.count("replayed forward") == compiled.output.count("replayed backward") == 5 * accumulation
    assert "compiled 1 times" in compiled.output and LEFT_OUT not in compiled.output
    exact = train(**steps, **flags | {"mixed_precision": "no"}) if "mixed_precision" in flags else None
    assert_trains_alike(compiled, plain, exact, 2e-2 if exact else 1e-4)


@cpu_only
@slow
def test_8bit_adam_takes_the_graphs_gradients(train, steady_prior):
    pytest.importorskip("bitsandbytes")
    steps = steady(steady_prior, 2)
    compiled, plain = (train(m, **steps, use_8bit_adam=True, compile=bool(m)) for m in (play, None))
    assert compiled.returncode == plain.returncode == 0, (compiled, plain)
    assert_trains_alike(compiled, plain, tolerance=1e-2)


@cpu_only
@slow
def test_a_resumed_run_ends_as_the_unbroken_one(train, tmp_path):
    """With dropout, which follows from the seed and the update as everything else does."""
    steps = STEPS | {"gradient_accumulation_steps": 3, "compile": True}
    run = train(play, **steps)
    assert run.returncode == 0, run
    again = resumed(functools.partial(train, play), run, 2, tmp_path, **steps)
    assert_goes_on_as(again, run, 2, 5)


@cpu_only
@slow
def test_two_ranks_share_their_gradients(train_ranks, steady_prior):
    steps = steady(steady_prior, 2)
    compiled, plain = train_ranks(play, **steps, compile=True), train_ranks(**steps)
    assert all(run.returncode == 0 for run in (*compiled, *plain)), (*compiled, *plain)
    assert all(run.output.count("replayed backward") == 10 for run in compiled)
    assert_trains_alike(compiled[0], plain[0])


# ------------------------------------------------------------------------------------------- where it cannot be


@cpu_only
def test_on_a_cpu_it_is_left_out_with_one_line(train):
    compiled, plain = train(**STEPS, compile=True), train(**STEPS)
    assert compiled.returncode == 0, compiled
    assert compiled.output.count(LEFT_OUT) == 1 and "it is for CUDA" in compiled.output
    assert same(compiled.prior(), plain.prior())


@cpu_only
def test_without_a_compiler_it_is_left_out_with_one_line(train):
    steps = STEPS | {"gradient_accumulation_steps": 2}
    compiled, plain = train(play_failure, **steps, compile=True), train(**steps)
    assert compiled.returncode == 0, compiled
    told = [line for line in compiled.output.splitlines() if LEFT_OUT in line]
    assert len(told) == 1 and told[0].endswith(
        "RuntimeError: Failed to find C compiler. Please specify via CC environment variable"
    )
    assert same(compiled.prior(), plain.prior()) and "Traceback" not in compiled.output


@cpu_only
@slow
def test_accelerates_own_compiling_works_and_goes_first(train, steady_prior):
    steps = steady(steady_prior, 2)
    theirs, plain = train(env={"ACCELERATE_DYNAMO_BACKEND": "eager"}, **steps, compile=True), train(**steps)
    assert theirs.returncode == plain.returncode == 0, (theirs, plain)
    assert LEFT_OUT in theirs.output
    assert_trains_alike(theirs, plain)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        (DistributedType.DEEPSPEED, DynamoBackend.NO),
        (DistributedType.FSDP, DynamoBackend.NO),
        (DistributedType.NO, DynamoBackend.INDUCTOR),
    ],
)
def test_what_it_does_not_go_with_is_left_alone(monkeypatch, kind, backend):
    said, prior = [], make_prior()
    monkeypatch.setattr(encoding.logger, "warning", said.append)
    state = accelerators_state(kind, backend)
    encoding.compile_prior(prior, SimpleNamespace(device=Cuda("cpu"), state=state), None, None)
    assert "forward" not in vars(prior)
    assert len(said) == 1 and said[0].startswith(LEFT_OUT)


# ------------------------------------------------------------------------------- dropout, with the real compiler


def apart(test):
    """The test in a fork of its own: once autograd's threads run, nothing that this process forks can use autograd."""

    @functools.wraps(test)
    def run():
        child = multiprocessing.get_context("fork").Process(target=test)
        child.start()
        child.join()
        assert child.exitcode == 0

    return run


def played():
    """A prior with much dropout, and its compiled twin: functions of latents, timesteps and embeddings."""
    prior = make_prior(dropout=0.5).train()
    compiled = make_prior(dropout=0.5)
    args = SimpleNamespace(
        train_batch_size=4, resolution=128, gradient_accumulation_steps=1, gradient_checkpointing=True
    )
    state = accelerators_state(DistributedType.NO, DynamoBackend.NO)
    shown = SimpleNamespace(device=Cuda("cpu"), state=state, autocast=nullcontext)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "make_graphed_callables", played_graphs)
        patch.setattr(encoding.logger, "info", lambda text: None)  # it wants an Accelerator
        encoding.compile_prior(compiled, shown, args, torch.zeros(1, 77, PRIOR_TEXT_WIDTH))
    assert "replay" in compiled.forward.__code__.co_freevars
    return prior, compiled


def inputs():
    draw = torch.Generator().manual_seed(1)
    return (
        torch.randn(4, 16, 4, 4, generator=draw),
        torch.rand(4, generator=draw),
        torch.randn(4, 77, PRIOR_TEXT_WIDTH, generator=draw),
    )


@cpu_only
@slow
@apart
def test_the_backward_pass_makes_the_forward_passs_dropout_again():
    """The loss along its own gradient rises as the gradient says, with one seed's dropout."""
    _, prior = played()
    target = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(2))

    def loss():
        torch.manual_seed(3)
        return (prior(*inputs()) - target).square().mean()

    loss().backward()
    gradients = [weight.grad.clone() for weight in prior.parameters()]
    squared = sum(gradient.double().square().sum().item() for gradient in gradients)
    step, losses = 1e-2 / squared, []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for weight, gradient in zip(prior.parameters(), gradients, strict=True):
                weight.add_(gradient, alpha=sign * step)
            losses.append(loss().double().item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(squared, rel=1e-2)


@cpu_only
@slow
@apart
def test_dropout_has_the_same_distribution():
    """Mean and variance of what each of the priors predicts, over many seeds."""
    found = []
    for prior in played():
        with torch.no_grad():
            torch.manual_seed(4)
            drawn = torch.stack([prior(*inputs()).clone() for _ in range(400)]).double()
        found.append((drawn.mean(0), drawn.var(0)))
    (mean, variance), (compiled_mean, compiled_variance) = found
    errors = (compiled_mean - mean) / (2 * variance / 400).sqrt()
    assert errors.square().mean().item() == pytest.approx(1, abs=0.25), "means differ by their standard errors"
    assert (compiled_variance.mean() / variance.mean()).item() == pytest.approx(1, abs=0.05)


# -------------------------------------------------------------------------------------------- where there is a GPU


@gpu_only
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("flags", [{}, CHECKPOINTING], ids=["", "checkpointing"])
def test_on_a_gpu_a_run_is_that_of_the_uncompiled_prior(train, steady_prior, accumulation, precision, flags):
    steps = steady(steady_prior, accumulation)
    compiled = train(**steps, **flags, mixed_precision=precision, compile=True)
    plain = train(**steps, **flags, mixed_precision=precision)
    assert compiled.returncode == plain.returncode == 0, (compiled, plain)
    assert LEFT_OUT not in compiled.output and "Compiling" in compiled.output
    exact = None if precision == "no" else train(**steps, **flags, mixed_precision="no")
    assert_trains_alike(compiled, plain, exact, 5e-2 if exact else 1e-2)  # convolutions are in TF32


@gpu_only
def test_on_a_gpu_a_resumed_run_draws_as_the_unbroken_one(train, tmp_path):
    """With dropout. Kernels add up in any order, so not to the bit; another dropout would be another loss."""
    steps = STEPS | {"gradient_accumulation_steps": 3, "compile": True}
    run = train(**steps)
    assert run.returncode == 0, run
    again = resumed(train, run, 2, tmp_path, **steps)
    expected = {step: value for step, value in run.logged("train_loss").items() if step > 2}
    assert again.logged("train_loss") == pytest.approx(expected, rel=1e-4)
