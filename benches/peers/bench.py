"""Gets and puts from Python beside Mooncake Store and Redis, in one run, interleaved: `make bench-peers`.

Every side moves blocks between memory of this process and its store, with the calls that its users would take: ours
`get_into`/`put_from`; Mooncake's `get_into`/`put_from` on registered memory, once with the store's segment in this process (local:
it copies) and once in another (cross-process: its TCP transport on loopback); redis-py's `get` and `set` over a Unix socket. A block
a call; and, as `batch`, all blocks of a round in one call (`batch_get_into`/`batch_put_from`, `mget` and a pipeline). Rounds
alternate who goes first; ratios are medians of rounds.

Last, the first pass through memory that the store did not touch yet, and one through memory that was all used, in a fresh process of each
side.
"""

import argparse
import hashlib
import mmap
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import numpy

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from figures import Figures  # noqa: E402

SIZES = {"64KiB": 64 << 10, "1MiB": 1 << 20, "4MiB": 4 << 20}
BYTES_PER_ROUND = 64 << 20
# A pass through most of a store of 4 GiB, in blocks of 1 MiB.
PASS_BLOCKS = 3600
SEGMENT = 4 << 30
PASS_ROUNDS = 5
SOURCE = numpy.random.default_rng(7).integers(0, 256, BYTES_PER_ROUND, dtype=numpy.uint8)
INTO = numpy.ones(BYTES_PER_ROUND, dtype=numpy.uint8)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def timed(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Ours:
    name = "kvstore"

    def __init__(self, daemon, folder, host_bytes="2GiB"):
        import kvstore

        self.address = f"unix:{folder}/bench.sock"
        command = [daemon, "serve", "--listen", self.address, "--host-bytes", host_bytes]
        command += ["--set", "http.address=off", "--set", "nvme.paths=off", "--set", "log.level=error"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(1000):
            try:
                self.client = kvstore.Client(self.address, plane="local")
                break
            except kvstore.Unavailable:
                time.sleep(0.01)
        self.kvstore = kvstore
        self.groups = {}

    def prepare(self, size, source, into):
        if size not in self.groups:
            group = self.kvstore.LayerGroup(layers=1, planes=1, heads=1, head_bytes=size // 16)
            layout = self.client.register_layout("bench", dtype="uint8", block_tokens=16, groups=[group])
            self.groups[size] = layout.group()
        self.group, self.source, self.into = self.groups[size], list(source), list(into)

    def put(self, keys, batch):
        names = [hashlib.sha256(key.encode()).digest() for key in keys]

        def each():
            for name, block in zip(names, self.source):
                self._check(self.group.put_from([name], [block]))

        return timed(lambda: self._check(self.group.put_from(names, self.source)) if batch else each())

    @staticmethod
    def _check(results):
        assert all(result.status == "stored" for result in results), results

    def get(self, keys, batch):
        names = [hashlib.sha256(key.encode()).digest() for key in keys]

        def work():
            if batch:
                assert self.group.get_into(names, self.into) == len(names)
                return
            for name, into in zip(names, self.into):
                assert self.group.get_into([name], [into]) == 1

        return timed(work)

    def remove(self, keys):
        self.group.delete([hashlib.sha256(key.encode()).digest() for key in keys])
        # Slots of deleted blocks come back with the daemon's next tick.
        time.sleep(0.12)

    def stop(self):
        self.process.kill()
        self.process.wait()


class Redis:
    name = "redis"

    def __init__(self, folder):
        import redis

        path = f"{folder}/redis.sock"
        command = ["redis-server", "--port", "0", "--save", "", "--appendonly", "no", "--unixsocket", path]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not os.path.exists(path):
            time.sleep(0.01)
        self.client = redis.Redis(unix_socket_path=path)

    def prepare(self, size, source, into):
        # redis-py takes bytes-like values; what comes back is copied to where it is wanted.
        self.source, self.into = [memoryview(block) for block in source], list(into)

    def put(self, keys, batch):
        def work():
            if not batch:
                for key, block in zip(keys, self.source):
                    assert self.client.set(key, block)
                return
            pipe = self.client.pipeline(transaction=False)
            for key, block in zip(keys, self.source):
                pipe.set(key, block)
            assert all(pipe.execute())

        return timed(work)

    def get(self, keys, batch):
        def work():
            values = self.client.mget(keys) if batch else map(self.client.get, keys)
            for value, into in zip(values, self.into):
                into[:] = numpy.frombuffer(value, dtype=numpy.uint8)

        return timed(work)

    def remove(self, keys):
        self.client.delete(*keys)

    def stop(self):
        self.process.kill()
        self.process.wait()


class Mooncake:
    """`local`: the segment is in this process. Else in another, reached over TCP."""

    def __init__(self, local):
        from mooncake.store import MooncakeDistributedStore

        self.name = "mooncake_local" if local else "mooncake_tcp"
        port, metrics = free_port(), free_port()
        self.processes = [
            self._spawn(
                [
                    shutil.which("mooncake_master") or str(pathlib.Path(sys.executable).parent / "mooncake_master"),
                    f"--rpc_port={port}",
                    f"--metrics_port={metrics}",
                ]
            )
        ]
        time.sleep(2)
        master = f"127.0.0.1:{port}"
        if not local:
            self.processes.append(self._spawn([sys.executable, __file__, "--mooncake-segment", master]))
            time.sleep(4)
        self.store = MooncakeDistributedStore()
        segment = SEGMENT if local else 0
        status = self.store.setup("127.0.0.1", "P2PHANDSHAKE", segment, 512 << 20, "tcp", "", master)
        assert status == 0, f"mooncake's setup answers {status}"
        self.registered = set()

    @staticmethod
    def _spawn(command):
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def prepare(self, size, source, into):
        for array in (source, into):
            if array.ctypes.data not in self.registered:
                assert self.store.register_buffer(array.ctypes.data, array.nbytes) == 0
                self.registered.add(array.ctypes.data)
        self.size, self.source, self.into = size, source, into

    def put(self, keys, batch):
        pointers = [self.source[at].ctypes.data for at in range(len(keys))]
        sizes = [self.size] * len(keys)

        def work():
            if not batch:
                for key, pointer in zip(keys, pointers):
                    assert self.store.put_from(key, pointer, self.size) == 0
                return
            statuses = self.store.batch_put_from(keys, pointers, sizes)
            assert all(status == 0 for status in statuses), statuses

        return timed(work)

    def get(self, keys, batch):
        pointers = [self.into[at].ctypes.data for at in range(len(keys))]
        sizes = [self.size] * len(keys)

        def work():
            if not batch:
                for key, pointer in zip(keys, pointers):
                    assert self.store.get_into(key, pointer, self.size) == self.size
                return
            got = self.store.batch_get_into(keys, pointers, sizes)
            assert all(size == self.size for size in got), got

        return timed(work)

    def remove(self, keys):
        for key in keys:
            # A lease of some seconds may keep it: eviction takes it later.
            self.store.remove(key)

    def stop(self):
        self.store.close()
        for process in self.processes:
            process.kill()
            process.wait()


def serve_segment(master):
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 4 << 30, 64 << 20, "tcp", "", master) == 0
    while True:
        time.sleep(3600)


def leases(ours, figures, rounds):
    """Look-up, lease and release from Python, without a copy."""
    names = [hashlib.sha256(f"prefix {at}".encode()).digest() for at in range(256)]
    ours.prepare(64 << 10, numpy.zeros((1, 64 << 10), dtype=numpy.uint8), numpy.zeros((1, 64 << 10), dtype=numpy.uint8))
    group = ours.group
    group.put_from(names, numpy.zeros((256, 64 << 10), dtype=numpy.uint8))
    one, singles, prefixes = [names[7]], [], []
    for _ in range(rounds):
        turns = []
        for _ in range(5000):
            started = time.perf_counter_ns()
            leased = group.leases(one)
            del leased
            turns.append(time.perf_counter_ns() - started)
        singles.append(statistics.median(turns) / 1e3)
        turns = []
        for _ in range(500):
            started = time.perf_counter_ns()
            leased = group.leases(names)
            assert len(leased) == 256
            del leased
            turns.append(time.perf_counter_ns() - started)
        prefixes.append(statistics.median(turns) / 256)
    figures.add("python_lease_one_block_p50_us", statistics.median(singles), "<= 5")
    figures.add("python_lease_prefix_of_256_ns_a_block", statistics.median(prefixes), "<= 300")


TARGETS = {"mooncake_local": ">= 3", "mooncake_tcp": ">= 8", "redis": ">= 8"}


def compare(ours, peers, figures, rounds, batch):
    infix = "batch_" if batch else ""
    for label, size in SIZES.items():
        count = BYTES_PER_ROUND // size
        # The same memory throughout: Mooncake has it registered.
        source, into = SOURCE.reshape(count, size), INTO.reshape(count, size)
        sides = [ours, *peers]
        times = {side.name: {"put": [], "get": []} for side in sides}
        for side in sides:
            side.prepare(size, source, into)
        for turn in range(rounds + 1):
            order = sides[turn % len(sides) :] + sides[: turn % len(sides)]
            keys = [f"{infix}{label}-{turn}-{at}" for at in range(count)]
            put = {side.name: side.put(keys, batch) for side in order}
            got = {}
            for side in order:
                into[:] = 1
                got[side.name] = side.get(keys, batch)
                assert numpy.array_equal(into, source), f"{side.name} gave other bytes"
            for side in order:
                side.remove(keys)
                # The first round warms up.
                if turn:
                    times[side.name]["put"].append(put[side.name])
                    times[side.name]["get"].append(got[side.name])
        for verb in ("get", "put"):
            for side in sides:
                gbps = count * size / statistics.median(times[side.name][verb]) / 1e9
                figures.add(f"{verb}_{infix}{label}_{side.name}_gbps", gbps)
            for side in peers:
                pairs = zip(times[side.name][verb], times[ours.name][verb])
                ratio = statistics.median(a / b for a, b in pairs)
                figures.add(f"{verb}_{infix}{label}_of_{side.name}", ratio, "none" if batch else TARGETS[side.name])


class Warm:
    """Memory that the machine has: where it is virtual, memory that was free for seconds is its host's, and to get it back takes longer
    than to clear it. It is given up just before a side takes as much."""

    def __init__(self, size):
        self.memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.given = 0
        for at in range(0, size, 4096):
            self.memory[at] = 1

    def give(self, size):
        size = min(size, len(self.memory) - self.given)
        if size:
            self.memory.madvise(mmap.MADV_DONTNEED, self.given, size)
            self.given += size


def pass_through(side, warm):
    """Prints the GB/s of the first pass through a fresh store's memory, and of one through memory that was all used; a put at a time."""
    size = 1 << 20
    count = BYTES_PER_ROUND // size
    side.prepare(size, SOURCE.reshape(count, size), INTO.reshape(count, size))
    # The second pass uses what the first left of the memory.
    for turn in range(3):
        seconds = 0
        for at in range(0, PASS_BLOCKS, count):
            warm.give(BYTES_PER_ROUND)
            seconds += side.put([f"pass-{turn}-{at + one}" for one in range(count)], False)
        if turn != 1:
            print(PASS_BLOCKS // count * count * size / seconds / 1e9, flush=True)
        side.remove([f"pass-{turn}-{at}" for at in range(PASS_BLOCKS // count * count)])


def first_pass(daemon, figures):
    """Each side in a process of its own, so that none finds memory that another has touched."""
    gbps = {side: [] for side in ("kvstore", "mooncake_local")}
    for turn in range(PASS_ROUNDS):
        for side in sorted(gbps, reverse=turn % 2 == 1):
            command = [sys.executable, __file__, "--daemon", daemon, "--pass-through", side]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            gbps[side].append([float(line) for line in said.splitlines()])
    for at, name in enumerate(("first", "steady")):
        for side, turns in gbps.items():
            figures.add(f"{name}_pass_{side}_gbps", statistics.median(turn[at] for turn in turns))
        ratios = [ours[at] / theirs[at] for ours, theirs in zip(gbps["kvstore"], gbps["mooncake_local"])]
        figures.add(f"{name}_pass_of_mooncake_local", statistics.median(ratios), ">= 3.5")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--daemon", default="kvstore")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mooncake-segment", help=argparse.SUPPRESS)
    parser.add_argument("--pass-through", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mooncake_segment:
        serve_segment(arguments.mooncake_segment)
    # Its fastest way within a process.
    os.environ.setdefault("MC_STORE_MEMCPY", "1")
    os.environ.setdefault("GLOG_minloglevel", "2")
    if arguments.pass_through:
        warm = Warm(SEGMENT)
        with tempfile.TemporaryDirectory() as folder:
            if arguments.pass_through == "kvstore":
                import kvstore  # noqa: F401

                # Its daemon begins to make memory ready when it starts.
                warm.give(SEGMENT)
                side = Ours(arguments.daemon, folder, "4GiB")
            else:
                side = Mooncake(local=True)
            try:
                pass_through(side, warm)
            finally:
                side.stop()
        return
    figures = Figures("peers", arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(arguments.daemon, folder)
        peers = []
        try:
            peers += [Redis(folder), Mooncake(local=True), Mooncake(local=False)]
            leases(ours, figures, arguments.rounds)
            compare(ours, peers, figures, arguments.rounds, batch=False)
            compare(ours, peers, figures, arguments.rounds, batch=True)
        finally:
            for side in [ours, *peers]:
                side.stop()
    first_pass(arguments.daemon, figures)


if __name__ == "__main__":
    main()
    # What a peer leaves running in this process must not keep it.
    sys.stdout.flush()
    os._exit(0)
