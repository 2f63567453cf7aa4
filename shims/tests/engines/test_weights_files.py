"""The files that name weights are those that the engine's own loader takes, in every folder that its rules tell apart."""

import json

import pytest

from kvstore.weights import files

FOLDERS = {
    "one file": ["model.safetensors"],
    "a training's rest": ["model.safetensors", "optimizer.pt", "training_args.bin", "rng_state.pth"],
    "an index": ["model-1.safetensors", "model-2.safetensors", "stale.safetensors", ("model", ["model-1", "model-2"])],
    "no index": ["a.safetensors", "b.safetensors", "pytorch_model.bin"],
    "pickles": ["pytorch_model-1.bin", "pytorch_model-2.bin", "optimizer.bin", "training_args.bin", "scheduler.pt", "x.pt"],
    "pt": ["model.pt", "optimizer.pt", "scaler.pt", "model.pth"],
    "two formats": ["consolidated.safetensors", "model.safetensors"],
    "two formats and an index": [
        "consolidated.safetensors",
        "model-1.safetensors",
        "model-2.safetensors",
        ("model", ["model-1", "model-2"]),
    ],
    "two formats and their indexes": [
        "consolidated-1.safetensors",
        "consolidated-2.safetensors",
        "model-1.safetensors",
        ("model", ["model-1"]),
        ("consolidated", ["consolidated-1"]),
    ],
}


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path):
    for one in FOLDERS[request.param]:
        if isinstance(one, tuple):
            weights = {f"tensor.{name}": f"{name}.safetensors" for name in one[1]}
            (tmp_path / f"{one[0]}.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
        else:
            (tmp_path / one).write_bytes(b"")
    return tmp_path


def same(folder, engine: str, load_format: str, prepared) -> None:
    try:
        _, wanted, is_safetensors, *_ = prepared()
    except (RuntimeError, FileNotFoundError):
        pytest.skip("the engine does not load this folder so")
    if is_safetensors and not all(file.endswith(".safetensors") for file in wanted):
        pytest.skip("the engine takes pickles for safetensors, and fails")
    wanted = sorted(wanted)
    assert sorted(map(str, files.loaded(folder, engine, load_format))) == wanted
    assert set(wanted) <= set(map(str, files.loaded(folder, "any", load_format)))


@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors", "mistral", "pt", "npcache"])
def test_vllm(folder, load_format):
    loader = pytest.importorskip("vllm.model_executor.model_loader.default_loader")
    from vllm.config.load import LoadConfig

    one = loader.DefaultModelLoader(LoadConfig(load_format=load_format))
    same(folder, "vllm", load_format, lambda: one._prepare_weights(str(folder), None, None, True, None))


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "mistral", "pt", "npcache"])
def test_sglang(folder, load_format, monkeypatch):
    loader = pytest.importorskip("sglang.srt.model_loader.loader")
    from sglang.srt.configs.load_config import LoadConfig

    monkeypatch.setattr(loader, "get_server_args", lambda: None)
    one = loader.DefaultModelLoader(LoadConfig(load_format=load_format))
    same(folder, "sglang", load_format, lambda: one._prepare_weights(str(folder), None, True))
