# SPDX-License-Identifier: Apache-2.0
"""The image encoder: its architecture, the places it is loaded from, and what loading must not do."""

import json
import os
import pickle
import socket
import sys

import pytest
import torch
from conftest import SCRIPT, run_command, same_weights
from hub_server import HubServer
from tiny_models import save_published_encoder
from torchvision import models as torchvision_models

from modeling_efficient_net_encoder import EfficientNetEncoder

PUBLISHED_FILE = "model_v2_stage_b.pt"  # in the Hub repo dome272/wuerstchen
SAVED_FILES = {"config.json", "diffusion_pytorch_model.safetensors"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)  # nothing here may download weights


@pytest.fixture(scope="module")
def encoder(full_encoder):
    return EfficientNetEncoder.from_pretrained(full_encoder).eval()


@torch.no_grad()
def encode_noise(encoder, size=(64, 96)):
    return encoder.eval()(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)))


# torchvision's published numbers of parameters, without the classifier's 1280 * 1000 + 1000, and with the
# mapper's 1280 * 16 + 2 * 16.
@pytest.mark.parametrize(("effnet", "published"), [("s", 21_458_488), ("l", 118_515_272)])
def test_parameter_names_and_shapes_are_those_of_the_published_weights(effnet, published):
    with torch.device("meta"):
        encoder = EfficientNetEncoder(effnet=f"efficientnet_v2_{effnet}")
        features = getattr(torchvision_models, f"efficientnet_v2_{effnet}")(weights=None).features
    expected = {f"backbone.{name}": tuple(tensor.shape) for name, tensor in features.state_dict().items()}
    expected["mapper.0.weight"] = (16, 1280, 1, 1)
    expected |= {f"mapper.1.{name}": (16,) for name in ("weight", "bias", "running_mean", "running_var")}
    expected["mapper.1.num_batches_tracked"] = ()
    assert {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()} == expected
    assert sum(p.numel() for p in encoder.parameters()) == published - 1_281_000 + 20_512


def test_latents_are_32_times_smaller_than_the_image(encoder):
    for size, side in (((64, 64), (2, 2)), ((32, 96), (1, 3)), ((256, 128), (8, 4))):
        assert encode_noise(encoder, size).shape == (2, 16, *side)


def test_new_encoder_has_random_weights_and_downloads_none():
    first, second = (encode_noise(EfficientNetEncoder(c_latent=4), (32, 32)) for _ in range(2))
    assert first.shape == (2, 4, 1, 1) and not torch.equal(first, second)


def test_training_file_its_folder_and_a_saved_folder_load_the_same_encoder(encoder, tmp_path):
    expected = encode_noise(encoder)
    assert expected.std() > 1
    file, renamed = tmp_path / PUBLISHED_FILE, tmp_path / "any name.ckpt"
    for path in (file, renamed):
        save_published_encoder(encoder, path)
    EfficientNetEncoder.load(str(file)).save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == SAVED_FILES
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["c_latent"], config["c_cond"], config["effnet"]) == (16, 1280, "efficientnet_v2_s")
    for source in (file, renamed, tmp_path, tmp_path / "saved"):
        assert torch.equal(encode_noise(EfficientNetEncoder.load(str(source))), expected), source


class Payload(str):
    def __reduce__(self):  # the folder of this name is made when it is unpickled
        return os.mkdir, (str(self),)


def test_training_file_with_code_in_it_is_refused_and_the_code_not_run(encoder, tmp_path):
    ran = tmp_path / "it ran"
    file = tmp_path / "bad.pt"
    torch.save({"effnet_state_dict": encoder.state_dict(), "extra": Payload(ran)}, file)
    with pytest.raises(pickle.UnpicklingError, match="eights_only"):
        EfficientNetEncoder.load(str(file))
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists(), "the file runs no code"


def test_what_does_not_fit_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"efficientnet_v2_s, efficientnet_v2_l.*, not 'resnet50'"):
        EfficientNetEncoder(effnet="resnet50")
    other = tmp_path / "other.pt"
    for content, error, name in (
        ({}, KeyError, "effnet_state_dict"),
        ({"effnet_state_dict": {}}, RuntimeError, "mapper.0.weight"),
    ):
        torch.save(content, other)
        with pytest.raises(error, match=name):
            EfficientNetEncoder.load(str(other))


LOAD = """
import resource, sys, torch
from modeling_efficient_net_encoder import EfficientNetEncoder
cache, *names = sys.argv[1:]
EfficientNetEncoder()  # so that everything that is loaded once is loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = {name: EfficientNetEncoder.load(name, cache).state_dict() for name in names}
torch.save([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, loaded], cache + ".pt")
"""


def load_in_new_process(cache, *names, env=None):
    """What `load` returns for each name, {name: weights}, and by how many KiB (on Linux) the process grew."""
    env = {"PYTHONPATH": SCRIPT.parent} | (env or {})
    done = run_command([sys.executable, "-c", LOAD, cache, *names], env=env)
    assert done.returncode == 0, done.stdout
    return torch.load(f"{cache}.pt")


@pytest.mark.slow
def test_loading_needs_the_memory_of_the_encoder_not_of_the_whole_file(encoder, tmp_path):
    file, state = tmp_path / PUBLISHED_FILE, encoder.state_dict()
    # 1 GiB; the published file has several.
    torch.save({"effnet_state_dict": state, "opt_state": torch.zeros(1 << 28)}, file)
    assert file.stat().st_size > 1 << 30
    assert load_in_new_process(tmp_path / "cache", file)[0] < 400 << 10
    file.unlink()


@pytest.mark.slow
def test_hub_repos_of_both_kinds_load_and_nothing_else_is_downloaded(encoder, full_encoder, tmp_path):
    authors = tmp_path / "authors"
    authors.mkdir()
    save_published_encoder(encoder, authors / PUBLISHED_FILE)
    (authors / "model_v1_stage_c.pt").write_bytes(b"many gigabytes")
    repos = {"authors/wuerstchen": authors, "user/encoder": full_encoder}
    with HubServer(tmp_path / "hub") as hub:
        for name, folder in repos.items():
            hub.add_repo(name, folder)
        for offline in ({}, {"HF_HUB_OFFLINE": "1"}):  # downloaded files are found without a connection
            hub.requests.clear()
            _, loaded = load_in_new_process(tmp_path / "cache", *repos, env=hub.env() | offline)
            assert all(same_weights(loaded[name], encoder.state_dict()) for name in repos)
            gets = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
            expected = set() if offline else {PUBLISHED_FILE, *SAVED_FILES}
            assert {path.rpartition("/")[2] for path in gets} == expected
    assert not hub.requests and (tmp_path / "cache").is_dir()
    assert not (tmp_path / "hub" / "client" / "hub").exists(), "downloads belong in cache_dir"
