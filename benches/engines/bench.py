"""vLLM on the CPU with the store and without, in one run, interleaved: `make bench-engines`.

Time to first token of a prompt of 2,000 tokens, of which the first 1,500 were seen before: from vLLM's own prefix cache; from
the store in memory; from the store's disk, after a daemon that was killed has started again; by vLLM's ExampleConnector (it
finds a prompt that was seen whole, and nothing less); and computed from nothing. Then a prompt that was seen whole. Then
throughput where nothing is reused. Every measure is of one engine that does nothing else; the other engines wait, and use no CPU time.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "shims/tests"), str(HERE.parent.parent / "shims/tests/engines")]

import models  # noqa: E402
from daemon import Daemon  # noqa: E402
from engine import Zygote  # noqa: E402
from figures import Figures  # noqa: E402

SHARED, WHOLE = 1500, 2000
# Blocks of the part that is shared.
BLOCKS = SHARED // 32


def prompt(seed: int, shared: int, tokens: int = WHOLE) -> list[int]:
    def token(at: int) -> int:
        return 3 + (at * at * 31 + at * 17 + (0 if at < shared else seed * 7919)) % (models.VOCABULARY - 3)

    return [token(at) for at in range(tokens)]


class Bench:
    def __init__(self, folder: pathlib.Path, rounds: int):
        self.rounds, self.figures = rounds, Figures("engines", rounds)
        self.daemon = Daemon(folder, f"nvme.paths={folder}/nvme", "nvme.bytes=4GiB", "host.bytes=1GiB")
        self.zygote = Zygote(folder)
        self.seed = 0
        big = models.make_large(folder)
        arguments = dict(max_model_len=4096, max_num_batched_tokens=4096)
        engine = lambda *more, **others: self.zygote.engine(big, *more, **arguments, **others)
        self.plain = engine(enable_prefix_caching=False)
        self.own = engine()
        self.ours = engine(self.daemon.address)
        example = dict(kv_connector="ExampleConnector", extra=dict(shared_storage_path=str(folder / "example")))
        self.example = engine(connector=example)
        self.engines = [self.plain, self.own, self.ours, self.example]

    def ttft(self, engine, tokens: list[int]) -> tuple[float, int]:
        seconds, cached = engine.call("time", prompts=[tokens], max_tokens=1)
        return seconds, cached

    def new(self, shared: int = SHARED) -> list[int]:
        self.seed += 1
        return prompt(self.seed, shared)

    def prefix(self) -> None:
        """The shared prefix, from everywhere."""
        first = self.new()
        self.own.generate([first], max_tokens=1)
        self.example.generate([first], max_tokens=1)
        self.ours.generate([first], max_tokens=1)
        self.ours.until_saved(WHOLE // 32)
        times: dict[str, list[float]] = {name: [] for name in ("recomputed", "example", "vllm", "host", "nvme")}
        for round_number in range(self.rounds + 1):
            got = {}
            got["vllm"], cached = self.ttft(self.own, self.new())
            assert cached == BLOCKS * 32, cached
            self.forget(self.ours)
            got["host"], cached = self.ttft(self.ours, self.new())
            assert cached == BLOCKS * 32, cached
            # What is written behind has been written by now.
            time.sleep(1.5)
            self.daemon.kill()
            self.daemon.start()
            self.forget(self.ours)
            # The engine notices by itself that there is another daemon: not a part of what is measured.
            time.sleep(1.2)
            self.ours.generate([prompt(1, 0, 40)], max_tokens=1)
            got["nvme"], cached = self.ttft(self.ours, self.new())
            assert cached == BLOCKS * 32, cached
            got["recomputed"], cached = self.ttft(self.plain, self.new())
            assert cached == 0
            self.forget(self.example)
            got["example"], cached = self.ttft(self.example, self.new())
            assert cached == 0
            # The first round warms up.
            if round_number:
                for name, seconds in got.items():
                    times[name].append(seconds)

        def ratio(name: str, of: str = "vllm") -> float:
            return statistics.median(one / other for one, other in zip(times[name], times[of]))

        self.figures.add("ttft_host_of_vllm_prefix_cache", ratio("host"), "<= 1.15")
        self.figures.add("ttft_nvme_of_vllm_prefix_cache", ratio("nvme"), "<= 1.3")
        self.figures.add("ttft_recomputed_of_vllm_prefix_cache", ratio("recomputed"))
        self.figures.add("ttft_example_connector_of_host", ratio("example", "host"), ">= 3")
        for name, seconds in times.items():
            self.figures.add(f"ttft_{name}_s", statistics.median(seconds))

    def forget(self, engine) -> None:
        assert engine.call("reset", connector=False)

    def whole(self) -> None:
        """A prompt that was seen whole."""
        sides = {"example_connector": self.example, "vllm": self.own, "ours": self.ours}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for round_number in range(self.rounds + 1):
            tokens = self.new(0)
            for engine in sides.values():
                engine.generate([tokens], max_tokens=1)
            time.sleep(0.5)
            for name, engine in sides.items():
                if name != "vllm":
                    self.forget(engine)
                seconds, cached = self.ttft(engine, tokens)
                assert cached >= 1900, (name, cached)
                if round_number:
                    times[name].append(seconds)
        for of in ("example_connector", "vllm"):
            ratio = statistics.median(other / ours for other, ours in zip(times[of], times["ours"]))
            self.figures.add(f"ttft_whole_prompt_{of}_of_ours", ratio)
        for name, seconds in times.items():
            self.figures.add(f"ttft_whole_prompt_{name}_s", statistics.median(seconds))

    def throughput(self) -> None:
        """Nothing is reused: what it costs to look for and to store everything. Four measures a round, in the order A B B A:
        the machine's clock wanders by more than what is measured."""
        ratios = []
        for round_number in range(2 * self.rounds + 1):
            seconds = {self.own: 0.0, self.ours: 0.0}
            pair = [self.own, self.ours]
            for engine in pair + pair[::-1] if round_number % 2 else pair[::-1] + pair:
                took, cached = engine.call("time", prompts=[self.new(0)[:400] for _ in range(8)], max_tokens=32)
                assert cached == 0
                seconds[engine] += took
            if round_number:
                ratios.append(seconds[self.own] / seconds[self.ours])
        self.figures.add("throughput_without_reuse_of_without_connector", statistics.median(ratios), ">= 0.97")

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self.zygote.close()
        self.daemon.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pathlib.Path(folder), arguments.rounds)
        try:
            bench.prefix()
            bench.whole()
            bench.throughput()
        finally:
            bench.close()


if __name__ == "__main__":
    main()
