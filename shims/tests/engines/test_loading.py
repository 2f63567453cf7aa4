"""Weights from snapshots, in torch and transformers: the oracle is always what the library itself loads from the same folder."""

import asyncio
import gc
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tempfile

import pytest
import safetensors.torch
import torch
import transformers

import kvstore
from kvstore import weights
from kvstore.snapshots import Cache, Store
from kvstore.weights.mapped import DTYPES, dtypes

import models
from daemon import Daemon


@pytest.fixture
def store(tmp_path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(f"file://{tmp_path}/store")


@pytest.fixture(params=["memory", "cache"])
def cache(request, tmp_path):
    return Cache(tmp_path / "cache", "1GiB") if request.param == "cache" else False


def write_tokenizer(folder: pathlib.Path) -> None:
    models.write_tokenizer(folder, "", {"eos_token": "</s>"}, ["<pad>", "<s>", "</s>"])


IDS = torch.arange(3, 67).reshape(2, 32)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


class Net(torch.nn.Module):
    """Tied weights, a buffer that is saved, one that is not, and a frozen parameter."""

    def __init__(self, ties: bool = True):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 16)
        self.inner = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
        self.head = torch.nn.Linear(16, 64, bias=False)
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.register_buffer("unsaved", torch.ones(1), persistent=False)
        self.inner[0].bias.requires_grad_(False)
        if ties:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.inner(self.embed(ids)) * self.scale * self.unsaved)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_logits_are_those_of_from_pretrained(store, cache, folder, kind):
    path = models.make(folder, kind)
    store.save(path, name="m")
    wanted = logits(transformers.AutoModelForCausalLM.from_pretrained(path))
    model = weights.load(transformers.AutoModelForCausalLM, "m", store=store, cache=cache)
    assert torch.equal(logits(model), wanted)
    # In two lines, with the folder.
    held = weights.hold("m", store=store, cache=cache)
    again = transformers.AutoModelForCausalLM.from_pretrained(held.path)
    held.close()
    assert torch.equal(logits(again), wanted)
    # A plain module of the same class, whose tensors are given to it.
    with torch.device("meta"):
        empty = type(again)(again.config)
    loaded = {name: one for name, one in again.named_buffers() if name not in again.state_dict()}
    for name, one in loaded.items():
        empty.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = one
    empty = weights.load(empty, "m", store=store, cache=cache).eval()
    assert torch.equal(logits(empty), wanted)


def mapped_from_the_daemon() -> int:
    """Bytes of this process's private mappings of a daemon's memory."""
    with open("/proc/self/maps") as maps:
        # The memory of a file that was copied has another name.
        mine = [line.split()[0].split("-") for line in maps if "memfd:kvstore-slab" in line and " rw-p " in line]
    return sum(int(end, 16) - int(start, 16) for start, end in mine)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_tensors_that_a_daemon_has_are_mapped_from_there(tmp_path, folder, kind):
    path = models.make(folder, kind)
    (tmp_path / "store").mkdir()
    daemon = Daemon(tmp_path, f"snapshots.url=file://{tmp_path}/store", "nvme.paths=off")
    try:
        store = Store(f"file://{tmp_path}/store", daemon=daemon.address)
        store.save(path, name="m")
        store.prewarm("m")
        wanted = transformers.AutoModelForCausalLM.from_pretrained(path)
        before = mapped_from_the_daemon()
        model = weights.load(transformers.AutoModelForCausalLM, "m", store=store, dtype="auto")
        of_model = sum(one.nbytes for one in model.parameters() if one.nbytes >= 64 << 10)
        assert of_model and mapped_from_the_daemon() - before >= of_model, "they were copied"
        assert torch.equal(logits(model), logits(wanted))
        assert model.generation_config == wanted.generation_config
        assert set(model.state_dict()) == set(wanted.state_dict())
        tensors = weights.load(".", "m", store=store)
        oracle = {}
        for file in path.glob("*.safetensors"):
            oracle.update(safetensors.torch.load_file(file))
        assert set(oracle) <= set(tensors)
        assert all(torch.equal(tensors[name], one) for name, one in oracle.items())
        # Trained further, a model writes to pages of its own.
        with torch.no_grad():
            for one in model.parameters():
                one.fill_(1)
        assert all(torch.equal(tensors[name], one) for name, one in oracle.items())
        # Whoever wants files gets files.
        with weights.hold("m", store=store) as held:
            again = transformers.AutoModelForCausalLM.from_pretrained(held.path)
        assert torch.equal(logits(again), logits(wanted))
        config = transformers.AutoConfig.from_pretrained(path)
        held = weights.hold("m", store=store, as_tensors=True)
        held._copy_leased()
        again = transformers.AutoModelForCausalLM.from_pretrained(held.path, config=config)
        assert torch.equal(logits(again), logits(wanted))
    finally:
        daemon.kill()


@pytest.fixture
def near(tmp_path, folder):
    """The folder of a model, and a store whose daemon has its tensors in memory."""
    path = models.make(folder, "llama")
    (tmp_path / "store").mkdir()
    daemon = Daemon(tmp_path, f"snapshots.url=file://{tmp_path}/store", "nvme.paths=off")
    try:
        store = Store(f"file://{tmp_path}/store", daemon=daemon.address)
        store.save(path, name="m")
        store.prewarm("m")
        yield path, store
    finally:
        daemon.kill()


CLASSIFIER, CAUSAL, LLAMA = (
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForCausalLM,
    transformers.LlamaForCausalLM,
)


def test_options_mean_the_same_for_a_daemons_tensors_as_for_files(near):
    """Those for the configuration went to the model's class, which does not know them: a TypeError."""
    path, store = near
    for cls, options, maps in (
        (CLASSIFIER, dict(num_labels=5), True),
        (CLASSIFIER, dict(num_labels=3, problem_type="multi_label_classification", output_loading_info=True), True),
        (CAUSAL, dict(rms_norm_eps=0.5, attn_implementation="eager"), True),
        (LLAMA, dict(rms_norm_eps=0.5, dtype=torch.float32), True),
        (CAUSAL, dict(config=transformers.AutoConfig.from_pretrained(path)), True),
        # Not surely the same: of files.
        (CAUSAL, dict(trust_remote_code=True), False),
        (CAUSAL, dict(config=str(path)), False),
        (LLAMA, dict(subfolder=""), False),
        (LLAMA, dict(generation_config=transformers.GenerationConfig(max_length=7)), False),
    ):
        torch.manual_seed(1)
        wanted = cls.from_pretrained(path, **options)
        torch.manual_seed(1)
        before = mapped_from_the_daemon()
        model = weights.load(cls, "m", store=store, **options)
        if isinstance(wanted, tuple):
            assert model[1] == wanted[1]
            model, wanted = model[0], wanted[0]
        of_model = sum(one.nbytes for one in model.parameters() if one.nbytes >= 64 << 10)
        assert (mapped_from_the_daemon() - before >= of_model) == maps, options
        same, told = model.config.to_dict(), wanted.config.to_dict()
        assert {**same, "_name_or_path": None} == {**told, "_name_or_path": None}, options
        assert type(model) is type(wanted) and model.config._attn_implementation == wanted.config._attn_implementation
        ours, theirs = model.state_dict(), wanted.state_dict()
        assert ours.keys() == theirs.keys() and all(ours[name].dtype == one.dtype for name, one in theirs.items())
        # A head that the snapshot does not have is made at random.
        assert all(torch.equal(ours[name], one) for name, one in theirs.items() if name != "score.weight"), options
        if cls is not CLASSIFIER:
            assert torch.equal(logits(model), logits(wanted)) and model.generation_config == wanted.generation_config
        del model, ours, same
        gc.collect()
    for cls in (CAUSAL, LLAMA):
        with pytest.raises(TypeError, match="odd"):
            cls.from_pretrained(path, odd=1)
        with pytest.raises(TypeError, match="odd"):
            weights.load(cls, "m", store=store, odd=1)


@pytest.mark.parametrize("cls", [CAUSAL, LLAMA])
def test_what_is_quantized_is_made_of_files(tmp_path, folder, cls):
    path = models.make(folder, "llama")
    for changed in (dict(quantization_config={"quant_method": "fp8"}), dict(auto_map={"AutoModelForCausalLM": "own.Model"})):
        config = transformers.LlamaConfig.from_pretrained(path)
        assert weights.loading._config(cls, path, dict(config=config, dtype="auto")) == (config, dict(dtype="auto"))
        for name, value in changed.items():
            setattr(config, name, value)
        assert weights.loading._config(cls, path, dict(config=config)) is None
        config.save_pretrained(tmp_path / "changed")
        assert weights.loading._config(cls, tmp_path / "changed", {}) is None


def test_a_short_write_is_followed_by_the_rest(tmp_path, monkeypatch):
    """The system may write less than it is asked to: the rest of a copy would be zeros."""
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, start: write(descriptor, content[:1000], start))
    content = bytes(range(256)) * 50
    with open(tmp_path / "copy", "w+b") as file:
        weights.loading._write_all(file.fileno(), content, 5)
        file.seek(0)
        assert file.read() == bytes(5) + content


def test_a_sharded_checkpoint_and_its_tokenizer(store, cache, tmp_path, folder):
    path = models.make(folder, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="2MB")
    write_tokenizer(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = store.save(path, name="whole"), store.save(sharded, name="parts")
    assert parts.found_bytes > 0.9 * whole.bytes, "the same chunks"
    loaded, tokenizer = (
        weights.load(cls, "parts", store=store, cache=cache)
        for cls in (transformers.AutoModelForCausalLM, transformers.PreTrainedTokenizerFast)
    )
    assert torch.equal(logits(loaded), logits(model))
    assert (
        tokenizer("hello world").input_ids
        == transformers.PreTrainedTokenizerFast.from_pretrained(sharded)("hello world").input_ids
    )
    assert set(weights.load(".", "parts", store=store, cache=cache)) == set(
        weights.load("model.safetensors", "whole", store=store)
    )


def test_a_module_gets_its_tensors_and_keeps_its_ties(store, cache):
    torch.manual_seed(1)
    trained = Net()
    saved = store.save(trained, name="net")
    assert saved.tensors == 6, "the tied tensor once"
    own = trained(IDS % 64)
    with torch.device("meta"):
        model = Net()
    model.unsaved = torch.ones(1)
    assert weights.load(model, "net", store=store, cache=cache) is model
    assert torch.equal(model(IDS % 64), own)
    assert model.head.weight is model.embed.weight
    assert not model.inner[0].bias.requires_grad and model.embed.weight.requires_grad
    # It is trained further: that is private, and the next one gets what was saved.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(IDS % 64).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(IDS % 64), own)
    other = weights.load(Net(), "net", store=store, cache=cache)
    assert torch.equal(other(IDS % 64), own)
    # Modules that do not tie have weights of their own.
    untied = weights.load(Net(ties=False), "net", store=store, cache=cache)
    with torch.no_grad():
        untied.head.weight.zero_()
    assert untied.embed.weight.abs().sum() > 0
    assert pickle.loads(pickle.dumps(other)).head.weight.shape == (64, 16)


def test_a_module_that_does_not_fit_stays_as_it_was(store):
    net = Net()
    store.save({**net.state_dict(), "more": torch.ones(2)}, name="more")
    store.save({name: one for name, one in net.state_dict().items() if name != "scale"}, name="less")
    store.save({**net.state_dict(), "scale": torch.ones(2)}, name="shape")
    store.save({name: one.bfloat16() for name, one in net.state_dict().items()}, name="half")
    store.save({**net.state_dict(), "head.weight": torch.zeros(64, 16)}, name="untied")
    for name, says in {
        "more": "not in the module are more",
        "less": "missing are scale",
        "shape": r"scale: the module has the shape \(1,\), the snapshot \(2,\)",
        "half": 'the module has torch.float32, the snapshot torch.bfloat16; dtype="snapshot"',
        "untied": "ties embed.weight and head.weight",
    }.items():
        model = Net()
        before = {key: one.clone() for key, one in model.state_dict().items()}
        with pytest.raises(kvstore.Invalid, match=says):
            weights.load(model, name, store=store)
        assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
        assert model.head.weight is model.embed.weight
    assert torch.equal(weights.load(Net(), "more", store=store, strict=False).embed.weight, net.embed.weight)
    assert weights.load(Net(), "half", store=store, dtype="snapshot").embed.weight.dtype == torch.bfloat16
    converted = weights.load(Net(), "half", store=store, dtype="module")
    assert torch.equal(converted.embed.weight, net.embed.weight.bfloat16().float())
    with torch.device("meta"):
        model = Net()
    with pytest.raises(kvstore.Invalid, match="on the meta device.*unsaved"):
        weights.load(model, "more", store=store, strict=False)
    for wrong, says in ((dict(dtype="x"), "dtype"), (dict(unknown="x"), "unknown"), (dict(trust=1), "trust")):
        with pytest.raises(kvstore.Invalid, match=says):
            weights.load(Net(), "more", store=store, **wrong)
    with pytest.raises(kvstore.Invalid, match="int is neither"):
        weights.load(5, "more", store=store)


def raw(path: pathlib.Path, entries: dict[str, tuple[str, list[int], bytes]], metadata: dict | None = None) -> None:
    header, data = {"__metadata__": metadata or {}}, b""
    for name, (dtype, shape, content) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_every_type(store, cache, tmp_path):
    """Each type of the library comes back as torch's, or is refused by its name, or comes as bytes."""
    source = tmp_path / "types"
    source.mkdir()
    numbers = bytes(range(1, 25))
    entries = {name: (name, [24 * 8 // bits], numbers) for name, (_, bits) in DTYPES.items()}
    have = dtypes()
    raw(source / "model.safetensors", {name: one for name, one in entries.items() if name in have})
    raw(source / "six.safetensors", {"six": entries["F6_E2M3"]})
    store.save(source, name="types")
    found = weights.load("model.safetensors", "types", store=store, cache=cache)
    assert {name: one.dtype for name, one in found.items()} == {name: have[name] for name in entries if name in have}
    assert all(bytes(one.view(torch.uint8).numpy()) == numbers for one in found.values())
    with pytest.raises(kvstore.Invalid, match="'six' has the type F6_E2M3, which torch .* does not have"):
        weights.load("six.safetensors", "types", store=store, cache=cache)
    six = weights.load("six.safetensors", "types", store=store, cache=cache, unknown="bytes")["six"]
    assert bytes(six.numpy()) == numbers
    if {"F4"} <= have.keys():
        assert found["F4"].shape == (24,), "pairs of numbers"
    # They can be saved again, from memory, and are the same chunks.
    again = store.save(found, name="again", files={"six.safetensors": (source / "six.safetensors").read_bytes()})
    loaded = weights.load("model.safetensors", "again", store=store)
    assert all(bytes(one.view(torch.uint8).numpy()) == numbers and one.dtype == found[name].dtype for name, one in loaded.items())
    assert again.tensors == len(found) + 1


def test_tensors_that_overlap_are_odd_or_empty(store, cache, tmp_path):
    source = tmp_path / "odd"
    source.mkdir()
    header = {
        "whole": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "part": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        "same": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "odd": {"dtype": "F32", "shape": [1], "data_offsets": [17, 21]},
        "scalar": {"dtype": "BF16", "shape": [], "data_offsets": [22, 24]},
        "empty": {"dtype": "F16", "shape": [0, 3], "data_offsets": [24, 24]},
        "__metadata__": {"tied": "whole", "format": "pt"},
    }
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(24)))
    store.save(source, name="odd")
    found = weights.load(".", "odd", store=store, cache=cache)
    assert found["same"] is found["whole"] and found["tied"] is found["whole"]
    assert found["part"].untyped_storage().data_ptr() == found["whole"].untyped_storage().data_ptr()
    found["whole"][2] = 7
    assert found["part"][0] == 7
    assert found["odd"].data_ptr() % 4 == 0 and bytes(found["odd"].view(torch.uint8).numpy()) == bytes(range(17, 21))
    assert found["scalar"].shape == () and found["empty"].shape == (0, 3)
    raw(source / "model.safetensors", {"a": ("F32", [3], b"12345678")})
    store.save(source, name="short")
    with pytest.raises(kvstore.DataLoss, match="'a' of type F32 and shape .3. does not have 8 bytes"):
        weights.load(".", "short", store=store, cache=cache)
    (source / "model.safetensors").write_bytes(b"no header")
    store.save(source, name="none")
    with pytest.raises(kvstore.Invalid, match="no safetensors file"):
        weights.load(".", "none", store=store, cache=cache)


def test_a_live_model_is_what_save_pretrained_saves(store, tmp_path, folder):
    path = models.make(folder, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    (tmp_path / "files").mkdir()
    write_tokenizer(tmp_path / "files")
    (tmp_path / "files" / "old.safetensors").write_bytes(b"left out")
    first = store.save(path)
    told = []
    live = store.save(model, name="live", files=tmp_path / "files", progress=told.append)
    assert live.written_bytes < 0.2 * first.bytes, "the weights are there"
    assert told[-1].done == live.bytes
    loaded = weights.load(transformers.AutoModelForCausalLM, "live", store=store)
    assert torch.equal(logits(loaded), logits(model)) and loaded.dtype == model.dtype
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    names = {file.path for file in store.inspect("live")[1]}
    assert "tokenizer.json" in names and "old.safetensors" not in names
    store.restore("live", tmp_path / "folder")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert torch.equal(logits(again), logits(model))
    assert safetensors.torch.load_file(tmp_path / "folder" / "model.safetensors").keys()


def test_live_tensors_that_cannot_be_saved_are_named(store):
    for tensors, says in (
        ({"a": torch.ones(2).to_sparse()}, "a: the tensor is sparse"),
        ({"a": torch.ones(2, device="meta")}, "a: the tensor is sparse, quantized by torch, or on the meta"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "a: safetensors has no type for torch.complex128"),
        ({"a": 5}, "a: int is not a tensor"),
        (5, "int is not a folder"),
    ):
        with pytest.raises(kvstore.Invalid, match=says):
            store.save(tensors)
    transposed = torch.arange(6.0).reshape(2, 3).t()
    store.save({"t": transposed, "part": transposed[:1], "scalar": torch.tensor(3.0)}, name="views")
    found = weights.load(".", "views", store=store)
    assert torch.equal(found["t"], transposed) and torch.equal(found["part"], transposed[:1]) and found["scalar"] == 3


def test_loading_can_be_awaited(store, cache, folder):
    path = models.make(folder, "llama")
    store.save(path, name="m")

    async def load():
        told = []
        model = await weights.load_async(
            transformers.AutoModelForCausalLM, "m", store=store, cache=cache, progress=told.append, dtype="same"
        )
        assert told[-1].done == told[-1].total > 0
        return model

    wanted = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits(asyncio.run(load())), logits(wanted))


MEASURE = """
import json, sys, time
import torch
import kvstore.weights, kvstore.snapshots

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

cache = kvstore.snapshots.Cache(sys.argv[2], "2GiB") if sys.argv[2] else False
before = memory("VmRSS")
found = kvstore.weights.load(".", "m", store=sys.argv[1], cache=cache)
total = sum(float(one.view(torch.uint8)[::512].sum()) for one in found.values())
print(json.dumps({"peak": memory("VmHWM") - before, "anonymous": memory("RssAnon"), "bytes": sum(one.nbytes for one in found.values()),
                  "total": total}))
"""


@pytest.mark.parametrize("is_cached", [False, True])
def test_there_is_no_second_copy(store, tmp_path, is_cached):
    """The peak of anonymous and shared memory while a gigabyte is restored and touched."""
    torch.manual_seed(1)
    tensors = {f"layer.{at}": torch.randn(32 << 20).bfloat16() for at in range(16)}
    saved = store.save(tensors, name="m")
    place = tempfile.mkdtemp(prefix="kvstore-test-", dir="/dev/shm") if is_cached else ""
    try:
        command = [sys.executable, "-c", MEASURE, store.url, place]
        told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    finally:
        if is_cached:
            Cache(place, 1).rm(saved.id)
            shutil.rmtree(place, ignore_errors=True)
    assert told["bytes"] == 1 << 30
    assert told["peak"] < 1.1 * told["bytes"], told
    wanted = sum(float(one.view(torch.uint8)[::512].sum()) for one in tensors.values())
    assert told["total"] == wanted
