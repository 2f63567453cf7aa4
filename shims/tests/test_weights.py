"""Fingerprints of weights: what differs, differs; what is the same, is the same wherever it lies."""

import json
import pathlib
import shutil

import numpy
import pytest

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
def model(tmp_path):
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
def test_one_tensor_that_was_trained_further_shows(model, layer):
    before, changed = fingerprint(model), tensors()
    changed[f"layer.{layer}"] += numpy.float32(1e-3)
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
    assert len(seen) == 4


def test_other_formats_and_files_that_lie_are_sampled_too(model):
    plain = model / "more.bin"
    plain.write_bytes(bytes(100_000))
    one = fingerprint(model)
    plain.write_bytes(bytes(99_000) + b"\x01" * 1000)
    assert fingerprint(model) != one
    for lie in (b"", b"short", (2**60).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"nope" + bytes(100)):
        (model / "model.safetensors").write_bytes(lie)
        assert len(fingerprint(model)) == 32
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**50]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert len(fingerprint(model)) == 32


def test_nothing_to_name_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        fingerprint(tmp_path)
    assert folder_of("an/unknown-repository") is None
    assert folder_of(str(tmp_path)) == tmp_path
