# SPDX-License-Identifier: Apache-2.0
"""The image encoder: its architecture, the places it is loaded from, and what loading must not do."""

import json
import os
import pickle
import socket
import subprocess
import sys
import urllib.request
import zipfile

import pytest
import torch
from conftest import TESTS
from hub_server import HubServer
from torchvision import models as torchvision_models

from modeling_efficient_net_encoder import EfficientNetEncoder

PUBLISHED_FILE = "model_v2_stage_b.pt"  # in the Hub repo dome272/wuerstchen


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may download weights: torchvision's come through urllib, the Hub's through a socket."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"asks the network for {args}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def encoder(models):
    return EfficientNetEncoder.from_pretrained(models / "encoder").eval()


def save_training_file(encoder, path, **more):
    """A file like that of the original training: the encoder's weights beside those of other models."""
    content = {"state_dict": {"w": torch.zeros(8)}, "effnet_state_dict": encoder.state_dict(), **more}
    torch.save(content, path)
    return path


@torch.no_grad()
def encode_noise(encoder, size=(64, 96)):
    """The latents of two images of seeded noise."""
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    return encoder.eval()(pixels)


# torchvision's published numbers of parameters, without the classifier's 1280 * 1000 + 1000, and with the
# mapper's 1280 * 16 + 2 * 16.
@pytest.mark.parametrize(
    ("effnet", "num_parameters"),
    [
        ("efficientnet_v2_s", 21_458_488 - 1_281_000 + 20_512),
        ("efficientnet_v2_l", 118_515_272 - 1_281_000 + 20_512),
    ],
)
def test_parameter_names_and_shapes_are_those_of_the_published_weights(effnet, num_parameters):
    with torch.device("meta"):
        encoder = EfficientNetEncoder(effnet=effnet)
        features = getattr(torchvision_models, effnet)(weights=None).features
    expected = {f"backbone.{name}": tuple(tensor.shape) for name, tensor in features.state_dict().items()}
    expected["mapper.0.weight"] = (16, 1280, 1, 1)
    expected |= {f"mapper.1.{name}": (16,) for name in ("weight", "bias", "running_mean", "running_var")}
    expected["mapper.1.num_batches_tracked"] = ()
    assert {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in encoder.parameters()) == num_parameters


@pytest.mark.parametrize(("size", "side"), [((64, 64), (2, 2)), ((32, 96), (1, 3)), ((256, 128), (8, 4))])
def test_latents_are_32_times_smaller_than_the_image(encoder, size, side):
    assert encode_noise(encoder, size).shape == (2, 16, *side)


def test_new_encoder_has_random_weights_and_downloads_none():
    torch.manual_seed(0)
    first, second = EfficientNetEncoder(c_latent=4), EfficientNetEncoder(c_latent=4)
    assert encode_noise(first, (32, 32)).shape == (2, 4, 1, 1)
    assert not torch.equal(first.backbone[0][0].weight, second.backbone[0][0].weight)


def test_training_file_its_folder_and_a_saved_folder_load_the_same_encoder(encoder, models, tmp_path):
    expected = encode_noise(encoder)
    assert expected.std() > 1
    file = save_training_file(encoder, tmp_path / PUBLISHED_FILE)
    renamed = save_training_file(encoder, tmp_path / "any name.ckpt")
    for source in (file, renamed, tmp_path, models / "encoder"):
        assert torch.equal(encode_noise(EfficientNetEncoder.load(str(source))), expected), source


def test_save_pretrained_writes_only_the_config_and_safetensors(encoder, tmp_path):
    file = save_training_file(encoder, tmp_path / "stage_b.pt")
    EfficientNetEncoder.load(str(file)).save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["c_latent"], config["c_cond"], config["effnet"]) == (16, 1280, "efficientnet_v2_s")


class Payload:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_training_file_with_code_in_it_is_refused_and_the_code_not_run(encoder, tmp_path):
    file = save_training_file(encoder, tmp_path / "bad.pt", extra=Payload(tmp_path / "it ran"))
    with pytest.raises(pickle.UnpicklingError, match="eights_only"):
        EfficientNetEncoder.load(str(file))
    assert not (tmp_path / "it ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "it ran").exists(), "the file does not run code, so this test shows nothing"


def test_unknown_backbone_is_refused_with_the_known_ones_listed():
    with pytest.raises(ValueError, match="efficientnet_v2_s, efficientnet_v2_l, not 'resnet50'"):
        EfficientNetEncoder(effnet="resnet50")


def test_training_file_without_the_encoder_is_refused_with_the_missing_key(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(KeyError, match="effnet_state_dict"):
        EfficientNetEncoder.load(str(tmp_path / "other.pt"))


def test_weights_of_another_architecture_are_refused(encoder, tmp_path):
    weights = encoder.state_dict()
    del weights["mapper.0.weight"]
    torch.save({"effnet_state_dict": weights}, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match=r"mapper\.0\.weight"):
        EfficientNetEncoder.load(str(tmp_path / "other.pt"))


def run_in_new_process(code, *args, **env):
    """Runs code in a new Python process. Returns the last line of its output, parsed as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}", *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PEAK_WHILE_LOADING = """
import resource
from modeling_efficient_net_encoder import EfficientNetEncoder
EfficientNetEncoder()  # so that everything that is loaded once is loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
EfficientNetEncoder.load(sys.argv[1])
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.slow
def test_loading_needs_the_memory_of_the_encoder_not_of_the_whole_file(encoder, tmp_path):
    other = torch.zeros(1 << 28)  # 1 GiB; the published file has several
    more = {"ema_state_dict": {"w": other}, "opt_state": {"w": other[1:]}}
    file = save_training_file(encoder, tmp_path / PUBLISHED_FILE, **more)
    del other, more
    assert file.stat().st_size > 1 << 30
    assert run_in_new_process(PEAK_WHILE_LOADING, file) < 400 << 20
    file.unlink()


LOAD_FROM_HUB = """
import torch
from modeling_efficient_net_encoder import EfficientNetEncoder
weights = torch.load(sys.argv[1])
cache = sys.argv[2]
result = {}
for name in sys.argv[3:]:
    loaded = EfficientNetEncoder.load(name, cache_dir=cache).state_dict()
    same = loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in weights)
    result[name] = same
print(json.dumps(result))
"""


@pytest.mark.slow
def test_hub_repos_of_both_kinds_load_the_same_encoder_and_nothing_else_is_downloaded(
    encoder, models, tmp_path
):
    (tmp_path / "authors").mkdir()
    save_training_file(encoder, tmp_path / "authors" / PUBLISHED_FILE)
    (tmp_path / "authors" / "model_v1_stage_c.pt").write_bytes(b"many gigabytes")
    weights, cache = tmp_path / "weights.pt", tmp_path / "cache"
    torch.save(encoder.state_dict(), weights)
    repos = ("authors/wuerstchen", "user/encoder")
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("authors/wuerstchen", tmp_path / "authors")
        hub.add_repo("user/encoder", models / "encoder")
        same = run_in_new_process(LOAD_FROM_HUB, weights, cache, *repos, **hub.env())
        downloads = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
        # Downloaded files are found again without a connection to the Hub.
        hub.requests.clear()
        offline = {**hub.env(), "HF_HUB_OFFLINE": "1"}
        same_offline = run_in_new_process(LOAD_FROM_HUB, weights, cache, *repos, **offline)
        assert not hub.requests
    assert same == same_offline == {"authors/wuerstchen": True, "user/encoder": True}
    assert not [path for path in downloads if "stage_c" in path]
    assert {path.rpartition("/")[2] for path in downloads} == {
        PUBLISHED_FILE,
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert cache.is_dir()
    assert not (tmp_path / "hub" / "client" / "hub").exists(), "downloads belong in cache_dir"


def test_torch_save_writes_uncompressed_archives(encoder, tmp_path):
    # Only such files, zip archives with the tensors as they lie in memory, can be memory-mapped.
    with zipfile.ZipFile(save_training_file(encoder, tmp_path / PUBLISHED_FILE)) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
