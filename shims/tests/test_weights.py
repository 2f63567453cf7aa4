"""Fingerprints of weights: what differs, differs; what is the same, is the same wherever it lies."""

import concurrent.futures
import json
import logging
import os
import pathlib
import shutil

import numpy
import pytest

from kvstore import weights
from kvstore.weights import fingerprint, folder_of


def safetensors(path: pathlib.Path, tensors: dict[str, numpy.ndarray]) -> None:
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    encoded = json.dumps(header).encode()
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def tensors(seed: int = 0) -> dict[str, numpy.ndarray]:
    numbers = numpy.random.default_rng(seed)
    return {f"layer.{at}": numbers.standard_normal((64, 64), dtype=numpy.float32) for at in range(20)}


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"layers": 20}')
    safetensors(folder / "model.safetensors", tensors())
    return folder


def test_a_copy_is_the_same_and_its_time_does_not_matter(model, tmp_path):
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(model, copy)
    (copy / "model.safetensors").touch()
    (copy / "README.md").write_text("something else")
    assert fingerprint(copy) == fingerprint(model)
    assert len(fingerprint(model)) == 32


@pytest.mark.parametrize("layer", [0, 7, 19])
def test_one_number_that_was_trained_further_shows(model, layer):
    """Samples would miss it: some rows of an embedding."""
    before, changed = fingerprint(model), tensors()
    changed[f"layer.{layer}"][17, 5] += numpy.float32(1e-3)
    safetensors(model / "model.safetensors", changed)
    assert fingerprint(model) != before


def test_names_shapes_and_configuration_count(model):
    seen = {fingerprint(model)}
    safetensors(model / "model.safetensors", {f"other.{name}": tensor for name, tensor in tensors().items()})
    seen.add(fingerprint(model))
    safetensors(model / "model.safetensors", {name: tensor.reshape(32, 128) for name, tensor in tensors().items()})
    seen.add(fingerprint(model))
    (model / "config.json").write_text('{"layers": 20, "rope": 2}')
    seen.add(fingerprint(model))
    (model / "more.bin").write_bytes(b"")
    seen.add(fingerprint(model))
    assert len(seen) == 5


def test_files_are_hashed_in_pieces_and_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_PIECE", 1000)
    file = model / "model.safetensors"
    hashed = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *call: hashed.append(call) or pread(*call))
    one = fingerprint(model)
    assert len(hashed) == -(-file.stat().st_size // 1000)
    # It was written a moment ago: times do not tell yet whether it is written again.
    assert fingerprint(model) == one and len(hashed) > 400
    monkeypatch.setattr(weights, "_SETTLED_SECONDS", -1)
    fingerprint(model)
    before = len(hashed)
    assert fingerprint(model) == one and len(hashed) == before, "what is kept is used"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(model) != one
    for kept in (tmp_path / "cache/kvstore/weights").iterdir():
        kept.write_bytes(b"garbled")
    file.write_bytes(content)
    assert fingerprint(model) != one
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert fingerprint(model) != one, "without a place to keep it"


def test_ranks_that_start_together_hash_once(model, monkeypatch):
    monkeypatch.setattr(weights, "_SETTLED_SECONDS", -1)
    monkeypatch.setattr(weights, "_PIECE", 1000)
    hashed = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *call: hashed.append(call) or pread(*call))
    with concurrent.futures.ThreadPoolExecutor(4) as ranks:
        assert len(set(ranks.map(lambda _: fingerprint(model), range(4)))) == 1
    assert len(hashed) == -(-(model / "model.safetensors").stat().st_size // 1000)


def test_engines_that_tell_a_path_alone(model, caplog):
    logger = logging.getLogger("test weights")
    one = weights.name(str(model), "", logger)
    assert one == weights.name(str(model), "", logger) and not caplog.records
    assert len({one, weights.name(str(model), "2", logger), weights.name(str(model), "", logger, revision="b")}) == 3
    (model / "more.bin").write_bytes(b"more")
    assert weights.name(str(model), "", logger) != one
    # Without its files, the name is all there is: that is said, unless a version says more.
    assert weights.name("an/unknown-repository", "", logger) != weights.name("another/unknown-repository", "", logger)
    assert len(caplog.records) == 2 and "weights_version" in caplog.text
    assert weights.name("an/unknown-repository", "2", logger) and len(caplog.records) == 2


def test_the_hub_names_files_by_their_content(model, tmp_path):
    blobs = tmp_path / "hub/blobs"
    blobs.mkdir(parents=True)
    snapshot = tmp_path / "hub/snapshots/abc"
    snapshot.mkdir(parents=True)
    seen = set()
    for name in ("0" * 64, "1" * 64, "0" * 64):
        (blobs / name).write_bytes(b"its name says what it is")
        (snapshot / "model.safetensors").unlink(missing_ok=True)
        (snapshot / "model.safetensors").symlink_to(blobs / name)
        seen.add(fingerprint(snapshot))
    assert len(seen) == 2


def test_nothing_to_name_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        fingerprint(tmp_path)
    assert folder_of("an/unknown-repository") is None
    assert folder_of(str(tmp_path)) == tmp_path
