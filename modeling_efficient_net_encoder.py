# SPDX-License-Identifier: Apache-2.0
"""The image encoder of Würstchen, an EfficientNetV2 whose features are mapped to 16 normalised channels, and how a
picture becomes its input.

The published weights are one entry, `effnet_state_dict`, of the multi-gigabyte training file `model_v2_stage_b.pt`
in the Hub repo dome272/wuerstchen. `EfficientNetEncoder.load` takes it from there; `save_pretrained` keeps the 80 MB
that matter, for `load` or `from_pretrained`.
"""

from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

BACKBONES = {"efficientnet_v2_s": models.efficientnet_v2_s, "efficientnet_v2_l": models.efficientnet_v2_l}
# What torchvision's EfficientNet weights were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRIP = 8  # a picture longer than this times its width is cut to it before it is resized
PUBLISHED_FILE = "model_v2_stage_b.pt"
PUBLISHED_KEY = "effnet_state_dict"


class EfficientNetEncoder(ModelMixin, ConfigMixin):
    """Maps pictures to the latents that the prior is trained on, 32 times smaller in each direction.

    Args:
        c_latent: channels of the latents.
        c_cond: channels of the backbone's last feature map (1280 for both backbones).
        effnet: `"efficientnet_v2_s"` or `"efficientnet_v2_l"`. Nothing is downloaded: the weights start out random.

    Raises:
        ValueError: if `effnet` is neither of the two.
    """

    @register_to_config
    def __init__(self, c_latent: int = 16, c_cond: int = 1280, effnet: str = "efficientnet_v2_s"):
        super().__init__()
        if effnet not in BACKBONES:
            raise ValueError(f"effnet must be one of {', '.join(BACKBONES)}, not {effnet!r}")
        self.backbone = BACKBONES[effnet](weights=None).features
        self.mapper = nn.Sequential(nn.Conv2d(c_cond, c_latent, kernel_size=1, bias=False), nn.BatchNorm2d(c_latent))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float, RGB normalised by ImageNet's mean and deviation, to (B, c_latent, H/32, W/32)."""
        return self.mapper(self.backbone(pixels))

    @classmethod
    def load(cls, name_or_path: str, cache_dir: str | None = None) -> "EfficientNetEncoder":
        """The encoder from wherever it may be: a training file of the original authors, or a folder or Hub repo that
        holds either `model_v2_stage_b.pt` or what `save_pretrained` wrote."""
        path = Path(name_or_path)
        if path.is_file():
            return cls.from_published(path)
        if (path / PUBLISHED_FILE).is_file():
            return cls.from_published(path / PUBLISHED_FILE)
        if not path.is_dir():
            try:
                return cls.from_published(hf_hub_download(name_or_path, PUBLISHED_FILE, cache_dir=cache_dir))
            except EntryNotFoundError:
                pass
        return cls.from_pretrained(name_or_path, cache_dir=cache_dir)

    @classmethod
    def from_published(cls, file: str | Path, **config) -> "EfficientNetEncoder":
        """The encoder in a training file of the original authors; `config` goes to the constructor.

        The file is mapped, not read: only the encoder's own tensors ever reach memory. It is unpickled with
        `weights_only=True`, which cannot run code.

        Raises:
            KeyError: if the file has no `effnet_state_dict`.
            RuntimeError: if its tensors do not fit the architecture that `config` names.
        """
        state_dict = torch.load(file, map_location="cpu", mmap=True, weights_only=True)[PUBLISHED_KEY]
        encoder = cls(**config)
        encoder.load_state_dict(state_dict)
        return encoder


def decode_picture(value: dict) -> Image.Image:
    """The picture of a data set's row, {"bytes", "path"}, upright, as 8-bit RGB.

    16-bit greys are scaled, and what is transparent is laid on white.

    Raises:
        ValueError: with the file's name, whatever is wrong with it.
    """
    try:
        image = datasets.Image().decode_example(value)  # turns it as its EXIF says
        if image.mode.startswith("I"):  # 16-bit greyscale, which convert() would clip to white
            grey, clear = np.asarray(image), image.info.get("transparency")
            image = Image.fromarray((grey.clip(0, 65535) / 257).round().astype(np.uint8))
            if clear is not None:
                image.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:
        file = (value or {}).get("path") or "no file name"
        raise ValueError(f"the picture ({file}) cannot be read: {type(error).__name__}: {error}") from error


def center_square(image: Image.Image, resolution: int) -> Image.Image:
    """Resizes the short side to `resolution` pixels (bilinear, antialiased) and crops the centre."""
    width, height = image.size
    longest = STRIP * min(width, height)
    if max(width, height) > longest:  # a banner of 60000 x 1 would be resized to 30 million x 512
        image = transforms.center_crop(image, (min(height, longest), min(width, longest)))
    image = transforms.resize(image, resolution, interpolation=InterpolationMode.BILINEAR, antialias=True)
    return transforms.center_crop(image, resolution)


def normalize_pixels(image: Image.Image) -> torch.Tensor:
    """A picture as the encoder takes it: (3, H, W) float32, normalised by ImageNet's mean and deviation."""
    return transforms.normalize(transforms.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)
