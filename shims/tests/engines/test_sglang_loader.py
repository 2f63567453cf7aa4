"""SGLang's load format for loaders of others, on SGLang's own loader: the engine needs a GPU, its loader does not."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvstore import Invalid, sglang_loader, vllm_loader
from kvstore.snapshots import Store
from kvstore.weights import InvalidWeights

import models

pytest.importorskip("sglang.srt.model_loader.loader")


@pytest.fixture
def saved(tmp_path, folder, monkeypatch):
    """A store with a model in it."""
    (tmp_path / "store").mkdir()
    model = models.make(folder, "llama")
    url = f"file://{tmp_path}/store"
    Store(url).save(model, name="llama")
    monkeypatch.setenv("KVSTORE_SNAPSHOTS", url)
    monkeypatch.setattr(vllm_loader, "_held", {})
    # SGLang's loader asks the server, which is not there: no checksums, and its defaults.
    monkeypatch.setattr("sglang.srt.model_loader.loader.get_server_args", lambda: None)
    defaults = dict(disable_mmap=False, prefetch_checkpoints=False, prefetch_num_threads=4, drop_cache_after_load=False)
    settings = SimpleNamespace(**{f"weight_loader_{name}": value for name, value in defaults.items()})
    monkeypatch.setattr("sglang.srt.model_loader.loader.get_model", lambda: settings)
    sglang_loader.register()
    yield model
    del sys.modules[sglang_loader._MODULE]


def loader(**extra):
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import get_model_loader

    return get_model_loader(LoadConfig(load_format="private", model_loader_extra_config=extra))


def weights_of(made, model) -> dict:
    source = made.Source(str(model), None, fall_back_to_pt=True)
    return dict(made._get_weights_iterator(source))


@pytest.mark.parametrize("cached", [False, True])
def test_weights_come_from_the_snapshot(saved, tmp_path, folder, cached):
    """The folder's own are others."""
    import safetensors.torch
    import torch

    extra = dict(cache=str(tmp_path / "cache"), cache_bytes="1GiB") if cached else {}
    found = weights_of(loader(snapshot="llama", **extra), models.make(folder, "llama", seed=8))
    wanted = safetensors.torch.load_file(saved / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_is_missing_is_named(saved):
    with pytest.raises(Invalid, match="name a snapshot"):
        loader()
    with pytest.raises(ValueError, match="odd"):
        loader(snapshot="llama", odd=1)


def test_a_draft_model_is_refused(saved, monkeypatch):
    from sglang.srt import runtime_context

    monkeypatch.setattr(runtime_context, "get_server_args", lambda: SimpleNamespace(model_path=str(saved)))
    weights_of(loader(snapshot="llama"), saved)
    with pytest.raises(Invalid, match="draft model '/models/draft'"):
        weights_of(loader(snapshot="llama"), "/models/draft")


def test_pages_are_named_by_the_snapshot(saved, monkeypatch):
    """Blocks were once named by the folder, whose weights were not loaded."""
    from sglang.srt import runtime_context

    sglang = pytest.importorskip("kvstore.sglang")
    args = SimpleNamespace(model_path=str(saved), load_format="private", model_loader_extra_config='{"snapshot": "llama"}')
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: args)
    with pytest.raises(InvalidWeights, match="'llama'.*by its id"):
        sglang._served_model(SimpleNamespace(model_name="m"))
    weights_of(loader(snapshot="llama"), saved)
    id = Store().inspect("llama")[0].id
    assert id.encode() in sglang._served_model(SimpleNamespace(model_name="m"))[3]


def test_the_plugin_is_found_by_sglang():
    """By its entry point, as in a user's environment. Nobody else's module is taken away."""
    program = (
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "import importlib\n"
        "print(importlib.import_module('sglang.private.private_model_loader').PrivateModelLoader.__module__)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1:] == ["kvstore.sglang_loader"], done.stderr[-2000:]
