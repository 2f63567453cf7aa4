"""``python -m kvstore.launcher``: see the package."""

from __future__ import annotations

import argparse
import sys

from . import caps, wire

_EXAMPLES = """
examples:
  # In a service of its own, with the environment of its workers:
  python -m kvstore.launcher serve --import torch,transformers.models.llama.modeling_llama

  # In the place of `python serve_model.py --port 8000` and `python -m module`:
  python -m kvstore.launcher run -- serve_model.py --port 8000
  python -m kvstore.launcher run --else-cold -- -m module
"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m kvstore.launcher", description=__doc__, epilog=_EXAMPLES, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True)
    serve = verbs.add_parser("serve", help="import, and wait for requests", formatter_class=raw, epilog=_EXAMPLES)
    serve.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULES", help="modules, with commas between them"
    )
    serve.add_argument("--workers", type=int, default=caps.WORKERS_MAX, help="the most workers at once (%(default)s)")
    run = verbs.add_parser("run", help="run a program in a worker", formatter_class=raw, epilog=_EXAMPLES)
    run.add_argument(
        "--wait", type=float, default=caps.START_SECONDS, metavar="SECONDS", help="for the worker to start (%(default)s)"
    )
    run.add_argument(
        "--may-differ", action="append", default=[], metavar="NAMES", help="variables that may differ from the launcher's"
    )
    run.add_argument("--else-cold", action="store_true", help="without a launcher that takes it, run the program without one")
    run.add_argument("program", nargs=argparse.REMAINDER, help="-- SCRIPT, -m MODULE or -c COMMAND, and its arguments")
    for one in (serve, run):
        one.add_argument(
            "--socket", default=wire.default_path(), help="the launcher's socket, in a folder of this user's alone (%(default)s)"
        )
    return parser


def _names(told: list[str]) -> list[str]:
    return [name for one in told for name in one.split(",") if name]


def _program(parser: argparse.ArgumentParser, words: list[str]) -> tuple[str, str, list[str]]:
    words = words[1:] if words[:1] == ["--"] else words
    kind = {"-m": "module", "-c": "command"}.get(words[0] if words else "", "script")
    rest = words if kind == "script" else words[1:]
    if not rest or (kind == "script" and rest[0].startswith("-")):
        parser.error("name a program: -- SCRIPT, -- -m MODULE or -- -c COMMAND, and its arguments")
    return kind, rest[0], rest[1:]


def main() -> int:
    # A template is started by `serve` alone, and a worker's program is run from here: nothing may be left to do after it.
    if sys.argv[1:2] == ["template"]:
        from . import template

        listener, parent, workers, names = sys.argv[2:6]
        template.main(int(listener), int(parent), int(workers), _names([names]))
    parser = _parser()
    options = parser.parse_args()
    if options.verb == "serve":
        from . import serve

        if not _names(options.imports):
            parser.error("serve: --import names no module")
        if options.workers < 1:
            parser.error("serve: --workers is at least 1")
        return serve.serve(options.socket, _names(options.imports), options.workers)
    from . import client

    kind, what, arguments = _program(parser, options.program)
    asked = client.request(kind, what, arguments, _names(options.may_differ))
    cold = [{"module": "-m", "command": "-c"}[kind]] if kind != "script" else []
    return client.run(options.socket, asked, options.wait, [*cold, what, *arguments] if options.else_cold else None)


if __name__ == "__main__":
    sys.exit(main())
