# SPDX-License-Identifier: Apache-2.0
"""--compile trains as the prior does without it.

Without a GPU, `FakeGraphs` stands in for CUDA graphs and imitates their pitfalls: outputs and gradients are
in memory that the next replay overwrites, and only what was copied into the graphs' own inputs is seen. The
compiler is PyTorch's own. The last tests need a GPU, on which the others are skipped:

    pytest tests/test_compile.py -m "slow or not slow"
"""

import functools
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.compile_fx  # once, or each fork would import it
from accelerate.utils import DynamoBackend
from conftest import assert_continues_as, distance, resumed, run_in_fork, same_weights, script
from tiny_models import PRIOR_TEXT_WIDTH, make_prior

# Epochs of 14 rows end within steps, and validation is in between. AdamW's first step is the gradient's sign,
# which is rounding noise where the gradient is zero; with this epsilon it is not.
STEPS = {"max_train_steps": 5, "train_batch_size": 2, "checkpointing_steps": 1, "max_train_samples": 20}
STEPS |= {"validation_split": 6, "validation_steps": 2, "validation_prompts": "red apple", "use_ema": True}
STEPS |= {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "max_grad_norm": 0.1}
CHECKPOINTING = {"gradient_checkpointing": True, "cache_latents": True}
BF16 = {"mixed_precision": "bf16"}
IGNORED = "--compile is ignored: "
# A backend that separates forward from backward as the real compiler does, but compiles neither.
PARTITIONED = "aot_eager_decomp_partition"
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="imitates a GPU where there is none")
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
slow = pytest.mark.slow


def steps_without_dropout(prior, accumulation):
    return STEPS | {"gradient_accumulation_steps": accumulation, "pretrained_prior_model_name_or_path": prior}


# ----------------------------------------------------------------------------------- what stands in for a GPU


class FakeGraphs:
    """torch.cuda.make_graphed_callables without a GPU, for one module: same memory, same order, no graphs."""

    def __init__(self, module, samples):
        self.module, self.run, self.training = module, module.forward, module.training
        self.weights = tuple(module.parameters())
        self.inputs = [sample.clone() for sample in samples]
        autocast = torch.is_autocast_enabled("cpu")
        cached = autocast and torch.is_autocast_cache_enabled()
        assert not cached, "the graphs would keep half-precision weights from before a step"
        self.autocast = functools.partial(
            torch.autocast, "cpu", torch.bfloat16, autocast, cache_enabled=False
        )
        for _ in range(3):
            output = self.run(*self.inputs)
            nans = torch.empty_like(output).fill_(float("nan"))
            gradients = torch.autograd.grad(output, self.weights, nans)
        self.output = output.detach().clone()
        self.gradients = [gradient.clone() for gradient in gradients]
        module.forward = self.forward

    def forward(self, *inputs):
        assert self.module.training == self.training, "validation should not be compiled: it would take long"
        return Replay.apply(self, *inputs, *self.weights)


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs, *inputs):
        print("replayed forward", flush=True)
        ctx.graphs = graphs
        for static, given in zip(graphs.inputs, inputs, strict=False):
            assert static.shape == given.shape and static.dtype == given.dtype
            static.copy_(given)
        with torch.enable_grad(), graphs.autocast():  # as at capture, whatever autocast is active now
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


def make_fake_graphs(module, samples):
    return FakeGraphs(module, samples).module


class Cuda(str):
    """A device's name that says it is a GPU and is used as the CPU."""

    type = "cuda"


def fake_accelerator(backend, autocast=nullcontext):
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend))
    return SimpleNamespace(device=Cuda("cpu"), autocast=autocast, state=state)


def fake_gpu(make_graphs=make_fake_graphs, backend=PARTITIONED):
    """Makes compile_prior take the CPU for a GPU, and prints how often something is compiled."""
    compile_prior = script.compile_prior
    torch.cuda.make_graphed_callables = make_graphs
    torch.compile = functools.partial(torch.compile, backend=backend)

    def compile_on_fake_gpu(prior, accelerator, args, prompt_embeds):
        fake = fake_accelerator(accelerator.state.dynamo_plugin.backend, accelerator.autocast)
        compile_prior(prior, fake, args, prompt_embeds)
        print("compiled", torch._dynamo.utils.counters["stats"]["unique_graphs"], "times", flush=True)

    script.compile_prior = compile_on_fake_gpu


def fail_to_compile(*_):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")


# ------------------------------------------------------------------------------------------------- whole runs


def assert_trains_alike(compiled, plain, exact=None, tolerance=1e-4, without=()):
    """Compares the weights, their average and the logged values of each step with those of `plain`. In half
    precision both differ from `exact`, a run in float32, and the compiled one must not differ by much
    more. Weights whose names end with `without` are left out."""

    def weights(run, step, name="prior"):
        return {name: w for name, w in run.prior(step, name).items() if not name.endswith(without)}

    moved = distance(weights(plain, 5), weights(plain, 1))
    for at in itertools.product(range(1, 6), ("prior", "prior_ema")):
        here, there = weights(compiled, *at), weights(plain, *at)
        if exact is None:
            assert distance(here, there) < tolerance * moved, at
        else:
            rounding = distance(there, weights(exact, *at))
            assert distance(here, weights(exact, *at)) < 2 * rounding, at
    for tag in ("train_loss", "grad_norm", "lr", "val_loss"):
        assert compiled.logged(tag) == pytest.approx(plain.logged(tag), rel=tolerance), tag


# Micro-steps per step, what is on, and the compiler's backend.
ON_CPU = [
    (1, CHECKPOINTING, PARTITIONED),
    (3, {}, "inductor"),
    (3, CHECKPOINTING | BF16, "inductor"),
    (2, {"optimizer": "adafactor", "adam_epsilon": None}, PARTITIONED),
    (2, {"ranks": 2}, PARTITIONED),
]
PRECISIONS = [{}, BF16, {"mixed_precision": "fp16"}]
ON_GPU = [(n, on | p, None) for n in (1, 3) for on in ({}, CHECKPOINTING) for p in PRECISIONS]


@pytest.mark.parametrize(
    ("accumulation", "flags", "backend"),
    [
        *(pytest.param(*case, marks=[cpu_only, slow]) for case in ON_CPU),
        *(pytest.param(*case, marks=gpu_only) for case in ON_GPU),
    ],
)
def test_a_compiled_run_equals_the_uncompiled_one(train_ranks, steady_prior, accumulation, flags, backend):
    """In the weights, their average, losses, norms and validation of each step. Without dropout, for which
    both use other random numbers, and with Adafactor without the biases of attention's keys, which do not
    change its output: their gradients are rounding errors, and it has no epsilon that suppresses them."""
    flags = steps_without_dropout(steady_prior, accumulation) | {"timeout": 300} | flags
    patch = functools.partial(fake_gpu, backend=backend) if backend else None
    compiled, plain = train_ranks(patch, **flags, compile=True), train_ranks(**flags)
    for run in compiled:
        assert "Compiling" in compiled[0].output and IGNORED not in run.output
        if backend:
            for direction in ("forward", "backward"):
                assert run.output.count(f"replayed {direction}") == 5 * accumulation
            assert "compiled 1 times" in run.output
    exact = None
    if "mixed_precision" in flags:
        exact = train_ranks(**flags | {"mixed_precision": "no"})[0].ok()
    if backend is None:
        tolerance = 5e-2 if exact else 1e-2  # convolutions are in TF32
    else:
        tolerance = 2e-2 if exact else 1e-2 if "optimizer" in flags else 1e-4
    without = "to_k.bias" if flags.get("optimizer") == "adafactor" else ()
    assert_trains_alike(compiled[0].ok(), plain[0].ok(), exact, tolerance, without)


@pytest.mark.parametrize(
    "patch", [pytest.param(fake_gpu, marks=[cpu_only, slow]), pytest.param(None, marks=gpu_only)]
)
def test_a_resumed_compiled_run_continues_with_the_same_bits(train, tmp_path, patch):
    """With dropout, which follows from the seed and the step as everything else does. A GPU's kernels add in
    any order, so there not to the bit; other random numbers would give another loss."""
    steps = STEPS | {"gradient_accumulation_steps": 3, "compile": True}
    run = train(patch, **steps).ok()
    again = resumed(functools.partial(train, patch), run, 2, tmp_path, **steps)
    if patch:
        assert_continues_as(again, run, 2, 5)
    expected = {step: value for step, value in run.logged("train_loss").items() if step > 2}
    assert again.logged("train_loss") == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------- where it is ignored


@cpu_only
@slow
@pytest.mark.parametrize(
    ("patch", "backend", "reason"),
    [
        (None, None, "it is for CUDA"),
        (functools.partial(fake_gpu, fail_to_compile), None, "RuntimeError: Failed to find C compiler."),
        (None, "eager", "it is for CUDA, without --dynamo_backend"),
    ],
    ids=["on a CPU", "without a compiler", "compiled by Accelerate"],
)
def test_compile_is_ignored_with_one_line_where_it_is_not_possible(
    train, steady_prior, patch, backend, reason
):
    steps = STEPS | {"gradient_accumulation_steps": 2}
    if backend:
        steps = steps_without_dropout(steady_prior, 2)
    plain = train(**steps).ok()
    compiled = train(patch, {"ACCELERATE_DYNAMO_BACKEND": backend}, **steps, compile=True).ok()
    (line,) = (line for line in compiled.output.splitlines() if IGNORED in line)
    assert reason in line and "Traceback" not in compiled.output
    if backend:
        assert_trains_alike(compiled, plain)
    else:
        assert same_weights(compiled.prior(), plain.prior())


# ---------------------------------------------------------------------------- dropout, with the real compiler


def prior_with_dropout(is_compiled):
    """A prior with much dropout, a function of latents, timesteps and embeddings."""
    prior = make_prior(dropout=0.5).train()
    if is_compiled:
        torch.cuda.make_graphed_callables = make_fake_graphs
        script.logger.info = lambda text: None  # it wants an Accelerator
        args = {"train_batch_size": 4, "resolution": 128, "gradient_accumulation_steps": 1}
        args = SimpleNamespace(**args, gradient_checkpointing=True)
        embeds = torch.zeros(1, 77, PRIOR_TEXT_WIDTH)
        script.compile_prior(prior, fake_accelerator(DynamoBackend.NO), args, embeds)
        assert "graphed_forward" in prior.forward.__code__.co_freevars
    return prior


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(4, 16, 4, 4, generator=generator),
        torch.rand(4, generator=generator),
        torch.randn(4, 77, PRIOR_TEXT_WIDTH, generator=generator),
    )


def check_backward():
    """With one seed's dropout, the loss along its gradient rises as the gradient predicts."""
    prior = prior_with_dropout(is_compiled=True)
    target = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(2))

    def loss():
        torch.manual_seed(3)
        return (prior(*make_inputs()) - target).square().mean()

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


def check_distribution():
    """Mean and variance of the predictions over many seeds. The means differ by their standard errors."""
    found = []
    for is_compiled in (False, True):
        prior = prior_with_dropout(is_compiled)
        torch.manual_seed(4)
        with torch.no_grad():
            predicted = torch.stack([prior(*make_inputs()).clone() for _ in range(400)]).double()
        found.append((predicted.mean(0), predicted.var(0)))
    (mean, variance), (compiled_mean, compiled_variance) = found
    errors = (compiled_mean - mean) / (2 * variance / 400).sqrt()
    assert errors.square().mean().item() == pytest.approx(1, abs=0.25)
    assert (compiled_variance.mean() / variance.mean()).item() == pytest.approx(1, abs=0.05)


@cpu_only
@slow
@pytest.mark.parametrize("check", [check_backward, check_distribution])
def test_compiled_dropout_is_right_in_the_backward_pass_and_in_distribution(check):
    run_in_fork(check)
