"""The router's prompts beside those of vLLM and SGLang, byte for byte, on the chat templates that published packages ship.

`make test-templates` runs it. Every template gets a table of conversations, by construct, and some that are made at random. Templates that
are made at random from the constructs of real ones follow.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import collect
import conversations
import grammar
import random_conversations
import sglang_side
import tokens
import vllm_side

SEED = 20261130
RANDOM_CONVERSATIONS = 2000
RANDOM_TEMPLATES = 2000
EQUAL_MIN = 0.995
AGENT_MIN = 0.98
AGENT = "agent's second turn"
RANDOM = "random conversations"
# Where the day is another than in UTC: a clock of another zone shows.
ZONE = "Pacific/Kiritimati" if time.gmtime().tm_hour >= 10 else "Pacific/Pago_Pago"
# Clocks of the two sides are read a moment apart: where a template reads them, both are asked again.
TRIES = 3
CLOCKS = ("strftime_now", "now(", "today")
SIDES = {"vllm": vllm_side.Engine, "sglang": sglang_side.Engine}
NAMES = {"vllm": "vLLM", "sglang": "SGLang"}


class Router:
    """The router's program: a line for each request, and a line for each answer."""

    def __init__(self, program):
        self.program, self.process = program, None

    def ask(self, engine, folder, body):
        if self.process is None:
            self.process = subprocess.Popen(
                [self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        self.process.stdin.write(
            json.dumps({"engine": engine, "folder": str(folder), "request": body}, ensure_ascii=False) + "\n"
        )
        self.process.stdin.flush()
        if line := self.process.stdout.readline():
            return json.loads(line)
        # It must never panic, whatever the template: that is as wrong as another text.
        self.process.wait()
        self.process = None
        return {"text": "(the router's program ended)", "problem": None}


def judged(engine, router, template, folder, body):
    """What came of one request, and what of it is worth keeping. `engine`: its name, and its side."""
    name, engine = engine
    tries = TRIES if any(word in template for word in CLOCKS) else 1
    for _ in range(tries):
        want, refused = engine.prompt(body)
        got = router.ask(name, folder, body)
        if want is None:
            return ("refused, yet made" if "text" in got else "refused"), {"engine": refused, **got}
        if "text" not in got:
            return "not known", {"engine": want, **got}
        if got["text"] == want:
            return "equal", None
    return "wrong", {"engine": want, **got}


def planned(count, seed):
    """The requests of each template."""
    out = [conversations.table() for _ in range(count)]
    source = random.Random(seed)
    for at in range(RANDOM_CONVERSATIONS):
        out[at % count].append((RANDOM, random_conversations.conversation(source)))
    return out


class Run:
    """What came of all requests so far, of one engine."""

    def __init__(self, program, work, total, engine):
        self.router, self.work, self.total, self.engine = Router(program), work, total, engine
        self.cases, self.unusable, self.done = [], [], 0
        self.started = self.told = time.monotonic()

    def template(self, name, template, requests):
        folder = self.work / hashlib.sha256(template.encode()).hexdigest()[:16]
        vllm_side.write_model(folder, template)
        engine = self.engine, SIDES[self.engine](folder)
        problem = self.router.ask(self.engine, folder, "")["problem"]
        if problem:
            self.unusable.append({"template": name, "problem": problem})
        for construct, body in requests:
            outcome, detail = judged(engine, self.router, template, folder, body)
            self.cases.append({"template": name, "construct": construct, "outcome": outcome, "request": body, **(detail or {})})
        self.done += 1
        self.tell()

    def tell(self):
        now = time.monotonic()
        if now - self.told > 2 or self.done == self.total:
            self.told = now
            by = collections.Counter(case["outcome"] for case in self.cases)
            told = f"{len(self.cases)} requests, {by['equal']} equal, {by['not known']} not known, {by['wrong']} wrong"
            print(
                f"  {NAMES[self.engine]}: {self.done} of {self.total} templates, {told}, {now - self.started:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def of_packages(given, engine):
    templates = [pair for pair in collect.templates(given.wheels) if given.only in pair[0]]
    run = Run(given.program, given.work, len(templates), engine)
    for (name, template), requests in zip(templates, planned(len(templates), given.seed)):
        run.template(name, template, requests)
    return templates, run


def of_grammar(given, engine):
    """Templates at random: each gets a conversation at random, and an agent's."""
    agent = next(body for construct, body in conversations.table() if construct == AGENT)
    source, run = random.Random(given.seed), Run(given.program, given.work / "random", RANDOM_TEMPLATES, engine)
    for at in range(RANDOM_TEMPLATES):
        template = grammar.template(source)
        run.template(f"random:{at}", template, [(RANDOM, random_conversations.conversation(source)), (AGENT, agent)])
        for case in run.cases[-2:]:
            case["source"] = template
    return run


def counts(cases):
    by = collections.Counter(case["outcome"] for case in cases)
    made = by["equal"] + by["not known"] + by["wrong"]
    return {
        "requests": len(cases),
        "made": made,
        **{key: by[key] for key in ("equal", "not known", "wrong", "refused, yet made")},
    }


def agents(cases):
    """Templates that make a prompt of an agent's second turn, and those of them where each is the engine's."""
    outcomes = collections.defaultdict(set)
    for case in cases:
        if case["construct"].startswith(AGENT) and not case["outcome"].startswith("refused"):
            outcomes[case["template"]].add(case["outcome"])
    return len(outcomes), sum(found == {"equal"} for found in outcomes.values())


def summary(templates, cases, unusable):
    constructs = collections.defaultdict(list)
    for case in cases:
        constructs[case["construct"]].append(case)
    packages = collections.Counter(name.split(":")[0] for name, _ in templates)
    all_of = counts(cases)
    with_agents, right = agents(cases)
    return {
        "templates": {"all": len(templates), **packages},
        "unusable": unusable,
        "zone": ZONE,
        "constructs": {name: counts(found) for name, found in constructs.items()},
        "all": all_of,
        "equal": all_of["equal"] / max(all_of["made"], 1),
        "agent": {"templates": with_agents, "equal": right, "share": right / max(with_agents, 1)},
    }


def print_row(name, row):
    print(f"{name:38} {row['requests']:8} {row['made']:7} {row['equal']:7} {row['not known']:9} {row['wrong']:6}")


def print_table(engine, found):
    print(f"{engine}:")
    print(f"{'construct':38} {'requests':>8} {'made':>7} {'equal':>7} {'not known':>9} {'wrong':>6}")
    for name, row in [*found["constructs"].items(), ("all", found["all"]), ("templates made at random", found["random"])]:
        print_row(name, row)
    print(f"made: {engine} makes a prompt of the request with this template, and does not refuse it.")
    all_of, agent = found["all"], found["agent"]
    print(f"Of {found['templates']['all']} templates, {len(found['unusable'])} cannot be used by the router.")
    for one in found["unusable"]:
        print(f"  {one['template']}: {one['problem']}")
    print(f"Equal: {all_of['equal']} of {all_of['made']} ({found['equal']:.4f}).")
    print(f"Made here, but refused by {engine}: {all_of['refused, yet made']}.")
    print(f"An agent's second turn is right for {agent['equal']} of {agent['templates']} templates ({agent['share']:.4f}).")


def differing(case):
    """Where two prompts begin to differ, as each has it."""
    at = len(os.path.commonprefix([case["engine"], case["text"]]))
    return tuple(case[side][max(at - 20, 0) : at + 40] for side in ("engine", "text"))


def print_wrong(name, cases, most=10):
    """An example of each way to differ, and why prompts are not known."""
    ways = collections.defaultdict(list)
    for case in cases:
        if case["outcome"] == "wrong":
            ways[differing(case)].append(case)
    most_first = sorted(ways.items(), key=lambda way: -len(way[1]))
    for (engine, router), found in most_first[:most]:
        first = min(found, key=lambda case: len(json.dumps(case["request"])))
        print(
            f"wrong: {len(found)} times, as in {first['template']}, {first['construct']}\n  {name:6} {engine!r}\n  router {router!r}"
        )
        print(f"  {json.dumps(first['request'], ensure_ascii=False)[:400]}")
    if len(ways) > most:
        print(f"  and {len(ways) - most} other ways: --json FILE has all")
    why = collections.Counter(case["not_known"] for case in cases if case["outcome"] == "not known")
    for reason, count in why.most_common(most):
        print(f"not known: {count} times: {reason[:200]}")


def print_figures(engine, found):
    """In the form in which benches/figures.py keeps them."""
    all_of, random = found["all"], found["random"]
    prefix = "templates." if engine == "vllm" else f"templates.{engine}_"
    for name, value, target in (
        ("equal", found["equal"], f">= {EQUAL_MIN}"),
        ("wrong", all_of["wrong"] + random["wrong"], "<= 0"),
        ("agent_second_turn", found["agent"]["share"], f">= {AGENT_MIN}"),
        ("unusable", len(found["unusable"]), "<= 0"),
        ("templates", found["templates"]["all"], "none"),
        ("made", all_of["made"], "none"),
        ("random_made", random["made"], "none"),
        ("random_not_known", random["not known"], "none"),
    ):
        print(f"figure {prefix}{name} {value} target {target}")


def compared(given, engine):
    """All of one engine. True: it is as it must be."""
    templates, run = of_packages(given, engine)
    at_random = of_grammar(given, engine)
    found = summary(templates, run.cases, run.unusable) | {"random": counts(at_random.cases)}
    print_table(NAMES[engine], found)
    for cases in (run.cases, at_random.cases):
        print_wrong(NAMES[engine], cases)
    if given.figures:
        print_figures(engine, found)
    kept = [case for case in run.cases + at_random.cases if case["outcome"] not in ("equal", "refused")]
    wrong = found["all"]["wrong"] or found["random"]["wrong"]
    return {**found, "cases": kept}, not wrong and found["equal"] >= EQUAL_MIN and found["agent"]["share"] >= AGENT_MIN


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True, help="the router's side: the example `prompts`")
    parser.add_argument("--wheels", required=True, type=Path, help="a folder with the packages' wheels")
    parser.add_argument("--work", required=True, type=Path, help="a folder for models' folders")
    parser.add_argument("--json", type=Path, help="a file for all cases that are not equal, and the counts")
    parser.add_argument("--figures", action="store_true", help="print the figures, too, as benches/figures.py keeps them")
    parser.add_argument("--seed", type=int, default=SEED, help="of what is made at random")
    parser.add_argument("--engines", nargs="+", choices=list(SIDES), default=list(SIDES), help="all unless named")
    parser.add_argument("--only", default="", help="templates whose name contains this")
    given = parser.parse_args()
    os.environ["TZ"] = ZONE
    time.tzset()
    counted, differing = tokens.compared(given.program, given.wheels, given.work, given.seed, Router)
    tokens.print_found(counted, differing)
    if given.figures:
        print(f"figure templates.tokenizers {len(counted)} target none")
        print(f"figure templates.texts {sum(counted.values()) + len(differing)} target none")
        print(f"figure templates.other_tokens {len(differing)} target <= 0")
    found = {engine: compared(given, engine) for engine in given.engines}
    if given.json:
        kept = {engine: kept for engine, (kept, _) in found.items()} | {"tokens": differing}
        given.json.write_text(json.dumps(kept, ensure_ascii=False, indent=1))
    if differing:
        raise SystemExit("The tokens of a text are others than those of transformers.")
    if not all(well for _, well in found.values()):
        raise SystemExit(
            f"None may be wrong, {EQUAL_MIN} must be equal, and an agent's second turn must be right for {AGENT_MIN} of templates."
        )


if __name__ == "__main__":
    main()
