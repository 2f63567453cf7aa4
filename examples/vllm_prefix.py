"""Runs two engines, one after the other. The second engine reads the blocks that the first engine computed.

Install vLLM and the kvstore package in one environment, and start the daemon with `kvstore serve`. Then run:

    python examples/vllm_prefix.py MODEL
"""

import multiprocessing
import sys
import time


def engine(model: str, name: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model,
        # The script uses token ids instead of text, so it works with any model.
        skip_tokenizer_init=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KvStoreConnector",
            kv_connector_module_path="kvstore.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        ),
    )
    tokens = [10 + at * at % 500 for at in range(1500)]
    begun = time.perf_counter()
    (output,) = llm.generate([{"prompt_token_ids": tokens}], SamplingParams(temperature=0, max_tokens=1, detokenize=False))
    seconds = time.perf_counter() - begun
    print(f"{name}: {output.num_cached_tokens} of {len(tokens)} tokens came from the store, first token after {seconds:.2f} s")
    # Give the connector time to save blocks in the background.
    time.sleep(2)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for name in ("first engine", "second engine"):
        process = multiprocessing.get_context("spawn").Process(target=engine, args=(sys.argv[1], name))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
