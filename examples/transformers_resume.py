"""A generation that goes on in another process, at the next token.

Needs transformers and the kvstore package in one environment, and a daemon: `kvstore serve`.

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
    print(f"first process: {whole[0, 200:].tolist()}")
    print(f"               {half.sequences[0, 200:].tolist()}, and its state is in the store")


def go_on(model_name: str) -> None:
    import transformers

    import kvstore.transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_name)
    state = kvstore.transformers.attach(model).load_state("example")
    if state is None:
        sys.exit("the state has left the store")
    rest = model.generate(**state.inputs(), max_new_tokens=10, do_sample=False)
    print(f"another one:   {rest[0, 200:].tolist()}")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for step in (begin, go_on):
        process = multiprocessing.get_context("spawn").Process(target=step, args=(sys.argv[1],))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
