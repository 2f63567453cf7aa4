"""Names of weights: what differs, differs; what is the same, is the same wherever and however it lies.

Names were once made of files. Two saves of one model then had two names, as a safetensors file's metadata can have any order, and
an optimizer beside a model made it another one: nodes with the same model shared nothing.
"""

import concurrent.futures
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import numpy
import pytest

from kvstore import weights
from kvstore.weights import InvalidWeights, configs, fingerprint, folder_of, kept, read_adapter
from kvstore.weights import tensors as hashing
from kvstore.weights.adapters import Adapters

LOGGER = logging.getLogger("test weights")


def safetensors(path: pathlib.Path, tensors: dict[str, numpy.ndarray], metadata: dict | None = None, dtype: str = "F32") -> None:
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    encoded = json.dumps(header).encode()
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def sharded(folder: pathlib.Path, tensors: dict[str, numpy.ndarray], shards: int, prefix: str = "model") -> None:
    """Saves tensors in several files, in the opposite order, with an index."""
    names, index = list(reversed(tensors)), {}
    for at in range(shards):
        file = f"{prefix}-{at + 1:05}-of-{shards:05}.safetensors"
        some = {name: tensors[name] for name in names[at::shards]}
        safetensors(folder / file, some, {"format": "pt", "part": str(at)})
        index.update(dict.fromkeys(some, file))
    (folder / f"{prefix}.safetensors.index.json").write_text(json.dumps({"metadata": {"total": at}, "weight_map": index}))


def tensors(seed: int = 0) -> dict[str, numpy.ndarray]:
    numbers = numpy.random.default_rng(seed)
    return {f"layer.{at}": numbers.standard_normal((64, 64), dtype=numpy.float32) for at in range(20)}


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return saved(tmp_path / "model")


def saved(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)
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


def test_names_types_shapes_and_configuration_count(model):
    seen = {fingerprint(model)}
    safetensors(model / "model.safetensors", {f"other.{name}": tensor for name, tensor in tensors().items()})
    seen.add(fingerprint(model))
    safetensors(model / "model.safetensors", {name: tensor.reshape(32, 128) for name, tensor in tensors().items()})
    seen.add(fingerprint(model))
    safetensors(model / "model.safetensors", tensors(), dtype="I32")
    seen.add(fingerprint(model))
    names = list(tensors())
    safetensors(model / "model.safetensors", dict(zip(names[1:] + names[:1], tensors().values())))
    seen.add(fingerprint(model))
    (model / "config.json").write_text('{"layers": 20, "rope": 2}')
    seen.add(fingerprint(model))
    safetensors(model / "model.safetensors", {**tensors(), "empty": numpy.zeros((0, 4), numpy.float32)})
    seen.add(fingerprint(model))
    assert len(seen) == 7


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "any"])
def test_another_save_of_the_same_model_has_its_name(model, tmp_path, shards, engine):
    other = tmp_path / "other"
    other.mkdir()
    sharded(other, tensors(), shards)
    told = {"transformers_version": "5.0", "_name_or_path": "/somewhere", "use_cache": False, "layers": 20.0}
    (other / "config.json").write_text(json.dumps(told, indent=4))
    assert fingerprint(other, engine) == fingerprint(model, engine)


def test_settings_that_count_and_those_that_do_not(model):
    def digest(**told) -> bytes:
        (model / "config.json").write_text(json.dumps(told))
        return configs.digests(model)[0][1]

    assert digest(a=1, torch_dtype="bfloat16") == digest(dtype="bfloat16", a=1)
    assert digest(text_config=dict(a=1, _name_or_path="x")) == digest(text_config=dict(a=1.0))
    assert digest(a=[1, 2]) != digest(a=[2, 1])
    assert digest(dtype="bfloat16") != digest(dtype="float16")
    assert digest(text_config=dict(a=1)) != digest(a=1)
    assert digest(rope_theta=1e6) != digest(rope_theta=1e5)
    for garbled in (b"{", b"[" * 100_000, b"{} "):
        (model / "config.json").write_bytes(garbled)
        assert len(configs.digests(model)[0][1]) == 32


def tick(file: pathlib.Path, beside: pathlib.Path) -> None:
    """Waits until a write to `file` has another time than the one before: a file system's clock ticks some hundred times a second."""
    written = file.stat().st_mtime_ns
    while True:
        (beside / "tick").write_bytes(b"")
        if (beside / "tick").stat().st_mtime_ns > written:
            return


def test_files_are_hashed_in_pieces_and_once(model, tmp_path, monkeypatch):
    hashed = watch(monkeypatch)
    file = model / "model.safetensors"
    # However long this test takes.
    monkeypatch.setattr(kept, "_SETTLED_SECONDS", 3600)
    one = fingerprint(model)
    # Each tensor has five pieces, read in two parts at most.
    assert sum(length for _, length in hashed) == 20 * 64 * 64 * 4 and len(hashed) > 100
    # It was written a moment ago: times do not tell yet whether it is written again.
    hashed.clear()
    assert fingerprint(model) == one and hashed
    monkeypatch.setattr(kept, "_SETTLED_SECONDS", -1)
    fingerprint(model)
    hashed.clear()
    assert fingerprint(model) == one and not hashed, "what is kept is used"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    tick(file, tmp_path)
    file.write_bytes(content)
    other = fingerprint(model)
    assert other != one
    for digests in (tmp_path / "cache/kvstore/weights").iterdir():
        content = bytearray(digests.read_bytes())
        if content:
            # A digit of the last digest.
            content[-4] = ord("0" if content[-4] != ord("0") else "1")
            digests.write_bytes(content)
    assert fingerprint(model) == other
    hashed.clear()
    assert fingerprint(model) == other and not hashed
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert fingerprint(model) == other and hashed, "without a place to keep it"


def test_ranks_that_start_together_hash_once(model, monkeypatch):
    monkeypatch.setattr(kept, "_SETTLED_SECONDS", -1)
    hashed = watch(monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(4) as ranks:
        assert len(set(ranks.map(lambda _: fingerprint(model), range(4)))) == 1
    assert sum(length for _, length in hashed) == 20 * 64 * 64 * 4


def watch(monkeypatch) -> list[tuple[int, int]]:
    """Makes pieces small, and returns a list of what is read from now on: where, and how much."""
    monkeypatch.setattr(hashing, "_PIECE", 4000)
    monkeypatch.setattr(hashing, "_READ", 3000)
    hashed, preadv = [], os.preadv

    def read(descriptor, buffers, at):
        hashed.append((at, sum(map(len, buffers))))
        return preadv(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", read)
    return hashed


def test_how_much_is_read_at_a_time_changes_nothing(model, monkeypatch):
    one = fingerprint(model)
    for size in (1, 16384, 16385, 40_000, 1 << 30):
        monkeypatch.setattr(hashing, "_READ", max(size, 64))
        assert fingerprint(model) == one


def test_engines_that_tell_a_path_alone(model, caplog):
    logger = LOGGER
    one = weights.name(str(model), "", logger)
    assert one == weights.name(str(model), "", logger) and not caplog.records
    assert len({one, weights.name(str(model), "2", logger), weights.name(str(model), "", logger, revision="b")}) == 3
    safetensors(model / "more.safetensors", {"more": numpy.zeros(4)})
    assert weights.name(str(model), "", logger) != one
    # Without its files, the name is all there is: that is said, unless a version says more.
    assert weights.name("an/unknown-repository", "", logger) != weights.name("another/unknown-repository", "", logger)
    assert len(caplog.records) == 2 and "weights_version" in caplog.text
    assert weights.name("an/unknown-repository", "2", logger) and len(caplog.records) == 2


def test_the_hubs_cache_and_a_folder_have_one_name(model, tmp_path):
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for at, name in enumerate(("model.safetensors", "config.json")):
        shutil.copy(model / name, blobs / (str(at) * 64))
        (snapshot / name).symlink_to(os.path.relpath(blobs / (str(at) * 64), snapshot))
    assert fingerprint(snapshot) == fingerprint(model)
    # A blob's name is not taken for its content.
    safetensors(blobs / ("0" * 64), tensors(1))
    assert fingerprint(snapshot) != fingerprint(model)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "any"])
def test_what_the_engine_does_not_load_does_not_count(model, engine):
    one = fingerprint(model, engine)
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "training_args.bin",
        "rng_state.pth",
        "pytorch_model.bin",
        "model.gguf",
        "README.md",
    ):
        (model / name).write_bytes(os.urandom(100))
    (model / "checkpoint-500").mkdir()
    safetensors(model / "checkpoint-500/model.safetensors", tensors(5))
    assert fingerprint(model, engine) == one
    safetensors(model / "adapter_model.safetensors", {"more": numpy.zeros(4)})
    assert fingerprint(model, engine) != one, "without an index, engines load it"


def test_pickles_are_named_by_their_content_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    contents = [b"not a pickle", b"neither"]

    def named(folder: str, names: list[str], **more: bytes) -> bytes:
        (tmp_path / folder).mkdir()
        for name, content in {**dict(zip(names, contents)), **more}.items():
            (tmp_path / folder / name).write_bytes(content)
        return fingerprint(tmp_path / folder)

    one = named("a", ["pytorch_model-1.bin", "pytorch_model-2.bin"])
    assert named("b", ["two.bin", "one.bin"], **{"optimizer.bin": b"x", "training_args.bin": b"y", "model.pt": b"z"}) == one
    assert named("c", ["one.bin"]) != one
    assert named("d", ["one.pt", "two.pt"]) == one
    assert named("e", ["model.gguf", "more.pth"], **{"rng_state_0.pth": b"x"}) == one, "a format with rules of its own"


def test_an_index_says_which_files_count(model, tmp_path):
    shutil.copy(model / "model.safetensors", tmp_path / "whole.safetensors")
    one = fingerprint(model)
    (model / "model.safetensors").unlink()
    sharded(model, tensors(), 3)
    safetensors(model / "stale.safetensors", tensors(3))
    assert fingerprint(model) == fingerprint(model, "sglang") == one
    (model / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors.index.json.*model-00002"):
        fingerprint(model)
    for garbled in ("{", "{}", '{"weight_map": 1}', "[" * 100_000):
        (model / "model.safetensors.index.json").write_text(garbled)
        with pytest.raises(InvalidWeights, match="model.safetensors.index.json"):
            fingerprint(model)


def test_a_second_format_beside_the_first(model):
    """vLLM prefers what Mistral consolidates, and SGLang the other files."""
    one = fingerprint(model)
    safetensors(model / "consolidated.safetensors", tensors(2))
    assert fingerprint(model, "sglang") == one
    other = fingerprint(model)
    assert other != one
    safetensors(model / "model.safetensors", tensors(4))
    assert fingerprint(model) == other and fingerprint(model, "sglang") != one
    assert fingerprint(model, "vllm", "mistral") == other != fingerprint(model, "vllm", "safetensors")


def test_of_a_tensor_that_two_files_have_the_last_counts(model):
    one = fingerprint(model)
    safetensors(model / "model-2.safetensors", dict(list(tensors().items())[:3]))
    assert fingerprint(model) == one, "it is the same one"
    safetensors(model / "model-2.safetensors", tensors(1))
    safetensors(model / "model-10.safetensors", tensors(2))
    other = fingerprint(model)
    safetensors(model / "model-2.safetensors", tensors(2))
    safetensors(model / "model-10.safetensors", tensors(1))
    assert len({one, other, fingerprint(model)}) == 3
    # Numbers in names are sorted as numbers.
    (model / "model.safetensors").rename(model / "a.safetensors")
    other = fingerprint(model)
    (model / "model-2.safetensors").rename(model / "x.safetensors")
    (model / "model-10.safetensors").rename(model / "y.safetensors")
    assert fingerprint(model) == other


def header(told, data: bytes = b"") -> bytes:
    encoded = told if isinstance(told, bytes) else json.dumps(told).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (200_000_000).to_bytes(8, "little"),
        header({"a": ONE}, b"abc"),
        header({"a": ONE})[:-5],
        header(b"{"),
        header(b"[1]"),
        header(b"\xff\xfe"),
        header(b"[" * 100_000),
        header(b'{"a": 1, "a": 2}'),
        header({"a": {**ONE, "dtype": 1}}, b"abcd"),
        header({"a": {**ONE, "shape": [-4]}}, b"abcd"),
        header({"a": {**ONE, "shape": [True]}}, b"abcd"),
        header({"a": {**ONE, "data_offsets": [4, 0]}}, b"abcd"),
        header({"a": {**ONE, "data_offsets": [-4, 4]}}, b"abcd"),
        header({"a": {**ONE, "data_offsets": [0]}}, b"abcd"),
        header({"a": ONE, "b": {**ONE, "data_offsets": [3, 7]}}, b"abcdefg"),
        header({"a": ONE, "b": ONE}, b"abcd"),
    ],
    ids=range(19),
)
def test_files_that_are_no_safetensors_are_named(model, content, caplog):
    (model / "more.safetensors").write_bytes(content)
    with pytest.raises(InvalidWeights, match="more.safetensors: it"):
        fingerprint(model)
    # An engine goes on, and says it.
    assert weights.name(str(model), "", LOGGER) and "more.safetensors" in caplog.text


def test_a_header_of_more_than_the_format_allows(model):
    with open(model / "more.safetensors", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(InvalidWeights, match="more.safetensors: its header has 100000001 bytes"):
        fingerprint(model)


ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "/a", "peft_version": "1"}


def adapter(folder: pathlib.Path, seed: int = 0, **told) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors(folder / "adapter_model.safetensors", tensors(seed), {"format": "pt"} if seed else None)
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, **told}))
    return folder


def test_an_adapter_is_named_by_its_content_wherever_it_lies(model, tmp_path):
    one = read_adapter(adapter(tmp_path / "a")).digest
    other = adapter(tmp_path / "b/c", base_model_name_or_path="/b", peft_version="2", target_modules=["v_proj", "q_proj"])
    safetensors(other / "adapter_model.safetensors", dict(reversed(tensors().items())), {"more": "1"})
    (other / "optimizer.pt").write_bytes(b"x")
    (other / "adapter_model.bin").write_bytes(b"not loaded")
    assert read_adapter(other).digest == one
    assert Adapters(LOGGER).name(str(other)) == Adapters(LOGGER).name(str(tmp_path / "a")) == one
    names = [
        read_adapter(adapter(tmp_path / "d", **told)).digest
        for told in (dict(r=16), dict(seed=1), dict(rank_pattern=dict(a=1, b=2)), dict(rank_pattern=dict(b=2, a=1)))
    ]
    assert len({one, *names}) == 5


def test_an_adapter_that_is_rewritten_in_place_loses_its_name(model, tmp_path, monkeypatch, caplog):
    """The engine may have loaded the old one or the new one. Once its blocks were then named by the new files."""
    adapters, folder = Adapters(LOGGER), adapter(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    one = adapters.name(str(folder))
    assert one and adapters.name(str(folder)) == one
    # The folder's own time does not change.
    content = file.read_bytes()
    tick(file, tmp_path)
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([content[-1] ^ 1]))
    assert adapters.name(str(folder)) is None and "rewritten" in caplog.text
    file.write_bytes(content)
    assert adapters.name(str(folder)) is None, "the engine may have loaded what was there in between"
    assert adapters.name(str(adapter(tmp_path / "b"))) == one
    adapters.reset()
    assert adapters.name(str(folder)) == one
    # Written anew with the same content, and gone while the engine has it.
    os.replace(shutil.copy(file, tmp_path / "copy"), file)
    assert adapters.name(str(folder)) == one
    shutil.rmtree(folder)
    assert adapters.name(str(folder)) == one
    adapter(folder, seed=1)
    assert adapters.name(str(folder)) is None


def test_an_adapter_that_cannot_be_read_has_no_name(model, tmp_path, monkeypatch, caplog):
    adapters, folder = Adapters(LOGGER), tmp_path / "a"
    monkeypatch.setattr("kvstore.weights.adapters._RETRY_SECONDS", 3600)
    assert adapters.name(str(folder)) is None and "not on this machine" in caplog.text
    adapter(folder)
    assert adapters.name(str(folder)) is None and len(caplog.records) == 1, "it is looked for after a while"
    monkeypatch.setattr("kvstore.weights.adapters._RETRY_SECONDS", 0)
    adapters.reset()
    (folder / "adapter_model.safetensors").write_bytes(b"cut off")
    assert adapters.name(str(folder)) is None and "adapter_model.safetensors" in caplog.text
    adapter(folder)
    assert adapters.name(str(folder))


def test_the_name_is_logged_once(model, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        weights.name(str(model), "", LOGGER)
    (record,) = caplog.records
    assert f"{fingerprint(model, 'any').hex()}: 20 tensors, 0.000 GB, 1 files" in record.getMessage()
    weights.name(str(model / "model.safetensors"), "", LOGGER, says=False)
    assert len(caplog.records) == 1


def test_the_command_shows_where_nodes_differ(model, tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "kvstore.weights", *map(str, arguments)], capture_output=True, text=True)

    other = saved(tmp_path / "other")
    assert run(model, "--tensors").stdout == run(other, "--tensors").stdout
    safetensors(other / "model.safetensors", {**tensors(), "layer.7": tensors(1)["layer.7"]})
    lines = [run(folder, "--tensors").stdout.splitlines() for folder in (model, other)]
    assert lines[0][0] == f"weights {fingerprint(model).hex()}" and len(lines[0]) == 22
    different = [before.split()[0] for before, after in zip(*lines) if before != after]
    assert different == ["weights", "layer.7"]
    told = json.loads(run(model, "--json", "--tensors").stdout)
    assert told["weights"] == fingerprint(model).hex() and told["files"] == ["model.safetensors"]
    assert told["tensors"][0]["shape"] == [64, 64] and told["tensor_count"] == 20
    assert run(adapter(tmp_path / "a")).stdout.startswith(f"weights {read_adapter(tmp_path / 'a').digest.hex()}")
    missing = run(tmp_path / "nowhere")
    assert missing.returncode == 1 and "not on this machine" in missing.stderr
    (tmp_path / "empty").mkdir()
    empty = run(tmp_path / "empty")
    assert empty.returncode == 1 and "no weights" in empty.stderr
    assert "diff node-1.txt" in run("--help").stdout


def test_nothing_to_name_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        fingerprint(tmp_path)
    assert folder_of("an/unknown-repository") is None
    assert folder_of(str(tmp_path)) == tmp_path
