"""Compile caches of running engines, and what they depend on: see the package."""

from __future__ import annotations

import argparse
import json
import sys

from kvstore import Error

from . import Caches, facts, folders

_EXAMPLES = """
examples:
  python -m kvstore.compiled ls                   # what engines of this user use
  python -m kvstore.compiled save llama-compiled  # what the engine that uses this name has compiled, while it runs
  python -m kvstore.compiled facts                # what a snapshot's facts must be, to be used here
"""


def _save(name: str) -> int:
    for path, told in folders.held():
        if told["name"] == name:
            saved = Caches(folders.Folder(path, -1, told)).save()
            print(f"{saved.id}: {saved.files} files, {saved.written_bytes} bytes written" if saved else "nothing new to save")
            return 0
    print(
        f"no engine of this user uses compile caches called {name!r}; python -m kvstore.compiled ls shows which it uses",
        file=sys.stderr,
    )
    return 1


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m kvstore.compiled", description=__doc__, epilog=_EXAMPLES, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("ls", help="show the private folders that engines of this user use")
    verbs.add_parser("facts", help="show the facts of this node and of this Python's packages, as JSON")
    save = verbs.add_parser("save", help="save what a running engine has compiled")
    save.add_argument("name", help="the name in its KVSTORE_COMPILE_CACHE")
    options = parser.parse_args()
    try:
        if options.verb == "save":
            return _save(options.name)
        if options.verb == "facts":
            print(json.dumps(facts.here(), indent=2))
        else:
            for path, told in folders.held():
                print(f"{told['name']}  restored from {told['id'] or 'nothing'}  {path}")
        return 0
    except (Error, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
