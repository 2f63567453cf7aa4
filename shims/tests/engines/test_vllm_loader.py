"""The load format `kvstore`, on the real engine: its tokens are those of the engine that loads the folder itself."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvstore import Invalid, vllm_loader
from kvstore.snapshots import Cache, Store
from kvstore.weights import InvalidWeights

import models
from engine import ENVIRONMENT

# The plugin is found by its entry point, as in a user's environment: nothing here imports it.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    arguments = json.loads(sys.argv[1])
    llm = LLM(max_model_len=256, enforce_eager=True, dtype="float32", skip_tokenizer_init=True, **arguments)
    prompt = {"prompt_token_ids": list(range(3, 40))}
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8, detokenize=False), use_tqdm=False)
    config = llm.llm_engine.vllm_config
    print(json.dumps([output.outputs[0].token_ids, config.model_config.served_model_name, config.load_config.load_format]))

# The engine's processes import this file again.
if __name__ == "__main__":
    main()
"""


def generate(folder: pathlib.Path, environment: dict | None = None, **arguments) -> list:
    script = folder / "engine.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), json.dumps(arguments)]
    everything = {**os.environ, **ENVIRONMENT, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=everything, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    # The engine's own processes may say something, too.
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, folder):
    """A store with a Llama in it."""
    at = tmp_path_factory.mktemp("loader")
    (at / "store").mkdir()
    model = models.make(folder, "llama")
    Store(f"file://{at}/store").save(model, name="llama")
    return at, model


@pytest.fixture(scope="module")
def place(saved):
    """The same, and the tokens that it says."""
    at, model = saved
    return at, model, generate(at, model=str(model))[0]


def test_a_model_by_the_name_of_a_snapshot(place):
    at, _, wanted = place
    cache = dict(KVSTORE_SNAPSHOT_CACHE=str(at / "cache"), KVSTORE_SNAPSHOT_CACHE_BYTES="1GiB")
    environment = dict(KVSTORE_SNAPSHOTS=f"file://{at}/store", **cache)
    found = generate(at, environment, model="kvstore://llama", load_format="kvstore")
    assert found == [wanted, "kvstore://llama", "kvstore"]
    (cached,) = Cache(at / "cache", 1).ls()
    assert cached.is_whole and not cached.is_used, "the engine has ended"


@pytest.mark.parametrize("processes", ["1", "0"])
def test_without_a_cache_and_in_processes_of_its_own(place, processes):
    at, _, wanted = place
    environment = dict(KVSTORE_SNAPSHOTS=f"file://{at}/store", VLLM_ENABLE_V1_MULTIPROCESSING=processes)
    assert generate(at, environment, model="kvstore://llama", load_format="kvstore")[0] == wanted


def test_a_folder_whose_weights_come_from_a_snapshot(place, tmp_path):
    """The folder's own weights are others, or are not there."""
    at, model, wanted = place
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    extra = dict(snapshot="llama", store=f"file://{at}/store", cache=str(tmp_path / "cache"), cache_bytes="1GiB")
    found = generate(at, model=str(tmp_path), load_format="kvstore", model_loader_extra_config=extra)
    assert found[0] == wanted


def test_what_is_not_there_is_named(place):
    at, _, _ = place
    with pytest.raises(AssertionError, match='no snapshot \\\\?"other'):
        generate(at, dict(KVSTORE_SNAPSHOTS=f"file://{at}/store"), model="kvstore://other", load_format="kvstore")


def named(model: pathlib.Path, **extra) -> bytes:
    layout = pytest.importorskip("kvstore.vllm.layout")
    hf_config = SimpleNamespace(to_json_string=lambda: "{}")
    config = SimpleNamespace(model=str(model), revision=None, quantization=None, hf_overrides={}, hf_config=hf_config)
    load = SimpleNamespace(load_format="kvstore", model_loader_extra_config=extra, download_dir=None)
    told = SimpleNamespace(model_config=config, load_config=load, speculative_config=None)
    return layout.weights_digest(told, SimpleNamespace(weights_version=""))


def test_weights_from_two_snapshots_have_two_names(saved, tmp_path, monkeypatch):
    """Blocks were once named by the folder, whose weights the engine did not load: a fine-tuned model read those of its base."""
    at, model = saved
    folder, url = tmp_path / "folder", f"file://{at}/store"
    shutil.copytree(model, folder)
    store = Store(url)
    (folder / "more").write_text("")
    ids = [store.inspect("llama")[0].id, store.save(folder, name="tuned").id]
    names = [named(folder, snapshot=id) for id in ids]
    assert len({*names, named(folder)}) == 3
    assert named(folder, snapshot=ids[0], store=url, cache="/elsewhere", cache_bytes=1) == names[0]
    with pytest.raises(InvalidWeights, match="'tuned'.*by its id"):
        named(folder, snapshot="tuned", store=url)
    monkeypatch.setattr(vllm_loader, "_held", {})
    held = vllm_loader._hold("tuned", url)
    assert named(folder, snapshot="tuned", store=url) == names[1]
    held.close()
    # What lies in a cache is named by its files, as any other folder is.
    held = vllm_loader._hold("tuned", url, str(tmp_path / "cache"), "1GiB")
    assert named(held.path, snapshot=ids[1]) == named(held.path) != named(held.path, snapshot=ids[0])


def test_a_name_is_looked_up_once(saved, monkeypatch):
    """A rank on its own would look it up again, and may find another snapshot under it."""
    at, model = saved
    url, seen = f"file://{at}/store", []

    class EngineArgs(SimpleNamespace):
        def create_engine_config(self):
            seen.append((self.model, self.model_loader_extra_config["snapshot"]))

    arguments = SimpleNamespace(is_cloud_storage=lambda _: False, EngineArgs=EngineArgs)
    vllm_loader._name_models(arguments)
    monkeypatch.setattr(vllm_loader, "_held", {})
    common = dict(load_format="kvstore", served_model_name=None, tokenizer=None)
    id = Store(url).inspect("llama")[0].id
    for name in ("llama", "kvstore://llama", id):
        EngineArgs(model=str(model), model_loader_extra_config=dict(snapshot=name, store=url), **common).create_engine_config()
    cached = dict(store=url, cache=str(at / "other"), cache_bytes="1GiB")
    EngineArgs(model="kvstore://llama", model_loader_extra_config=cached, **common).create_engine_config()
    assert seen == [(str(model), id)] * 3 + [(str(at / "other" / id), id)]


def test_a_draft_model_is_refused():
    """A draft model shares the load configuration: it got the target's weights."""
    drafted = SimpleNamespace(
        speculative_config={"model": "/models/draft", "num_speculative_tokens": 2},
        model_loader_extra_config={"snapshot": "ab" * 16},
    )
    with pytest.raises(Invalid, match="draft model '/models/draft'"):
        vllm_loader._refuse_drafts(drafted)
    for sound in (
        dict(drafted.__dict__, speculative_config={"method": "ngram"}),
        dict(drafted.__dict__, model_loader_extra_config={}),
    ):
        vllm_loader._refuse_drafts(SimpleNamespace(**sound))
