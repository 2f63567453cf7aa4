"""kill -9 in the middle of an answer, and the answer goes on in another process.

Install torch, transformers and the kvstore package in one environment. No daemon is needed. Then run:

    python examples/sessions.py
"""

import multiprocessing
import os
import signal
import tempfile

PROMPT = [10 + at * at % 500 for at in range(200)]


def make(folder: str) -> None:
    import torch
    import transformers

    torch.manual_seed(7)
    size = dict(vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8)
    config = transformers.LlamaConfig(**size, initializer_range=0.1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def answer(folder: str, store: str, session: str, has: list[int], told) -> None:
    import transformers

    import kvstore.sessions

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    worker = kvstore.sessions.Worker(model, store)
    if has:
        going = worker.resume(session, have=len(has))
    else:
        going = worker.generate(
            PROMPT, session=session, seed=1, max_new_tokens=60, do_sample=True, top_k=50, eos_token_id=None, pad_token_id=0
        )
    for tokens in going:
        told.send((going.prefilled, tokens))
    told.send(None)


def run(folder: str, store: str, session: str, has: list[int], kill_after: int | None = None) -> None:
    """Lets a process answer, and adds to ``has`` what it says; kills it after so many tokens."""
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(folder, store, session, has, tell))
    process.start()
    tell.close()
    try:
        while (message := told.recv()) is not None:
            prefilled, tokens = message
            has += tokens
            print(f"  process {process.pid}: {len(has)} tokens, {prefilled or 0} computed again")
            if kill_after is not None and len(has) >= kill_after:
                print(f"  kill -9 {process.pid}")
                os.kill(process.pid, signal.SIGKILL)
                kill_after = None
    except EOFError:
        pass
    process.join()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, store = f"{folder}/model", f"file://{folder}/bucket"
        os.mkdir(f"{folder}/bucket")
        make(model)
        print("An answer that nothing ends:")
        whole: list[int] = []
        run(model, store, "whole", whole)
        print("The same, killed after 20 tokens:")
        parts: list[int] = []
        run(model, store, "parts", parts, kill_after=20)
        print("Another process goes on:")
        run(model, store, "parts", parts)
        print("The tokens are the same." if parts == whole else "The tokens differ!")


if __name__ == "__main__":
    main()
