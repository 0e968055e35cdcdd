# SPDX-License-Identifier: Apache-2.0
"""What is trained, and by what rule: each --optimizer computes its published formula, parameter groups keep
their own rates, schedules are factors of them, the average follows its recursion, frozen parts stay as they
are, and the README states the bytes of all that. A model that cannot be loaded ends the run at the start."""

import functools
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    TESTS,
    assert_continues_as,
    checksums,
    distance,
    load_optimizer_state,
    load_weights,
    resumed,
    same_weights,
    script,
)
from tiny_models import wuerstchen
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

RATE, DECAY = 1e-3, 0.1


def parse(*words):
    return script.parse_args(["--train_data_dir=unused", *words])


# ------------------------------------------------------------------------------------------------ optimizers


def adam(weight, gradients, rates=(RATE,) * 4, decay=DECAY):
    """AdamW (arXiv:1711.05101, algorithm 2) with betas 0.9 and 0.99 and epsilon 1e-3."""
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=False), 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        denominator = (square / (1 - 0.99**step)).sqrt() + 1e-3
        weight = weight - rate * (mean / (1 - 0.9**step) / denominator + decay * weight)
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
        ("adamw8bit", adam, 1, 1e-4),  # 8-bit rounding has an effect from the second step on
        ("adamw8bit", adam, 4, 0.03),
        ("adafactor", adafactor, 4, 1e-4),
    ],
)
def test_an_optimizer_follows_its_formula(optimizer, formula, steps, tolerance):
    """In float64, on weights of each shape that the prior has; the error is relative to what they moved."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64,), (48, 96), (64, 1, 3, 3), (64, 16, 1, 1)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    def random_gradient(shape, step):  # whose size differs by row and column, and changes from step to step
        factors = torch.rand(shape, generator=generator) * 10.0 ** (step - 2)
        return torch.randn(shape, generator=generator) * factors

    gradients = [[random_gradient(shape, step) for step in range(steps)] for shape in shapes]
    start = [weight.detach().double() for weight in weights]
    adam_flags = [] if optimizer == "adafactor" else ["--adam_beta2=0.99", "--adam_epsilon=1e-3"]
    flags = [f"--optimizer={optimizer}", f"--learning_rate={RATE}", f"--adam_weight_decay={DECAY}"]
    model = SimpleNamespace(parameters=lambda: iter(weights))
    made = script.make_optimizer(model, parse(*flags, *adam_flags))
    for step in range(steps):
        for weight, of_steps in zip(weights, gradients, strict=True):
            weight.grad = of_steps[step].clone()
        made.step()
    for weight, begun, of_steps in zip(weights, start, gradients, strict=True):
        expected = formula(begun, [gradient.double() for gradient in of_steps])
        assert (weight - expected).norm() < tolerance * (expected - begun).norm(), weight.shape


ADAFACTOR = {"optimizer": "adafactor", "adam_weight_decay": 0.1, "learning_rate": 1e-3, "use_ema": True}
ADAFACTOR |= {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_samples": 10}
ADAFACTOR |= {"max_train_steps": 5, "checkpointing_steps": 1, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
ADAFACTOR |= {"offload_ema": True}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_adafactor_resumes_exactly_with_the_average_in_main_memory(train, train_ranks, tmp_path, ranks):
    start = train if ranks == 1 else lambda **flags: train_ranks(**flags)[0]
    run = start(**ADAFACTOR)
    assert run.returncode == 0, run
    names = {name.split(".")[1] for name in load_optimizer_state(run.folder / "checkpoint-5")}
    assert names == {"step", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "RMS"}
    assert_continues_as(resumed(start, run, 3, tmp_path, **ADAFACTOR), run, 3, 5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_the_benchmarks_readme_states_the_bytes_that_are_allocated(optimizer):
    """All blocks are alike, so priors of the published size with 0 and 1 blocks give the bytes of all 32."""
    sizes = []  # of the weights, and of the optimizer's state
    for depth in (0, 1):
        config = {"c_in": 16, "c": 1536, "c_cond": 1280, "c_r": 64, "depth": depth, "nhead": 24}
        prior = wuerstchen.WuerstchenPrior(**config, dropout=0.1)
        made = script.make_optimizer(prior, parse(f"--optimizer={optimizer}"))
        for parameter in prior.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        made.step()
        parts = [list(prior.parameters()), list(made.state.values())]
        tensors = [[leaf for leaf in tree_leaves(part) if torch.is_tensor(leaf)] for part in parts]
        sizes.append([sum(tensor.untyped_storage().nbytes() for tensor in part) for part in tensors])
    weights, state = ((none + 32 * (one - none)) / 2**30 for none, one in zip(*sizes, strict=True))
    readme = (TESTS / "benchmarks" / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{optimizer}` \|(.*)\|$", readme, re.MULTILINE)
    cells = [float(cell) for cell in row.group(1).split("|")]
    together = 2 * weights + state
    assert cells == pytest.approx([weights, weights, state, together, together + weights], abs=0.006)


# ---------------------------------------------------------------------------- schedules and parameter groups


def relative_rate(schedule, step):
    """The share of the peak rate after some steps, of 6 with 2 of warm-up."""
    left = min(1.0, (6 - step) / 4)
    return {
        "constant": 1.0,
        "constant_with_warmup": min(1.0, step / 2),
        "linear": min(step / 2, left),
        "cosine": min(step / 2, 0.5 * (1 + math.cos(math.pi * (1 - left)))),
        "cosine_with_restarts": min(step / 2, 0.5 * (1 + math.cos(math.pi * (1 - left)))),  # one cycle
        "polynomial": min(step / 2, left * (1 - 1e-7 / 1e-3) + 1e-7 / 1e-3),  # to 1e-7 in a straight line
        "piecewise_constant": 1.0 if step < 2 else 0.5 if step < 5 else 0.1,
    }[schedule]


SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@pytest.mark.parametrize("first_step", [0, 3])
@pytest.mark.parametrize("schedule", [*SCHEDULES, "piecewise_constant"])
def test_a_schedule_is_a_factor_of_each_groups_rate_from_any_step_on(schedule, first_step):
    rules = ["--lr_step_rules=1:2,0.5:5,0.1"] if schedule == "piecewise_constant" else []
    args = parse(f"--lr_scheduler={schedule}", "--lr_warmup_steps=2", "--max_train_steps=6", *rules)
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} | own for own in ({}, {"lr": 5e-5})]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    lr_scheduler = script.make_lr_scheduler(optimizer, args, first_step)
    for step in range(first_step, 7):
        rates = [group["lr"] for group in optimizer.param_groups]
        expected = [peak * relative_rate(schedule, step) for peak in (1e-3, 5e-5)]
        assert rates == pytest.approx(expected, rel=1e-6, abs=1e-12), step
        optimizer.step()
        lr_scheduler.step()


def test_the_learning_rate_is_counted_in_steps_whatever_the_accumulation(train):
    flags = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "lr_scheduler": "linear"}
    run = train(**flags, lr_warmup_steps=2, learning_rate=1e-3, max_train_steps=6, record=True)
    assert run.returncode == 0, run
    rates = [1e-3 * relative_rate("linear", step) for step in range(7)]
    assert run.record["rates"] == pytest.approx(rates[:6], rel=1e-6, abs=1e-12)
    assert run.logged("lr") == pytest.approx(dict(enumerate(rates[1:], 1)), rel=1e-6, abs=1e-12)
    assert "--lr_warmup_steps" not in run.output


def test_a_warm_up_as_long_as_the_run_is_reported(train):
    run = train(max_train_steps=1, lr_scheduler="cosine")
    assert re.search("WARNING.*--lr_warmup_steps=500 ", run.output), run


GROUPS = {"max_train_steps": 4, "checkpointing_steps": 1, "learning_rate": 1e-3, "adam_weight_decay": 0.1}
GROUPS |= {"lr_scheduler": "linear", "lr_warmup_steps": 1, "adam_beta2": 0.99, "adam_epsilon": 1e-3}
OWN_RATE, OWN_DECAY = 2e-4, 5.0


def is_in_block(name):
    return name.startswith("blocks.")


def make_two_groups(file):
    """Edits make_optimizer: blocks train as the flags say, the rest at a rate and a decay of its own. Saves
    each step's gradients."""
    step, gradients = torch.optim.AdamW.step, []

    def make_optimizer(prior, args):
        named = dict(prior.named_parameters())
        blocks, others = ([w for n, w in named.items() if is_in_block(n) == own] for own in (True, False))
        groups = [{"params": blocks}, {"params": others, "lr": OWN_RATE, "weight_decay": OWN_DECAY}]

        def step_and_record(self, *args):
            gradients.append({name: weight.grad.double() for name, weight in named.items()})
            torch.save(gradients, file)
            return step(self, *args)

        torch.optim.AdamW.step = step_and_record
        settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        settings |= {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
        return torch.optim.AdamW(groups, **settings)

    script.make_optimizer = make_optimizer


def test_parameter_groups_keep_their_own_rates_and_decays_also_after_resuming(train, models, tmp_path):
    """Flags that change on resuming apply to the group that has its settings from them."""
    file = tmp_path / "gradients.pt"
    train = functools.partial(train, functools.partial(make_two_groups, file))
    run = train(**GROUPS)
    assert run.returncode == 0, run
    gradients = torch.load(file)
    assert_continues_as(resumed(train, run, 2, tmp_path / "same", **GROUPS), run, 2, 4)
    changed = resumed(train, run, 2, tmp_path / "changed", **GROUPS | {"learning_rate": 4e-3})
    before, factors = load_weights(models / "prior" / "prior"), [0, 1, 2 / 3, 1 / 3]
    later = gradients[:2] + torch.load(file)
    for trained, of_steps, rate in ((run, gradients, 1e-3), (changed, later, 4e-3)):
        for own in (False, True):
            peaks, decay = ([OWN_RATE] * 4, OWN_DECAY) if own else ([1e-3, 1e-3, rate, rate], 0.1)
            rates = [factor * peak for factor, peak in zip(factors, peaks, strict=True)]
            start = {name: weight.double() for name, weight in before.items() if is_in_block(name) != own}
            steps = {name: [gradient[name] for gradient in of_steps] for name in start}
            right = {name: adam(start[name], steps[name], rates, decay) for name in start}
            made = {name: weight for name, weight in trained.prior(4).items() if name in start}
            assert distance(made, right) < 1e-3 * distance(start, right), (rate, own)


# ------------------------------------------------------------------------------- the average and frozen parts

# Six samples a step, ten rows: epochs end within steps 2, 4 and 7, and with step 5.
AVERAGED = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_samples": 10, "record": True}
AVERAGED |= {"max_train_steps": 7, "checkpointing_steps": 1, "use_ema": True, "learning_rate": 1e-3}


def test_the_average_follows_its_recursion(train):
    run = train(**AVERAGED)
    assert run.returncode == 0, run
    average = {name: value.double() for name, value in run.prior(1).items()}
    assert distance(average, run.prior(1, "prior_ema")) == 0, "after the first step there is nothing else"
    for step in range(2, 8):
        decay = min(0.9999, (1 + step - 1) / (10 + step - 1))
        for name, value in run.prior(step).items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
        assert distance(average, run.prior(step, "prior_ema")) < 1e-6
    assert distance(run.prior(7), run.prior(7, "prior_ema")) > 1e-4
    assert same_weights(run.prior(), run.prior(7, "prior_ema")), "the average is what is saved"


def test_all_weights_of_the_prior_are_trained_and_none_of_the_encoders(train, models):
    run = train(**AVERAGED)
    before, after = load_weights(models / "prior" / "prior"), run.prior(7)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    image_encoder = script.EfficientNetEncoder.from_pretrained(models / "encoder")
    text_encoder = script.CLIPTextModel.from_pretrained(models / "prior" / "text_encoder")
    for name, encoder in (("image_encoder", image_encoder), ("text_encoder", text_encoder)):
        assert run.record["frozen"][name] == checksums(encoder), "batch statistics included"
    for step in run.record["steps"]:
        assert not step["image_encoder_training"] and not step["text_encoder_training"]


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="it asks CUDA's driver about such tensors")
def test_the_offloaded_average_is_in_main_memory():
    """With tensors that have a device and no content: PyTorch refuses to compute with those of two devices,
    as it would on a GPU."""
    with FakeTensorMode(), torch.no_grad():
        weights = [torch.nn.Parameter(torch.empty(4, device="cuda"), trained) for trained in (True, False)]
        prior = SimpleNamespace(parameters=lambda: iter(weights), config={}, device=torch.device("cuda"))
        for offloaded, device in ((True, "cpu"), (False, "cuda")):
            ema_prior = script.load_ema(SimpleNamespace(use_ema=True, offload_ema=offloaded), prior, None)
            script.update_ema(ema_prior, prior, SimpleNamespace(offload_ema=offloaded))
            assert {average.device.type for average in ema_prior.shadow_params} == {device}
            with script.ema_weights(prior, ema_prior):
                assert {weight.device.type for weight in weights} == {"cuda"}
                assert {stored.device.type for stored in ema_prior.temp_stored_params} == {"cpu"}
            assert {average.device.type for average in ema_prior.shadow_params} == {device}


def train_attention_alone():
    """Freezes all of the prior but its attention blocks."""
    load_prior = script.load_prior

    def load_and_freeze(*args):
        prior = load_prior(*args)
        prior.requires_grad_(False)
        for block in prior.blocks:
            if type(block).__name__ == "AttnBlock":
                block.requires_grad_(True)
        return prior

    script.load_prior = load_and_freeze


def test_a_part_of_the_prior_can_be_frozen(train, models):
    """With checkpointing, the first attention block gets a gradient although none of its inputs needs one.
    Whether the average is offloaded makes no difference."""
    flags = {"max_train_steps": 4, "learning_rate": 1e-3, "checkpointing_steps": 1, "use_ema": True}
    plain = train(train_attention_alone, **flags)
    checkpointing = train(train_attention_alone, **flags, gradient_checkpointing=True, offload_ema=True)
    before = load_weights(models / "prior" / "prior")
    trained = {name for name in before if name.startswith(("blocks.2.", "blocks.5."))}
    assert len(trained) == 2 * 10, "query, key, value, output and condition of two blocks"
    for run in (plain, checkpointing):
        assert run.returncode == 0, run
        for weights in (run.prior(1), run.prior(4), run.prior(4, "prior_ema"), run.prior()):
            assert {name for name in before if not torch.equal(weights[name], before[name])} == trained
        optimized = {name.split(".")[0] for name in load_optimizer_state(run.folder / "checkpoint-4")}
        assert len(optimized) == len(trained), "the optimizer has nothing of the others"
    assert checkpointing.losses() == pytest.approx(plain.losses(), rel=1e-5)
    for name in ("prior", "prior_ema"):
        moved = distance(plain.prior(4, name), before)
        assert distance(checkpointing.prior(4, name), plain.prior(4, name)) < 1e-3 * moved


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("part", ["prior/text_encoder", "prior/prior", "decoder/vqgan", "encoder"])
def test_a_git_lfs_pointer_in_place_of_weights_is_named_before_the_training(train, models, tmp_path, part):
    shutil.copytree(models, tmp_path / "models")
    (file,) = (tmp_path / "models" / part).glob("*.safetensors")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n")
    folders = {"prior": "prior_model", "decoder": "decoder_model", "encoder": "image_encoder"}
    flags = {f"pretrained_{name}_name_or_path": tmp_path / "models" / f for f, name in folders.items()}
    run = train(**flags)
    assert run.returncode == 1, run
    line = run.output.splitlines()[-1]
    assert f"--pretrained_{folders[part.split('/')[0]]}_name_or_path=" in line, run
    assert f"{file} is a Git LFS pointer" in line and "Traceback" not in run.output
    assert not (run.folder / "loss.jsonl").exists()
