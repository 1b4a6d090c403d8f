"""The published DINO: from the cache without a network, else from the hub, else a sentence."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

from est_lora.discrepancy import open_extractor
from est_lora.errors import EstLoraError
from tests.extractors import REVISION, look, picture

pytestmark = pytest.mark.usefixtures("no_network", "no_pickles")


@pytest.fixture
def cache(made, tmp_path):
    """A Hugging Face cache with the published DINO, or rather what stands in for it."""
    folder = tmp_path / "cache" / "models--facebook--dino-vits16"
    shutil.copytree(made["dino"][0], folder / "snapshots" / REVISION)
    return tmp_path / "cache"


def test_what_is_in_the_cache_needs_no_network(made, cache, no_network):
    with open_extractor("dino", folder=None, cache=cache) as extractor:
        assert (extractor.name, extractor.identity) == ("dino", "dino@a7a4d161")
        features = extractor.features([picture(1)])
    assert torch.equal(features, look("dino", made["dino"][0], picture(1)))
    assert no_network == []


def test_the_users_own_cache(made, cache, monkeypatch, no_network):
    import huggingface_hub.file_download

    for hub in (huggingface_hub.constants, huggingface_hub.file_download):
        for constant in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.setattr(hub, constant, str(cache), raising=False)
    with open_extractor("dino", folder=None, cache=None) as extractor:
        assert len(extractor.features([picture(1)])) == 1
    assert no_network == []


def test_a_cached_file_that_is_damaged_is_named(cache):
    blob = cache / "blob"
    blob.write_bytes(b"{}")
    link = next(cache.rglob("model.safetensors"))
    link.unlink()
    link.symlink_to(blob)
    with pytest.raises(EstLoraError, match="cache/blob' isn't a whole safetensors file, delete it"):
        open_extractor("dino", folder=None, cache=cache).__enter__()


@pytest.fixture
def hub(made, monkeypatch):
    """A hub that has the files, or fails as it is told to; what it was asked for."""
    import huggingface_hub

    class Hub(list):
        failure = None

        def download(self, *, repo_id, filename, revision, cache_dir):
            assert (repo_id, revision) == ("facebook/dino-vits16", REVISION)
            self.append((filename, cache_dir))
            if self.failure:
                raise self.failure
            return str(made["dino"][0] / filename)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    return hub


def test_what_is_not_in_the_cache_is_fetched(made, hub, tmp_path):
    with open_extractor("dino", folder=None, cache=tmp_path) as extractor:
        features = extractor.features([picture(1)])
    assert torch.equal(features, look("dino", made["dino"][0], picture(1)))
    assert hub == [(file, tmp_path) for file in ("config.json", "preprocessor_config.json", "model.safetensors")]


def test_only_what_is_not_in_the_cache_is_fetched(cache, hub):
    next(cache.rglob("model.safetensors")).unlink()
    with open_extractor("dino", folder=None, cache=cache):
        assert hub == [("model.safetensors", cache)]


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("[Errno -2] Name or service not known"),
        OSError(28, "No space left on device"),
        ValueError("401 Client Error. Access is restricted"),
        RuntimeError("Data error\nmore of it"),
    ],
)
def test_what_cannot_be_fetched(hub, failure, tmp_path):
    hub.failure = failure
    with pytest.raises(EstLoraError) as raised:
        open_extractor("dino", folder=None, cache=tmp_path).__enter__()
    why = str(failure).partition("\n")[0].partition(". ")[0]
    told = f"The DINO weights can't be fetched ({why}): connect once, or name a folder that has them."
    assert str(raised.value) == told


def test_without_the_hubs_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EstLoraError, match="^The extractor 'dino' needs huggingface-hub, which can't be imported"):
        open_extractor("dino", folder=None, cache=tmp_path).__enter__()


def test_offline(tmp_path, monkeypatch):
    """The real library, told by its own switch that there is no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        EstLoraError, match=r"^The DINO weights can't be fetched \(.*\): connect once, or name a folder"
    ):
        open_extractor("dino", folder=None, cache=tmp_path).__enter__()


def test_without_a_network_nothing_is_waited_for(tmp_path, monkeypatch, no_network):
    """The real library, which would try again for half a minute."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is tried again"))
    with pytest.raises(EstLoraError, match="be fetched .*Name or service not known.*: connect once"):
        open_extractor("dino", folder=None, cache=tmp_path).__enter__()
    assert len(no_network) == 1
