"""Snapshots beside fio, a plain read and the published loaders of weights, in one run, interleaved: `make bench-snapshots`.

Folders: save and restore of random bytes on one disk, its page cache dropped. Models: 2 GiB of weights to a transformers model on the CPU
through its first forward pass, each time in a fresh process, from after its imports on. Cold: the page cache of the files is dropped.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from figures import Figures  # noqa: E402

PIECE = 8 << 20
PEERS = ("from_pretrained", "torch_load", "safetensors", "runai", "fastsafetensors", "tensorizer")


def drop(folder: pathlib.Path) -> None:
    """Drops files from the page cache; they are synced first."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def median(values: list[float]) -> float:
    return statistics.median(values)


def fio(folder: pathlib.Path, kind: str, length: int) -> float:
    """Seconds of fio, with as many requests of a chunk's size in flight as a restore has."""
    command = ["fio", "--name=fio", f"--filename={folder}/fio", f"--rw={kind}", "--bs=8M", f"--size={length}", "--direct=1"]
    command += ["--ioengine=libaio", "--iodepth=8", "--end_fsync=1", "--output-format=json"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return told["jobs"][0][kind]["runtime"] / 1000


def plain_read(paths: list[pathlib.Path]) -> float:
    """Seconds in which one thread reads files."""
    buffer = bytearray(PIECE)
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


class Daemon:
    """A daemon that knows the snapshots of a store."""

    def __init__(self, program: str, folder: pathlib.Path, url: str, *settings: str):
        self.program, self.address = program, f"unix:{folder}/bench.sock"
        self.settings = (f"snapshots.url={url}", "http.address=off", "log.level=error", *settings)

    def __enter__(self):
        command = [self.program, "serve", "--listen", self.address]
        for setting in self.settings:
            command += ["--set", setting]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        # Until its memory is ready: a node's daemon is up long before a worker comes.
        while True:
            told = subprocess.run([self.program, "status", "--json", "--address", self.address], capture_output=True, text=True)
            if not told.returncode:
                host = json.loads(told.stdout)["host"]
                if host["bytes_ready"] + host["bytes_mapped"] > 0.9 * host["bytes_max"]:
                    return self
            if self.process.poll() is not None:
                raise RuntimeError("the daemon ended")
            time.sleep(0.05)

    def __exit__(self, *_exception) -> None:
        self.process.terminate()
        self.process.wait()

    def prewarm(self, tier: str) -> tuple[float, dict]:
        start = time.perf_counter()
        command = [self.program, "snapshot", "prewarm", "m", "--daemon", self.address, "--tier", tier, "--json"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        return time.perf_counter() - start, json.loads(answer.stdout)


class Folders:
    def __init__(self, program: str, disk: pathlib.Path, length: int, figures: Figures):
        self.program, self.disk, self.length, self.figures = program, disk, length, figures
        self.source, self.store = disk / "source", disk / "store"
        self.source.mkdir()
        self.store.mkdir()
        for at in range(64):
            self.write(at)

    def write(self, at: int) -> None:
        with open(self.source / f"part-{at:02}", "wb") as file:
            for _ in range(max(1, self.length // 64 // PIECE)):
                file.write(os.urandom(PIECE))

    def run(self, *arguments: str) -> tuple[float, dict]:
        start = time.perf_counter()
        command = [self.program, "snapshot", *arguments, "--store", f"file://{self.store}", "--json"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        return time.perf_counter() - start, json.loads(answer.stdout)

    def measure(self, rounds: int) -> None:
        restores, saves, seconds, of_bytes, prewarms = [], [], [], [], []
        memory, disk = f"host.bytes={self.length * 5 // 4}B", f"nvme.paths={self.disk}/nvme"
        daemon = Daemon(self.program, self.disk, f"file://{self.store}", memory, disk, f"nvme.bytes={self.length * 3}B")
        for round_number in range(rounds):
            shutil.rmtree(self.store)
            self.store.mkdir()
            plain_read(list(self.source.iterdir()))
            saved, _ = self.run("save", str(self.source), "--name", "m")
            saves.append((saved, fio(self.disk, "write", self.length)))
            # One file of 64 is more than 1%: the target is of what changed.
            self.write(round_number % 64)
            again, told = self.run("save", str(self.source), "--name", "m")
            seconds.append(again / saved)
            of_bytes.append(told["written_bytes"] / (told["bytes"] / 64))
            to = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm"))
            try:
                drop(self.store)
                restored, told = self.run("restore", "m", str(to / "m"))
                drop(self.store)
                read = plain_read([path for path in self.store.rglob("*") if path.is_file() and "chunks" in path.parts])
                best = min(read * told["read_bytes"] / self.stored(), fio(self.disk, "read", self.length))
                restores.append((restored, best, told["bytes"]))
            finally:
                shutil.rmtree(to)
            with daemon:
                daemon.prewarm("disk")
            with daemon:
                prewarmed, told = daemon.prewarm("memory")
            if told["read_bytes"]:
                raise RuntimeError(f"it came from the store: {told}")
            prewarms.append((prewarmed, best, told["bytes"]))
        self.figures.add("restore_of_fastest_read", median([best / own for own, best, _ in restores]), ">= 0.9")
        self.figures.add("prewarm_of_fastest_read", median([best / own for own, best, _ in prewarms]), ">= 0.9")
        self.figures.add("prewarm_gbps", median([length / own / 1e9 for own, _, length in prewarms]))
        self.figures.add("restore_gbps", median([length / own / 1e9 for own, _, length in restores]))
        self.figures.add("save_of_fio", median([peer / own for own, peer in saves]), ">= 0.8")
        self.figures.add("second_save_bytes_of_changed", median(of_bytes), "<= 1.5")
        self.figures.add("second_save_time_of_first", median(seconds), "<= 0.35")

    def stored(self) -> int:
        return sum(path.stat().st_size for path in self.store.rglob("*") if path.is_file() and "chunks" in path.parts)


class Models:
    def __init__(self, program: str, disk: pathlib.Path, length: int, figures: Figures):
        self.figures, self.disk, self.length, self.program = figures, disk, length, program
        self.folder, self.store = disk / "model", disk / "models"
        self.store.mkdir()
        self.url = f"file://{self.store}"
        self.cache = tempfile.mkdtemp(dir="/dev/shm", prefix="kvstore-bench-")
        self.child("make", str(length))

    def child(self, kind: str, *more: str) -> dict:
        command = [sys.executable, __file__, "--child", kind, str(self.folder), self.url, self.cache, *more]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def cold(self, kind: str) -> dict:
        drop(self.store if kind == "kvstore" else self.disk / "tensorizer" if kind == "tensorizer" else self.folder)
        return self.child(kind)

    def measure(self, rounds: int) -> None:
        memory = f"host.bytes={self.length * 3 // 2}B"
        with Daemon(self.program, self.disk, self.url, memory, "nvme.paths=off") as daemon:
            daemon.prewarm("memory")
            self.rounds(rounds, daemon.address)

    def rounds(self, rounds: int, address: str) -> None:
        times: dict[str, list[float]] = {}
        peaks = []
        logits = set()
        weights = sorted(self.folder.glob("*.safetensors"))
        for _ in range(rounds):
            drop(self.folder)
            times.setdefault("read", []).append(plain_read(weights))
            for kind in ("kvstore", *PEERS):
                told = self.cold(kind)
                times.setdefault(kind, []).append(told["seconds"])
                logits.add(told["logits"])
                if kind == "kvstore":
                    peaks.append(told["peak"] / told["bytes"])
            self.child("prewarm")
            for kind in ("prewarmed", "mapped", "safetensors"):
                told = self.child(kind, address)
                times.setdefault("warm" if kind == "safetensors" else kind, []).append(told["seconds"])
                logits.add(told["logits"])
        if len(logits) != 1:
            raise RuntimeError(f"logits differ: {logits}")
        best = min(median(times[kind]) for kind in PEERS)
        add = self.figures.add
        ratios = lambda one, other: median([mine / theirs for mine, theirs in zip(times[one], times[other])])
        add("cold_of_read", ratios("kvstore", "read"), "<= 1.15")
        add("cold_of_best_peer", median(times["kvstore"]) / best, "< 1")
        add("prewarmed_of_cold_from_pretrained", ratios("prewarmed", "from_pretrained"), "<= 0.2")
        add("prewarmed_of_warm_safetensors", ratios("prewarmed", "warm"), "<= 1.05")
        add("mapped_of_cold_from_pretrained", ratios("mapped", "from_pretrained"), "<= 0.2")
        add("mapped_of_warm_safetensors", ratios("mapped", "warm"), "<= 1.05")
        add("peak_of_model", median(peaks), "<= 1.1")
        for kind, seconds in times.items():
            add(f"{kind}_seconds", median(seconds))

    def close(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)


# ---- In a child: one way to get a model, and its first forward pass


def peak() -> int:
    """The most that this process had in memory, files that it maps included."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def make(folder: pathlib.Path, url: str, length: int) -> None:
    import torch
    import transformers

    import kvstore.snapshots

    layer = dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_key_value_heads=8, vocab_size=16384)
    per_layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 5632)
    config = transformers.LlamaConfig(**layer, num_hidden_layers=max(1, length // per_layer))
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100GB")
    torch.save(model.state_dict(), folder / "model.pth")
    weights = folder.parent / "weights"
    weights.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(folder / name, weights / name)
    kvstore.snapshots.Store(url).save(weights, name="m")
    shutil.rmtree(weights)
    from tensorizer import TensorSerializer

    (folder.parent / "tensorizer").mkdir()
    serializer = TensorSerializer(str(folder.parent / "tensorizer" / "model.tensors"))
    serializer.write_state_dict(model.state_dict())
    serializer.close()


def state_of(kind: str, folder: pathlib.Path) -> dict:
    import torch

    file = str(folder / "model.safetensors")
    if kind == "torch_load":
        return torch.load(folder / "model.pth", mmap=True, weights_only=True)
    if kind == "safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    if kind == "runai":
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_file(file)
            # The streamer's buffers are used again: each tensor is kept.
            return {name: tensor.clone() for name, tensor in streamer.get_tensors()}
    if kind == "fastsafetensors":
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
        loader.add_filenames({0: [file]})
        buffer = loader.copy_files_to_device()
        state_of.kept = (loader, buffer)
        return {name: buffer.get_tensor(name) for name in loader.get_keys()}
    from tensorizer import TensorDeserializer

    return dict(TensorDeserializer(str(folder.parent / "tensorizer" / "model.tensors"), device="cpu", plaid_mode=False))


def child(kind: str, folder: pathlib.Path, url: str, cache_folder: str, *more: str) -> dict:
    import torch
    import transformers

    import kvstore.snapshots
    import kvstore.weights

    cache = kvstore.snapshots.Cache(cache_folder, "16GiB")
    if kind == "make":
        make(folder, url, int(more[0]))
        return {}
    if kind == "prewarm":
        kvstore.weights.hold("m", store=url, cache=cache)
        return {}
    auto = transformers.AutoModelForCausalLM
    before, start = peak(), time.perf_counter()
    if kind == "kvstore":
        model = kvstore.weights.load(auto, "m", store=url, cache=False, dtype="auto")
    elif kind == "prewarmed":
        model = kvstore.weights.load(auto, "m", store=url, cache=cache, dtype="auto")
    elif kind == "mapped":
        store = kvstore.snapshots.Store(url, daemon=more[0])
        model = kvstore.weights.load(auto, "m", store=store, cache=False, dtype="auto")
    elif kind == "from_pretrained":
        model = auto.from_pretrained(folder, dtype="auto")
    else:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state_of(kind, folder), dtype="auto"
        )
    with torch.no_grad():
        logits = model(torch.arange(1, 17)[None]).logits
    seconds = time.perf_counter() - start
    length = sum(one.nbytes for one in model.state_dict().values())
    told = logits.float().double()
    return {"seconds": seconds, "logits": repr(told.sum().item()), "peak": peak() - before, "bytes": length}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="kvstore", help="the program (%(default)s)")
    parser.add_argument("--disk", default=".", help="a folder on the disk that is measured (%(default)s)")
    parser.add_argument("--folder-bytes", type=int, default=4 << 30, help="bytes of the folder (%(default)s)")
    parser.add_argument("--model-bytes", type=int, default=2 << 30, help="bytes of the model, about (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures = Figures("snapshots", options.rounds)
    with tempfile.TemporaryDirectory(dir=options.disk) as disk:
        Folders(options.program, pathlib.Path(disk), options.folder_bytes, figures).measure(options.rounds)
    with tempfile.TemporaryDirectory(dir=options.disk) as disk:
        models = Models(options.program, pathlib.Path(disk), options.model_bytes, figures)
        try:
            models.measure(options.rounds)
        finally:
            models.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], pathlib.Path(sys.argv[3]), *sys.argv[4:])))
    else:
        main()
