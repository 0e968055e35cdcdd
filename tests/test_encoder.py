# SPDX-License-Identifier: Apache-2.0
"""The image encoder: its shape, the places it is loaded from, and what loading must not do."""

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

PUBLISHED_FILE = "model_v2_stage_b.pt"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing here may reach for weights: torchvision's come by urllib, the Hub's through a socket."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"asks the network for {args}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def encoder(models):
    return EfficientNetEncoder.from_pretrained(models / "encoder").eval()


def published(encoder, path, **more):
    """A file of the authors' training: the encoder beside other weights."""
    torch.save({"state_dict": {"w": torch.zeros(8)}, "effnet_state_dict": encoder.state_dict(), **more}, path)
    return path


@torch.no_grad()
def latents(encoder, size=(64, 96)):
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    return encoder.eval()(pixels)


# torchvision's published counts, less the classifier's 1280 * 1000 + 1000, and the mapper's 1280 * 16 + 2 * 16.
@pytest.mark.parametrize(
    ("effnet", "parameters"),
    [("efficientnet_v2_s", 21_458_488 - 1_281_000 + 20_512), ("efficientnet_v2_l", 118_515_272 - 1_281_000 + 20_512)],
)
def test_names_and_shapes_are_those_of_the_checkpoint(effnet, parameters):
    with torch.device("meta"):
        encoder = EfficientNetEncoder(effnet=effnet)
        features = getattr(torchvision_models, effnet)(weights=None).features
    expected = {f"backbone.{name}": tuple(tensor.shape) for name, tensor in features.state_dict().items()}
    expected["mapper.0.weight"] = (16, 1280, 1, 1)
    expected |= {f"mapper.1.{name}": (16,) for name in ("weight", "bias", "running_mean", "running_var")}
    expected["mapper.1.num_batches_tracked"] = ()
    assert {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters


@pytest.mark.parametrize(("size", "side"), [((64, 64), (2, 2)), ((32, 96), (1, 3)), ((256, 128), (8, 4))])
def test_latents_are_32_times_smaller(encoder, size, side):
    assert latents(encoder, size).shape == (2, 16, *side)


def test_a_new_encoder_has_random_weights_and_downloads_none():
    torch.manual_seed(0)
    first, second = EfficientNetEncoder(c_latent=4), EfficientNetEncoder(c_latent=4)
    assert latents(first, (32, 32)).shape == (2, 4, 1, 1)
    assert not torch.equal(first.backbone[0][0].weight, second.backbone[0][0].weight)


def test_it_is_the_same_from_a_file_a_folder_of_the_file_and_a_saved_folder(encoder, models, tmp_path):
    expected = latents(encoder)
    assert expected.std() > 1
    file = published(encoder, tmp_path / PUBLISHED_FILE)
    renamed = published(encoder, tmp_path / "any name.ckpt")
    for place in (file, renamed, tmp_path, models / "encoder"):
        assert torch.equal(latents(EfficientNetEncoder.load(str(place))), expected), place


def test_what_is_saved_is_small_and_plain(encoder, tmp_path):
    EfficientNetEncoder.load(str(published(encoder, tmp_path / "stage_b.pt"))).save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["c_latent"], config["c_cond"], config["effnet"]) == (16, 1280, "efficientnet_v2_s")


class Payload:
    """Its unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_and_runs_none(encoder, tmp_path):
    file = published(encoder, tmp_path / "bad.pt", extra=Payload(tmp_path / "it ran"))
    with pytest.raises(pickle.UnpicklingError, match="eights_only"):
        EfficientNetEncoder.load(str(file))
    assert not (tmp_path / "it ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "it ran").exists(), "the file is not as dangerous as this test takes it to be"


def test_an_unknown_backbone_is_refused_by_name():
    with pytest.raises(ValueError, match="efficientnet_v2_s, efficientnet_v2_l, not 'resnet50'"):
        EfficientNetEncoder(effnet="resnet50")


def test_a_file_without_the_encoder_is_refused_by_the_name_of_what_is_missing(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(KeyError, match="effnet_state_dict"):
        EfficientNetEncoder.load(str(tmp_path / "other.pt"))


def test_weights_of_another_architecture_are_refused(encoder, tmp_path):
    weights = encoder.state_dict()
    del weights["mapper.0.weight"]
    torch.save({"effnet_state_dict": weights}, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match=r"mapper\.0\.weight"):
        EfficientNetEncoder.load(str(tmp_path / "other.pt"))


def in_new_process(code, *args, **env):
    """What a fresh Python prints at last, as JSON."""
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
EfficientNetEncoder()  # so that all that is loaded once is loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
EfficientNetEncoder.load(sys.argv[1])
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory as Linux tells it")
def test_loading_takes_the_encoders_memory_not_the_files(encoder, tmp_path):
    other = torch.zeros(1 << 28)  # 1 GiB; the published file has several
    file = published(encoder, tmp_path / PUBLISHED_FILE, ema_state_dict={"w": other}, opt_state={"w": other[1:]})
    del other
    assert file.stat().st_size > 1 << 30
    assert in_new_process(PEAK_WHILE_LOADING, file) < 400 << 20
    file.unlink()


LOAD_FROM_HUB = """
import torch
from modeling_efficient_net_encoder import EfficientNetEncoder
weights = torch.load(sys.argv[1])
cache = sys.argv[2]
result = {}
for name in sys.argv[3:]:
    loaded = EfficientNetEncoder.load(name, cache_dir=cache).state_dict()
    result[name] = loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in weights)
print(json.dumps(result))
"""


@pytest.mark.slow
def test_it_is_the_same_from_a_hub_repo_of_either_kind_and_nothing_else_is_fetched(encoder, models, tmp_path):
    (tmp_path / "authors").mkdir()
    published(encoder, tmp_path / "authors" / PUBLISHED_FILE)
    (tmp_path / "authors" / "model_v1_stage_c.pt").write_bytes(b"many gigabytes")
    weights, cache = tmp_path / "weights.pt", tmp_path / "cache"
    torch.save(encoder.state_dict(), weights)
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("authors/wuerstchen", tmp_path / "authors")
        hub.add_repo("user/encoder", models / "encoder")
        same = in_new_process(LOAD_FROM_HUB, weights, cache, "authors/wuerstchen", "user/encoder", **hub.env())
        fetched = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
        # What has been fetched is found again with the Hub out of reach.
        hub.requests.clear()
        offline = {**hub.env(), "HF_HUB_OFFLINE": "1"}
        again = in_new_process(LOAD_FROM_HUB, weights, cache, "authors/wuerstchen", "user/encoder", **offline)
        assert not hub.requests
    assert same == again == {"authors/wuerstchen": True, "user/encoder": True}
    assert not [path for path in fetched if "stage_c" in path]
    assert {path.rpartition("/")[2] for path in fetched} == {
        PUBLISHED_FILE,
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert cache.is_dir()
    assert not (tmp_path / "hub" / "client" / "hub").exists(), "cache_dir is where downloads go"


def test_the_file_is_what_torch_saves_today(encoder, tmp_path):
    # Only such files, which are zip archives with the tensors as they lie in memory, can be mapped.
    with zipfile.ZipFile(published(encoder, tmp_path / PUBLISHED_FILE)) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
