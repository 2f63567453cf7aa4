"""One process starts a generation. A second process continues it at the next token.

Install transformers and the kvstore package in one environment, and start the daemon with `kvstore serve`. Then run:

    python examples/transformers_resume.py MODEL
"""

import multiprocessing
import sys


def begin(model_name: str) -> None:
    import torch
    import transformers

    import kvstore.transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_name)
    attached = kvstore.transformers.attach(model)
    tokens = torch.tensor([[10 + at * at % 500 for at in range(200)]])
    whole = model.generate(tokens, max_new_tokens=20, do_sample=False)
    half = model.generate(tokens, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    attached.save_state("example", half)
    print(f"first process, all 20 tokens:       {whole[0, 200:].tolist()}")
    print(f"first process, 10 tokens and saved: {half.sequences[0, 200:].tolist()}")


def go_on(model_name: str) -> None:
    import transformers

    import kvstore.transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_name)
    state = kvstore.transformers.attach(model).load_state("example")
    if state is None:
        sys.exit("the store no longer has the state")
    rest = model.generate(**state.inputs(), max_new_tokens=10, do_sample=False)
    print(f"second process, all 20 tokens:      {rest[0, 200:].tolist()}")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for step in (begin, go_on):
        process = multiprocessing.get_context("spawn").Process(target=step, args=(sys.argv[1],))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
