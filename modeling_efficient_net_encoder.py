# SPDX-License-Identifier: Apache-2.0
"""Würstchen's image encoder: an EfficientNetV2 whose features are mapped to 16 normalized channels.

The published weights are one entry, `effnet_state_dict`, of the multi-gigabyte training file
`model_v2_stage_b.pt` in the Hub repo dome272/wuerstchen. `EfficientNetEncoder.load` reads them from there.
`save_pretrained` writes only the 80 MB that are needed, for `load` or `from_pretrained`.
"""

from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from torchvision import models

BACKBONES = {"efficientnet_v2_s": models.efficientnet_v2_s, "efficientnet_v2_l": models.efficientnet_v2_l}
PUBLISHED_FILE = "model_v2_stage_b.pt"
PUBLISHED_KEY = "effnet_state_dict"
STRIDE = 32  # input pixels per latent, in each direction


class EfficientNetEncoder(ModelMixin, ConfigMixin):
    """Maps images to the latents that the prior is trained on, 32 times smaller in each direction.

    Args:
        c_latent: channels of the latents.
        c_cond: channels of the backbone's last feature map (1280 for both backbones).
        effnet: `"efficientnet_v2_s"` or `"efficientnet_v2_l"`. Nothing is downloaded; the weights are random.

    Raises:
        ValueError: if `effnet` is neither of the two.
    """

    @register_to_config
    def __init__(self, c_latent: int = 16, c_cond: int = 1280, effnet: str = "efficientnet_v2_s"):
        super().__init__()
        if effnet not in BACKBONES:
            raise ValueError(f"effnet must be one of {', '.join(BACKBONES)}, not {effnet!r}")
        self.backbone = BACKBONES[effnet](weights=None).features
        self.mapper = nn.Sequential(
            nn.Conv2d(c_cond, c_latent, kernel_size=1, bias=False), nn.BatchNorm2d(c_latent)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encodes (B, 3, H, W) RGB, normalized by ImageNet's mean and deviation, to (B, c_latent, H/32,
        W/32)."""
        return self.mapper(self.backbone(pixels))

    @classmethod
    def load(cls, name_or_path: str, cache_dir: str | None = None) -> "EfficientNetEncoder":
        """Loads the encoder from any of the places where it is kept: the original authors' training file, or
        a folder or Hub repo that holds either `model_v2_stage_b.pt` or the files written by
        `save_pretrained`."""
        path = Path(name_or_path)
        if path.is_file():
            return cls.from_published(path)
        if (path / PUBLISHED_FILE).is_file():
            return cls.from_published(path / PUBLISHED_FILE)
        if not path.is_dir():
            try:
                return cls.from_published(hf_hub_download(name_or_path, PUBLISHED_FILE, cache_dir=cache_dir))
            except EntryNotFoundError:
                pass  # a repo written by `save_pretrained`
        return cls.from_pretrained(name_or_path, cache_dir=cache_dir)

    @classmethod
    def from_published(cls, file: str | Path, **config) -> "EfficientNetEncoder":
        """Loads the encoder from the original authors' training file; `config` is passed to the constructor.

        The file is memory-mapped, so only the encoder's own tensors are read. It is unpickled with
        `weights_only=True`, which cannot run code.

        Raises:
            KeyError: if the file has no `effnet_state_dict`.
            RuntimeError: if its tensors do not match the architecture given by `config`.
        """
        state_dict = torch.load(file, map_location="cpu", mmap=True, weights_only=True)[PUBLISHED_KEY]
        encoder = cls(**config)
        encoder.load_state_dict(state_dict)
        return encoder
