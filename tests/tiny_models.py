# SPDX-License-Identifier: Apache-2.0
"""Tiny models in the layouts of the published ones, so that the real command runs in seconds on a CPU.

    python tests/tiny_models.py FOLDER

writes FOLDER/prior (as warp-ai/wuerstchen-prior), FOLDER/decoder (as warp-ai/wuerstchen) and FOLDER/encoder
(as EfficientNetEncoder.save_pretrained does): the models of the README's first command. The prior, the text
encoders and the image encoder are random. The decoder can draw the 64 bundled images, since
train_demo_decoder.py has trained it; that of most tests is random, too.

The numbers that the script's arithmetic rests on are the published ones: 16 latent channels that come out
with mean -1 and deviation 42, CLIP's tokens, of which texts have 77, a decoder that takes images of multiples
of 128 pixels. All else is as small as possible: the tests' models know the first 2,000 pairs of CLIP's
vocabulary only, since reading all of it takes half a second, three times a run.
"""

import json
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDPMWuerstchenScheduler
from safetensors.torch import load_file
from torch import nn
from torchvision.models import efficientnet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

DATA = Path(__file__).resolve().parent / "data"
sys.path.insert(0, str(DATA.parent.parent))

from modeling_efficient_net_encoder import BACKBONES, EfficientNetEncoder  # noqa: E402
from train_text_to_image_prior import (  # noqa: E402
    load_image,
    make_image_transforms,
    normalize_pixels,
    wuerstchen,
)

IMAGES = DATA / "emoji-64"
DEMO_DECODER = DATA / "demo-decoder"
DEMO_RESOLUTION = 96  # 3 x 3 latents, which stand for 128 pixels
LATENT_CHANNELS = 16
LATENT_MEAN, LATENT_STD = 42.0, 1.0  # by their names in WuerstchenPriorPipeline: z * latent_mean - latent_std
PRIOR_TEXT_WIDTH = 32
NUM_MERGES, ALL_MERGES = 2000, 48894  # of pairs of tokens to one, in CLIP's vocabulary
DECODER_TEXT_WIDTH = 16  # another one than the prior's, so that mixing up the two text encoders is an error


@contextmanager
def seeded(seed):
    """Random numbers that depend on `seed` alone, and leave the caller's as they were."""
    with torch.random.fork_rng(devices=[]):  # no devices: asking for them would start CUDA
        torch.random.default_generator.manual_seed(seed)
        yield


def copy_tokenizer(folder, num_merges):
    """Writes CLIP's tokenizer, or one of the first pairs of its vocabulary, and returns the folder."""
    shutil.copytree(DATA / "clip-tokenizer", folder)
    version, *merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    tokens = list(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    # 512 bytes, then a token for each pair, then <|startoftext|> and <|endoftext|>
    tokens = tokens[: 512 + num_merges] + tokens[-2:] if num_merges < len(merges) else tokens
    vocabulary = json.dumps(dict(zip(tokens, range(len(tokens)), strict=True)), ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join([version, *merges[:num_merges], ""]), encoding="utf-8")
    return folder


def make_tokenizer(num_merges=NUM_MERGES):
    """CLIP's tokenizer, with 77 tokens a text."""
    with tempfile.TemporaryDirectory() as folder:
        folder = copy_tokenizer(Path(folder, "tokenizer"), num_merges)
        return CLIPTokenizerFast.from_pretrained(folder, model_max_length=77)


def make_text_encoder(tokenizer, width, *, seed=0):
    """A CLIP text tower of two layers whose output is (B, 77, width)."""
    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 2 * width}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    sizes |= {"max_position_embeddings": tokenizer.model_max_length}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(**sizes, **tokens)
    with seeded(seed):
        text_encoder = CLIPTextModel(config)
        # CLIP starts its embeddings so small that two random layers hardly tell captions apart.
        for module in text_encoder.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
    return text_encoder.eval()


def make_distinct_text_encoder(*, seed=0):
    """One for the prior with larger weights: captions that differ by a word have different embeddings."""
    text_encoder = make_text_encoder(make_tokenizer(ALL_MERGES), PRIOR_TEXT_WIDTH, seed=seed)
    with torch.no_grad():
        for name, module in text_encoder.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(4)
            elif name.endswith("token_embedding"):
                module.weight.mul_(2)
    return text_encoder


def shake_norms(model):
    """Small numbers in place of the zeros that GlobalResponseNorm starts with, as in a trained model."""
    for name, parameter in model.named_parameters():
        if name.endswith((".gamma", ".beta")):
            nn.init.normal_(parameter, std=0.02)


def make_prior(*, seed=0, **prior_kwargs):
    """A WuerstchenPrior of two blocks; `prior_kwargs` go to its constructor (`dropout=0.0`, `depth=3`, ...).

    A new prior divides by |1 - b|, which its random last layer brings near zero. With that layer scaled down
    it begins as the guess that all of the input is noise. With zeros no other layer would have a gradient.
    """
    config = dict(c_in=LATENT_CHANNELS, c=64, c_cond=PRIOR_TEXT_WIDTH, c_r=64, depth=2, nhead=4, dropout=0.1)
    with seeded(seed), torch.no_grad():
        prior = wuerstchen.WuerstchenPrior(**(config | prior_kwargs))
        shake_norms(prior)
        for parameter in prior.out[1].parameters():
            parameter.mul_(0.02)
    return prior.eval()


def read_images(folder, resolution):
    """Every image of a folder as one (N, 3, resolution, resolution) batch, as the encoder takes it."""
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix in (".jpg", ".png", ".webp"))
    image_transforms = make_image_transforms((resolution, resolution))
    images = [load_image({"path": str(path), "bytes": None}) for path in paths]
    return normalize_pixels(torch.stack([image_transforms(image) for image in images]))


def small_backbone(weights=None):
    """efficientnet_v2_s with a fraction of its layers and channels: of each kind one block or two."""
    blocks = [efficientnet.FusedMBConvConfig(ratio, 3, stride, *c, n) for ratio, stride, *c, n in FUSED]
    blocks += [efficientnet.MBConvConfig(ratio, 3, stride, *c, n) for ratio, stride, *c, n in SEPARABLE]
    return efficientnet.EfficientNet(blocks, dropout=0.2, last_channel=1280)


# Expansion, stride, channels before and after, number of blocks.
FUSED = [(1, 1, 24, 24, 1), (4, 2, 24, 24, 1), (4, 2, 24, 32, 1)]
SEPARABLE = [(4, 2, 32, 32, 2), (6, 2, 32, 48, 2)]
BACKBONES["small"] = small_backbone  # for processes that import this module, such as the tests' forks


@torch.no_grad()
def make_encoder(*, seed=0, resolution=64, effnet="efficientnet_v2_s"):
    """An EfficientNetEncoder with random weights whose latents of IMAGES are as the prior expects them:
    `(encoder(pixels) + 1) / 42` has mean 0 and deviation 1 in every channel."""
    with seeded(seed):
        encoder = EfficientNetEncoder(c_latent=LATENT_CHANNELS, effnet=effnet).eval()
    # Forty random layers in a row are chaotic: rounding the weights to bf16 moves the latents by as much as
    # another image does. With the residual branches turned down it moves them by a few percent.
    for module in encoder.modules():
        if isinstance(module, (efficientnet.MBConv, efficientnet.FusedMBConv)) and module.use_res_connect:
            module.block[-1][1].weight.fill_(0.1)
    pixels = read_images(IMAGES, resolution)

    # Untrained batch norms let the signal grow or die on its way. Those alone are in train mode: stochastic
    # depth would leave out layers, and the statistics would be those of another network.
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = None  # the plain average of all batches; there is one
    encoder(pixels)
    encoder.eval()

    # The last norm by what it is given in eval mode: train mode keeps the unbiased variance.
    conv, norm = encoder.mapper
    variance, mean = torch.var_mean(conv(encoder.backbone(pixels)), dim=(0, 2, 3), correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance - norm.eps)
    norm.weight.fill_(LATENT_MEAN)
    norm.bias.fill_(-LATENT_STD)
    return encoder


def save_published_encoder(encoder, path):
    """Writes `encoder` as the authors' training file `model_v2_stage_b.pt` has it, beside weights of another
    model."""
    other = {"embedding.1.weight": torch.zeros(8, 16, 1, 1), "embedding.1.bias": torch.zeros(8)}
    others = {"state_dict": other, "ema_state_dict": other, "iter": 1000}
    torch.save(others | {"effnet_state_dict": encoder.state_dict()}, path)


def new_decoder(latents_scale, **config):
    """A WuerstchenDiffNeXt with patches of 2 and four levels, as in the published decoder, initialized as
    PyTorch does. Its own initialization halves the last layer of every residual block once for each module of
    the model, which leaves zeros: nothing would depend on the latents. They are divided by `latents_scale`
    where they enter. Its last layer makes a, then the logit of b, and it guesses the noise as (x - a) / b."""
    config |= {"c_in": 4, "c_out": 4, "c_r": 16, "patch_size": 2, "nhead": [-1, 2, 2, 2]}
    config |= {"effnet_embd": LATENT_CHANNELS, "clip_embd": DECODER_TEXT_WIDTH}
    decoder = wuerstchen.WuerstchenDiffNeXt(**config)
    for name, module in decoder.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            module.reset_parameters()
        if name.startswith("effnet_mappers."):
            module.weight.div_(latents_scale)
    return decoder


def make_decoder(*, seed=0):
    """(WuerstchenDiffNeXt, PaellaVQModel) whose image depends on the latents, the prompt and the noise.

    The decoder's own latents' side must be a multiple of 16. Prior latents of side 3 (10.67 times that is 32)
    make 128 pixels; sides of 2 (21) and 4 (42) are not possible.
    """
    with seeded(seed), torch.no_grad():
        decoder = new_decoder(
            4,  # latents are some 42 large
            c_cond=DECODER_TEXT_WIDTH,
            c_hidden=[8, 8, 16, 16],
            blocks=[1, 1, 1, 1],
            level_config=["CT", "CTA", "CTA", "CTA"],
            inject_effnet=[False, True, True, True],
        )
        for name, module in decoder.named_modules():
            if name.endswith(".to_out.0"):
                module.weight.mul_(4)  # the prompt shows in 8 bits
        shake_norms(decoder)
        # With b near 1 and a small the guess is nearly x, which the sampler tolerates, and the rest depends
        # on conditions.
        last = decoder.clf[1]
        half = last.out_channels // 2
        nn.init.normal_(last.weight[:half], std=0.02)
        nn.init.zeros_(last.weight[half:])
        nn.init.zeros_(last.bias[:half])
        nn.init.constant_(last.bias[half:], 8.0)

        vqgan = wuerstchen.PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16)
        # Pixels are clipped to [0, 1]: with a deviation of some 0.2 about 0.5, few are.
        last = vqgan.out_block[0]
        last.bias.fill_(0.5)
        noise = vqgan.config.scale_factor * torch.randn(1, 4, 64, 64)
        last.weight.mul_(0.2 / vqgan.decode(noise).sample.std())
    return decoder.eval(), vqgan.eval()


def make_demo_decoder():
    """(WuerstchenDiffNeXt, PaellaVQModel) for the README's first command, untrained. Prompts have no effect:
    the first is zero in `clip_mapper`, which train_demo_decoder.py does not train."""
    with torch.no_grad():
        decoder = new_decoder(
            LATENT_MEAN,
            c_cond=32,
            c_hidden=[48, 64, 96, 96],
            blocks=[1, 2, 2, 1],
            level_config=["CT", "CT", "CTA", "CTA"],
            inject_effnet=[True, True, True, True],
            dropout=0.0,
        )
        decoder.clip_mapper.weight.zero_()
        last = decoder.clf[1]
        last.weight.mul_(0.02)
        last.bias.zero_()
        last.bias[last.out_channels // 2 :] = 4.0  # as in `make_decoder`, the first guess is nearly x
    vqgan = wuerstchen.PaellaVQModel(
        bottleneck_blocks=1, embed_dim=32, num_vq_embeddings=16, scale_factor=1.0
    )
    return decoder.eval(), vqgan.eval()


def load_demo_decoder():
    """The same, as train_demo_decoder.py has trained them. They are stored in half precision."""
    models = make_demo_decoder()
    for name, model in zip(("decoder", "vqgan"), models, strict=True):
        model.load_state_dict(load_file(DEMO_DECODER / f"{name}.safetensors"))
    return models


def make_tiny_models(
    folder,
    *,
    seed=0,
    resolution=64,
    text_encoder=None,
    decoder_and_vqgan=None,
    num_merges=NUM_MERGES,
    effnet="efficientnet_v2_s",
    **prior_kwargs,
):
    """Writes `prior`, `decoder` and `encoder` into `folder` and returns their three paths.

    The same `seed` makes the same files. The encoder is calibrated at `resolution`, `num_merges` is of the
    tokenizers, and `prior_kwargs` are those of `make_prior`.
    """
    paths = [Path(folder) / name for name in ("prior", "decoder", "encoder")]
    prior_folder, decoder_folder, encoder_folder = paths
    tokenizer = make_tokenizer(num_merges)

    wuerstchen.WuerstchenPriorPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder or make_text_encoder(tokenizer, PRIOR_TEXT_WIDTH, seed=seed),
        prior=make_prior(seed=seed + 1, **prior_kwargs),
        scheduler=DDPMWuerstchenScheduler(),
        latent_mean=LATENT_MEAN,
        latent_std=LATENT_STD,
    ).save_pretrained(prior_folder)

    decoder, vqgan = decoder_and_vqgan or make_decoder(seed=seed + 2)
    wuerstchen.WuerstchenDecoderPipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(tokenizer, DECODER_TEXT_WIDTH, seed=seed + 3),
        decoder=decoder,
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=vqgan,
    ).save_pretrained(decoder_folder)
    # What transformers 5 writes is not what older repos hold. The prior has the one, the decoder the other.
    shutil.rmtree(decoder_folder / "tokenizer")
    copy_tokenizer(decoder_folder / "tokenizer", num_merges)

    make_encoder(seed=seed + 4, resolution=resolution, effnet=effnet).save_pretrained(encoder_folder)
    return paths


def make_demo_models(folder):
    """The models of the README's first command. The decoder knows the latents of this seed's encoder only."""
    return make_tiny_models(
        folder,
        resolution=DEMO_RESOLUTION,
        text_encoder=make_distinct_text_encoder(),
        decoder_and_vqgan=load_demo_decoder(),
        num_merges=ALL_MERGES,
        dropout=0.0,
    )


if __name__ == "__main__":
    for path in make_demo_models(Path(sys.argv[1])):
        print(f"{path.name}: {path}")
