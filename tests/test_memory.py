# SPDX-License-Identifier: Apache-2.0
"""What saves memory: each --optimizer computes its published formula, the bytes of its state are those that
the README states, and --offload_ema keeps the average in main memory."""

import re
from types import SimpleNamespace

import pytest
import torch
from benchmarks.benchmark import REAL_PRIOR
from conftest import TESTS, assert_continues_as, load_optimizer_state, resumed, same_weights
from tiny_models import wuerstchen
from torch._subclasses.fake_tensor import FakeTensorMode

import train_text_to_image_prior as script

README = TESTS.parent / "README.md"
RATE, DECAY = 1e-3, 0.1
ADAFACTOR = {
    "optimizer": "adafactor",
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_samples": 10,
    "max_train_steps": 5,
    "checkpointing_steps": 1,
    "adam_weight_decay": 0.1,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
    "use_ema": True,
    "offload_ema": True,
}


# ----------------------------------------------------------------------------------------------- the formulas


def adam(weight, gradients):
    """AdamW (arXiv:1711.05101, algorithm 2) with betas 0.9 and 0.99 and epsilon 1e-3."""
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        denominator = (square / (1 - 0.99**step)).sqrt() + 1e-3
        weight = weight - RATE * (mean / (1 - 0.9**step) / denominator + DECAY * weight)
    return weight


def adafactor(weight, gradients):
    """Adafactor (arXiv:1804.04235, algorithms 4 and 5) with a given rate: of the second moment of each matrix
    (the last two dimensions) there are only the means of rows and columns, its decay is 1 - t^-0.8, and
    updates are clipped to a root mean square of 1."""
    square = torch.zeros_like(weight)
    rows, columns = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True) if weight.dim() > 1 else None
    for step, gradient in enumerate(gradients, 1):
        decay, squares = 1 - step**-0.8, gradient**2 + 1e-30
        if columns is None:
            square = decay * square + (1 - decay) * squares
        else:
            rows = decay * rows + (1 - decay) * squares.mean(-1, keepdim=True)
            columns = decay * columns + (1 - decay) * squares.mean(-2, keepdim=True)
            square = rows * columns / rows.mean(-2, keepdim=True)
        update = gradient / square.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        weight = weight - RATE * (update + DECAY * weight)
    return weight


@pytest.mark.parametrize(
    ("optimizer", "formula", "steps", "tolerance"),
    [
        ("adamw", adam, 4, 1e-4),
        ("adamw8bit", adam, 1, 1e-4),  # what is rounded to 8 bits is only seen by the second step
        ("adamw8bit", adam, 4, 0.03),
        ("adafactor", adafactor, 4, 1e-4),
    ],
)
def test_an_optimizer_follows_its_formula(optimizer, formula, steps, tolerance):
    """In float64, on weights of each shape that the prior has; the error is relative to what they moved."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64,), (48, 96), (64, 1, 3, 3), (64, 16, 1, 1)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    # Gradients whose size differs by row and column, and changes from step to step.
    gradients = [
        [
            torch.randn(shape, generator=generator)
            * torch.rand(shape, generator=generator)
            * 10.0 ** (step - 2)
            for step in range(steps)
        ]
        for shape in shapes
    ]
    start = [weight.detach().double() for weight in weights]
    argv = ["--train_data_dir=unused", f"--optimizer={optimizer}", f"--learning_rate={RATE}"]
    argv += [f"--adam_weight_decay={DECAY}"]
    if optimizer != "adafactor":
        argv += ["--adam_beta2=0.99", "--adam_epsilon=1e-3"]
    model = SimpleNamespace(parameters=lambda: iter(weights))
    run = script.make_optimizer(model, script.parse_args(argv), torch.device("cpu"))
    for step in range(steps):
        for weight, of_steps in zip(weights, gradients, strict=True):
            weight.grad = of_steps[step].clone()
        run.step()
    for weight, begun, of_steps in zip(weights, start, gradients, strict=True):
        expected = formula(begun, [gradient.double() for gradient in of_steps])
        assert (weight - expected).norm() < tolerance * (expected - begun).norm(), weight.shape


# ---------------------------------------------------------------------------------------------------- a run


def test_adafactor_resumes_exactly_with_the_average_in_main_memory(train, tmp_path):
    run = train(**ADAFACTOR)
    assert run.returncode == 0, run
    names = {name.split(".")[1] for name in load_optimizer_state(run.folder / "checkpoint-5")}
    assert names == {"step", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "RMS"}
    again = resumed(train, run, 3, tmp_path, **ADAFACTOR)
    assert_continues_as(again, run, 3, 5)


@pytest.mark.slow
def test_ranks_train_alike_with_adafactor_and_resume_exactly(train, train_ranks, tmp_path):
    runs = train_ranks(**ADAFACTOR)
    assert all(run.returncode == 0 for run in runs), runs
    assert runs[0].record["clipped"] == runs[1].record["clipped"]
    again = resumed(lambda **flags: train_ranks(**flags)[0], runs[0], 3, tmp_path, **ADAFACTOR)
    assert_continues_as(again, runs[0], 3, 5)


# ---------------------------------------------------------------------------------------------- main memory


def test_the_offloaded_average_meets_the_weights_on_one_device():
    """With tensors that have a device and no content: PyTorch refuses to compute with those of two devices,
    as it would on a GPU."""
    args = SimpleNamespace(use_ema=True, offload_ema=True)
    with FakeTensorMode(), torch.no_grad():
        weights = [torch.nn.Parameter(torch.empty(4, device="cuda"), trained) for trained in (True, False)]
        prior = SimpleNamespace(parameters=lambda: iter(weights), config={})
        ema_prior = script.load_ema(args, prior, None, torch.device("cuda"))
        with pytest.raises(RuntimeError, match="devices"):
            ema_prior.step(weights)
        script.update_ema(ema_prior, prior)
        assert {average.device.type for average in ema_prior.shadow_params} == {"cpu"}
        with script.ema_weights(prior, ema_prior):
            assert {stored.device.type for stored in ema_prior.temp_stored_params} == {"cpu"}
        assert {weight.device.type for weight in weights} == {"cuda"}


@pytest.mark.slow
def test_the_average_is_the_same_with_and_without_offloading(train):
    """On a CPU, bit for bit, with a part of the prior frozen."""
    flags = {"use_ema": True, "max_train_steps": 3, "checkpointing_steps": 3, "learning_rate": 1e-3}
    runs = [train(freeze_mappers, **flags, offload_ema=offloaded) for offloaded in (False, True)]
    assert all(run.returncode == 0 for run in runs), runs
    assert same_weights(runs[0].prior(3, "prior_ema"), runs[1].prior(3, "prior_ema"))
    assert not same_weights(runs[0].prior(3, "prior_ema"), runs[0].prior(3))


def freeze_mappers():
    load_prior = script.load_prior

    def load_and_freeze(*args):
        prior = load_prior(*args)
        prior.cond_mapper.requires_grad_(False)
        return prior

    script.load_prior = load_and_freeze


# ---------------------------------------------------------------------------------------- the published sizes


def count_bytes(value):
    """The bytes of a tensor, or of those in a dict."""
    if torch.is_tensor(value):
        return value.untyped_storage().nbytes()
    return sum(map(count_bytes, value.values())) if isinstance(value, dict) else 0


def count_state(optimizer, depth):
    """The bytes of the weights and of an optimizer's state after a step, for `depth` blocks of the published
    prior."""
    prior = wuerstchen.WuerstchenPrior(c_in=16, dropout=0.1, **REAL_PRIOR | {"depth": depth})
    args = script.parse_args(["--train_data_dir=unused", f"--optimizer={optimizer}"])
    run = script.make_optimizer(prior, args, torch.device("cpu"))
    for parameter in prior.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    run.step()
    return count_bytes(dict(prior.named_parameters())), sum(map(count_bytes, run.state.values()))


@pytest.mark.parametrize(
    "optimizer", ["adamw", pytest.param("adamw8bit", marks=pytest.mark.slow), "adafactor"]
)
def test_the_readme_states_the_bytes_that_are_allocated(optimizer):
    """All blocks are alike, so two small priors give the bytes of the large one."""
    small, large = count_state(optimizer, 0), count_state(optimizer, 1)
    depth = REAL_PRIOR["depth"]
    weights, state = ((a + depth * (b - a)) / 2**30 for a, b in zip(small, large, strict=True))
    row = re.search(rf"^\| `{optimizer}` \|(.*)\|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [float(cell) for cell in row.group(1).split("|")]
    together = 2 * weights + state
    assert cells == pytest.approx([weights, weights, state, together, together + weights], abs=0.006)
