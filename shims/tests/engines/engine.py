"""vLLM engines in processes of their own. Importing vLLM takes half a minute: one process does that, and forks a child for
every engine, which a test talks to over a socket.

Run as a program, this is that process.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

ENVIRONMENT = dict(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    TOKENIZERS_PARALLELISM="false",
    # Nothing is compiled: a compiler need not be there.
    TORCHDYNAMO_DISABLE="1",
)


class Output(NamedTuple):
    """What became of a prompt: its tokens, how many of the prompt's came from a cache, and what a decode worker is told."""

    tokens: list[int]
    cached: int
    handed_over: dict | None


class Engine:
    """One engine, in a child of the zygote."""

    def __init__(self, connection: socket.socket, log: pathlib.Path):
        self._connection, self._reader, self.log = connection, connection.makefile("r"), log
        self.pid = json.loads(self._line())["pid"]

    def _line(self) -> str:
        line = self._reader.readline()
        if not line:
            raise EOFError(f"the engine ended; its last words:\n{self.log.read_text()[-4000:]}")
        return line

    def start(self, command: str, **arguments) -> None:
        """Sends a command without waiting for its answer."""
        self._connection.sendall((json.dumps(dict(command=command, **arguments)) + "\n").encode())

    def answer(self):
        """The answer to the last command."""
        answer = json.loads(self._line())
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}\n{self.log.read_text()[-4000:]}")
        return answer["value"]

    def call(self, command: str, **arguments):
        self.start(command, **arguments)
        return self.answer()

    def generate(self, prompts: list[list[int]], max_tokens: int = 8, **more) -> list[Output]:
        """Each prompt's continuation: greedy, so that the same state gives the same tokens."""
        return [Output(*output) for output in self.call("generate", prompts=prompts, max_tokens=max_tokens, **more)]

    def counts(self) -> dict[str, float]:
        """The connector's counts since the engine began."""
        return self.call("counts")

    def until_saved(self, blocks: int, seconds: float = 120.0) -> None:
        """Until so many blocks have been saved, or were there."""
        until = time.monotonic() + seconds
        while (counts := self.counts()).get("saved_blocks", 0) + counts.get("present_blocks", 0) < blocks:
            assert time.monotonic() < until, counts
            time.sleep(0.02)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Ends the engine, as its user would."""
        try:
            self._connection.shutdown(socket.SHUT_WR)
            while self._reader.readline():
                pass
        except OSError:
            pass
        self._connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()


class Zygote:
    """The process that has imported vLLM."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._engines = folder, 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._path = str(folder / "engines.sock")
        self._listener.bind(self._path)
        self._listener.listen()
        self._listener.settimeout(300)
        self._log = open(folder / "zygote.log", "w")
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._path],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            text=True,
        )

    def engine(
        self,
        model: pathlib.Path,
        address: str | None = None,
        *,
        role: str = "kv_both",
        extra: dict | None = None,
        connector: dict | None = None,
        encoder: dict | None = None,
        environment: dict | None = None,
        **arguments,
    ) -> Engine:
        """An engine; with the connector to the daemon at `address`, where there is one, or another `connector`. `extra` are
        the connector's settings. `encoder`: the role, the address and settings of the connector of encoder outputs."""
        self._engines += 1
        log = self._folder / f"engine-{self._engines}.log"
        if address:
            ours = dict(kv_connector="KvStoreConnector", kv_connector_module_path="kvstore.vllm", kv_role=role)
            # The defaults are short, for steps are; on a busy machine a late answer would be a miss, which is not what is tested.
            patient = dict(lookup_deadline=30.0, deadline=60.0)
            connector = dict(ours, extra=dict(address=address, **(patient | (extra or {}))))
        spec = dict(model=str(model), connector=connector, encoder=encoder, arguments=arguments)
        spec |= dict(log=str(log), environment=environment or {})
        self._process.stdin.write(json.dumps(spec) + "\n")
        self._process.stdin.flush()
        connection, _ = self._listener.accept()
        return Engine(connection, log)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


# -------------------------------------------------------------------- in the processes


def build(spec: dict):
    from vllm import LLM
    from vllm.config import ECTransferConfig, KVTransferConfig

    transfer = encoder = None
    if spec["encoder"]:
        encoder = ECTransferConfig(
            ec_connector="KvStoreEncoderConnector",
            ec_connector_module_path="kvstore.vllm",
            ec_role=spec["encoder"].pop("role"),
            ec_connector_extra_config=spec["encoder"],
        )
    if spec["connector"]:
        more = dict(kv_role="kv_both", kv_load_failure_policy="recompute")
        more["kv_connector_extra_config"] = spec["connector"].pop("extra")
        more.update(spec["connector"])
        transfer = KVTransferConfig(**more)
    defaults = dict(max_model_len=2048, dtype="float32", block_size=32, disable_log_stats=False, enable_prefix_caching=True)
    return LLM(
        model=spec["model"],
        # A model with pictures needs its tokenizer.
        skip_tokenizer_init="llava" not in spec["model"],
        enforce_eager=True,
        kv_transfer_config=transfer,
        ec_transfer_config=encoder,
        **{**defaults, **spec["arguments"]},
    )


def count_into(counts: dict) -> None:
    """Adds up what the connector reports."""
    from kvstore.vllm import connector

    report = connector.KvStoreConnector.get_kv_connector_stats

    def counting(self):
        stats = report(self)
        for name, count in (stats.data if stats else {}).items():
            counts[name] = counts.get(name, 0) + count
        return stats

    connector.KvStoreConnector.get_kv_connector_stats = counting


def count_encoded(counts: dict) -> None:
    """Counts the pictures that this process encodes."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    execute = GPUModelRunner._execute_mm_encoder

    def counting(self, *arguments, **more):
        outputs = execute(self, *arguments, **more)
        counts["encoded"] = counts.get("encoded", 0) + len(outputs)
        return outputs

    GPUModelRunner._execute_mm_encoder = counting


def be_patient() -> None:
    """What a prefill worker hands over is waited for as long as a busy machine needs to save it."""
    from kvstore.vllm import scheduler

    scheduler.HAND_OVER_SECONDS = 60.0


def picture(seed: int):
    """A picture of noise."""
    import numpy
    from PIL import Image

    from models import PICTURE_SIZE

    pixels = numpy.random.default_rng(seed).integers(0, 255, (PICTURE_SIZE, PICTURE_SIZE, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def zero_saves() -> None:
    """From here on this process stores zeros in the place of what it computes."""
    import kvstore

    def put_zeros(self, hashes, pages, numbers, **more):
        return self.put_from(hashes, [bytes(pages.block_bytes) for _ in numbers], **more)

    kvstore.Group.put_pages = put_zeros


def zero_outputs() -> None:
    """From here on this process stores zeros in the place of the pictures it encodes."""
    from kvstore.vllm.encoder import Items

    put = Items.put
    Items.put = lambda self, identifier, output, level: put(self, identifier, output * 0, level)


def break_loads() -> None:
    """From here on no load of this process can begin, whatever look-ups promise."""
    import kvstore

    def fail(self, hashes, pages, numbers):
        raise kvstore.Busy("busy: for ever")

    kvstore.Group.start_get_pages = fail


def generate(llm, request: dict) -> list:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(
        temperature=0,
        max_tokens=request["max_tokens"],
        detokenize=False,
        ignore_eos=True,
        extra_args={"kv_transfer_params": request["hand_over"]} if "hand_over" in request else None,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    if "pictures" in request:
        data = [{"image": [picture(seed) for seed in seeds]} for seeds in request["pictures"]]
        prompts = [dict(prompt, multi_modal_data=pictures) for prompt, pictures in zip(prompts, data)]
    if "salt" in request:
        prompts = [dict(prompt, cache_salt=request["salt"]) for prompt in prompts]
    lora = LoRARequest(*request["adapter"]) if "adapter" in request else None
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
    return [(list(output.outputs[0].token_ids), output.num_cached_tokens or 0, output.kv_transfer_params) for output in outputs]


def give_up(llm, request: dict) -> None:
    """Takes prompts, makes some steps, and gives the prompts up."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    names = [f"given up {at}" for at in range(len(request["prompts"]))]
    for name, prompt in zip(names, request["prompts"]):
        engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=64, detokenize=False))
    for _ in range(request["steps"]):
        engine.step()
    engine.abort_request(names)


def step_once(llm) -> None:
    """One more step of the engine's loop, where nobody else makes them: it reports what was done since the last."""
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        llm.llm_engine.engine_core.get_output()


def serve(spec: dict, path: str) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    send = lambda value: connection.sendall((json.dumps(value) + "\n").encode())
    send(dict(pid=os.getpid()))
    counts: dict[str, float] = {}
    count_into(counts)
    count_encoded(counts)
    be_patient()
    llm = None
    for line in connection.makefile("r"):
        request = json.loads(line)
        try:
            if request["command"] in ("zero_saves", "break_loads", "zero_outputs"):
                value = globals()[request["command"]]()
            else:
                llm = llm or build(spec)
                value = run(llm, request, counts)
            send(dict(value=value))
        except Exception as error:
            import traceback

            traceback.print_exc()
            send(dict(error=f"{type(error).__name__}: {error}"))
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()


def run(llm, request: dict, counts: dict):
    match request["command"]:
        case "build":
            return None
        case "generate":
            return generate(llm, request)
        case "counts":
            step_once(llm)
            return counts
        case "time":
            begun = time.perf_counter()
            outputs = generate(llm, request)
            return time.perf_counter() - begun, outputs[0][1]
        case "give_up":
            return give_up(llm, request)
        case "free_blocks":
            step_once(llm)
            return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        case "metric":
            return sum(metric.value for metric in llm.get_metrics() if metric.name == request["name"])
        case "reset":
            # Two ranks on two busy cores leave the daemon little time.
            end = time.monotonic() + 120
            while time.monotonic() < end:
                # Blocks that are being saved are in use.
                step_once(llm)
                if llm.reset_prefix_cache(reset_connector=request["connector"]):
                    return True
                time.sleep(0.05)
            return False
    raise ValueError(f"{request['command']}: no such command")


def main() -> None:
    import vllm  # noqa: F401
    import vllm.v1.engine.llm_engine  # noqa: F401
    import vllm.v1.worker.cpu_worker  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        spec = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(spec["environment"])
            try:
                serve(spec, sys.argv[1])
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
