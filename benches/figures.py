"""The one writer of measured figures: benches print lines, and this module keeps them and renders RESULTS.md and the charts.

A bench, or a shell script, prints one line for each figure on standard output:

    figure <group>.<name> <value> target <op> <value>
    figure <group>.<name> <value> target none

where <op> is >=, <=, <, > or =. A bench may also print a line with conditions of its run, which goes into the head of the group:

    about <group>: 7 rounds

Files, all beside this one:

    figures.txt    the lines of each group, below a comment with their command, date and machine
    results.toml   what people read about the figures: names, units, meanings, notes
    RESULTS.md     rendered from these two, as are charts/*.svg

examples:
  # Run a bench, and replace its group in figures.txt if the bench succeeds. The exit status is that of the bench.
  python3 benches/figures.py record --group index --command "make bench FIGURES=index" -- kvstore-benches --group index

  # The same with a shell script that prints figure lines.
  python3 benches/figures.py record --group build --command "benches/build.sh" -- benches/build.sh

  # Lines that are there already, on standard input. A pipe hides the status of its first command: prefer the form above.
  echo "figure build.demo_cpu_s 1304 target none" | python3 benches/figures.py record --group build --command "make demo"

  # Write RESULTS.md and the charts again, after an edit of results.toml; or check that they are what the data gives.
  python3 benches/figures.py render
  python3 benches/figures.py render --check
"""

import argparse
import datetime
import math
import operator
import os
import pathlib
import platform
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field

HERE = pathlib.Path(__file__).parent
OPERATORS = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt, "=": operator.eq}
LINE = re.compile(r"figure ([a-z0-9_]+)\.(\w+) (\S+) target (?:(none)|(>=|<=|<|>|=) (\S+))")
HEAD = re.compile(r"# ([a-z0-9_]+): (.+)")
# How a unit is written, and what its values are multiplied by. Any other unit follows its value after a space.
UNITS = {"x": ("x", 1), "%": ("%", 100), "points": (" points", 100), "percent": ("%", 1), "": ("", 1)}
WIDTH = 120
# A process that a bench leaves behind may hold its output open: after the bench has ended, its last lines come within this.
LAST_LINES_S = 5


class Refused(Exception):
    """The input is wrong; the message says what and where."""


# ---- Figures and groups


@dataclass(frozen=True)
class Figure:
    group: str
    name: str
    value: float
    op: str | None
    target: float | None
    line: str

    @property
    def met(self) -> bool | None:
        return self.met_by(self.value)

    def met_by(self, value: float) -> bool | None:
        return OPERATORS[self.op](value, self.target) if self.op else None


@dataclass
class Group:
    name: str
    head: str
    figures: list[Figure] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in [f"# {self.name}: {self.head}", *(figure.line for figure in self.figures)])


def parse_figure(line: str) -> Figure:
    """Refuses a malformed line, by the figure's name where it has one."""
    name = (line.split() + ["", ""])[1] or "a figure without a name"
    match = LINE.fullmatch(line)
    if not match:
        raise Refused(f"{name}: malformed, must be 'figure <group>.<name> <value> target none|<op> <value>': {line!r}")
    group, short, value, _, op, target = match.groups()
    try:
        numbers = [float(value), float(target or 0)]
    except ValueError:
        raise Refused(f"{name}: not a number: {line!r}") from None
    if not all(map(math.isfinite, numbers)):
        raise Refused(f"{name}: not a finite number: {line!r}")
    return Figure(group, short, numbers[0], op, numbers[1] if op else None, line)


def add(group: Group, line: str) -> None:
    figure = parse_figure(line)
    if figure.group != group.name:
        raise Refused(f"{figure.group}.{figure.name}: not a figure of group {group.name}")
    if any(figure.name == other.name for other in group.figures):
        raise Refused(f"{figure.group}.{figure.name}: there twice")
    group.figures.append(figure)


def parse(text: str) -> dict[str, Group]:
    """The groups of figures.txt, in its order."""
    groups: dict[str, Group] = {}
    group = None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if not line:
                group = None
            elif match := HEAD.fullmatch(line):
                group = Group(*match.groups())
                if group.name in groups:
                    raise Refused(f"group {group.name}: there twice")
                groups[group.name] = group
            elif group is None:
                raise Refused(f"a group begins with '# <group>: <command>, <date>, <machine>', not with {line!r}")
            else:
                add(group, line)
        except Refused as refused:
            raise Refused(f"figures.txt, line {number}: {refused}") from None
    return groups


def unparse(groups: dict[str, Group]) -> str:
    return "\n".join(group.text for group in groups.values())


# ---- Recording


class Figures:
    """Prints the figures of one group of a bench in Python."""

    def __init__(self, group: str, rounds: int):
        self.group = group
        print(f"about {group}: Python {platform.python_version()}, {rounds} rounds", flush=True)

    def add(self, name: str, value: float, target: str = "none") -> None:
        shown = f"{value:.1f}" if abs(value) >= 100 else f"{value:.4f}"
        print(f"figure {self.group}.{name} {shown} target {target}", flush=True)


def collect(name: str, command: str, lines: list[str]) -> Group:
    """A group from what its bench printed. Other output is left out; a figure of another group is refused."""
    group = Group(name, f"{command}, {datetime.date.today()}, {machine()}")
    for line in map(str.strip, lines):
        if line.startswith(f"about {name}: "):
            group.head += "; " + line.partition(": ")[2]
        elif line.startswith("figure ") or f"figure {name}." in line:
            add(group, line)
    if not group.figures:
        raise Refused(f"no figure of group {name} was printed")
    return group


def machine() -> str:
    """Cores, processor, memory and kernel."""
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE)
    cores = f"{len(os.sched_getaffinity(0))} cores of {model[1].strip() if model else platform.machine()}"
    parts = [cores, f"{int(memory[1]) >> 20} GiB" if memory else "", f"Linux {platform.release()}"]
    if re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE):
        parts.append("virtual machine")
    return ", ".join(filter(None, parts))


def run(command: list[str]) -> tuple[int, list[str]]:
    """Runs a bench: its exit status, and the lines it printed, which are also shown as they come."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", bufsize=1)
    except OSError as error:
        raise Refused(f"cannot start {command[0]}: {error.strerror}") from None
    lines: list[str] = []

    def read() -> None:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    status = process.wait()
    reader.join(LAST_LINES_S)
    return (status if status >= 0 else 128 - status), list(lines)


def record(folder: pathlib.Path, name: str, command: str, lines: list[str]) -> None:
    """Replaces a group in figures.txt, in its place, and renders all that follows from it."""
    path = folder / "figures.txt"
    groups = parse(path.read_text() if path.exists() else "")
    groups[name] = collect(name, command, lines)
    path.write_text(unparse(groups))
    write(folder, render(folder))


# ---- Rendering


def number(figure: Figure, scale: int = 1, digits: int = 3) -> str:
    """A value of so many significant digits, and of no more decimals than were measured."""
    value = figure.value * scale
    if value == 0:
        return "0"
    measured = len(figure.line.split()[2].partition(".")[2]) - round(math.log10(scale))
    decimals = min(measured, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{max(0, decimals)}f}"


def shown(figure: Figure, unit: str) -> str:
    """A value with its unit. It has more digits than usual where rounding would move it across its target."""
    suffix, scale = UNITS.get(unit, (f" {unit}", 1))
    for digits in range(3, 9):
        text = number(figure, scale, digits)
        if figure.met_by(float(text.replace(",", "")) / scale) == figure.met:
            break
    return text + suffix


def target(figure: Figure, unit: str) -> str:
    if not figure.op:
        return "none"
    suffix, scale = UNITS.get(unit, (f" {unit}", 1))
    return f"{figure.op} {figure.target * scale:g}{suffix}"


def filled(text: str, figures: dict[str, Figure], where: str) -> str:
    """Values for their names in braces: {name}, or {name:%} for a part of 1 in percent."""

    def value(match: re.Match) -> str:
        figure = figures.get(match[1])
        if figure is None:
            return "(not measured)"
        return number(figure, 100) + "%" if match[2] else number(figure)

    text = re.sub(r"\{(\w+)(:%)?\}", value, text)
    if "{" in text or "}" in text:
        raise Refused(f"results.toml, {where}: a brace that belongs to no figure: {text!r}")
    return " ".join(text.split())


def wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def wanted(table: dict, where: str, keys: set[str], optional: set[str] = frozenset()) -> None:
    """Refuses a table that lacks a key, or has an unknown one."""
    missing, unknown = keys - table.keys(), table.keys() - keys - optional
    if missing or unknown:
        raise Refused(f"results.toml, {where}: missing {sorted(missing)}, unknown {sorted(unknown)}")


def table(group: Group, rows: dict[str, dict], name: str) -> list[str]:
    columns = ["What was measured", "Against what", "Value", "Target", "Met", "What it means for a user"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    figures = {figure.name: figure for figure in group.figures}
    for key, row in rows.items():
        where = f"{name}.rows.{key}"
        wanted(row, where, {"what", "against", "unit", "means"})
        texts = {column: filled(row[column], figures, where) for column in ("what", "against", "means")}
        figure = figures.get(key)
        value, goal, met = "not measured", "none", None
        if figure:
            value, goal, met = shown(figure, row["unit"]), target(figure, row["unit"]), figure.met
        cells = [texts["what"], texts["against"], value, goal, {True: "yes", False: "**no**", None: ""}[met], texts["means"]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def section(group: Group, text: dict, name: str) -> list[str]:
    wanted(text, name, {"heading", "what", "rows"}, {"notes", "chart", "chart_text"})
    figures = {figure.name: figure for figure in group.figures}
    command, _, conditions = group.head.partition(", ")
    about = f"Group `{name}`: `{command}`, {conditions}." if group.figures else f"Group `{name}`: not measured yet."
    lines = [f"## {text['heading']}", "", *wrapped(filled(text["what"], figures, name)), "", *wrapped(about), ""]
    if "chart" in text:
        lines += [f"![{text['chart_text']}](charts/{text['chart']})", ""]
    lines += table(group, text["rows"], name)
    if "notes" in text:
        lines += ["", *notes(text["notes"], figures, f"{name}.notes")]
    return lines


def notes(text: str, figures: dict[str, Figure], where: str) -> list[str]:
    """Markdown with values, wrapped again: paragraphs, tables, and lists without nesting."""
    blocks = []
    for block in text.strip().split("\n\n"):
        # A row of a table, or an item of a list, begins a line; any other line goes on with the one before.
        items = re.split(r"\n(?=\||- |\d+\. )", block)
        lines: list[str] = []
        for item in (filled(item, figures, where) for item in items):
            marker = re.match(r"(- |\d+\. )?", item)[0]
            lines += [item] if item.startswith("|") else wrapped(item, " " * len(marker))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks).splitlines()


def summary(groups: dict[str, Group], texts: dict[str, dict]) -> list[str]:
    with_target = [figure for group in groups.values() for figure in group.figures if figure.op]
    met = sum(figure.met for figure in with_target)
    lines = [f"{len(with_target)} figures have a target. {met} of them meet it.", ""]
    lines += ["| Group | Command | Date | Targets met |", "|---|---|---|---|"]
    for name, text in texts.items():
        group = groups.get(name, Group(name, ""))
        own = [figure.met for figure in group.figures if figure.op]
        date = re.search(r"\d{4}-\d\d-\d\d", group.head)
        command = f"`{group.head.partition(', ')[0]}`" if group.head else ""
        link = f"[{text['heading']}](#{anchor(text['heading'])})"
        lines.append(f"| {link} | {command} | {date[0] if date else ''} | {sum(own)} of {len(own)} |")
    return lines


def render(folder: pathlib.Path) -> dict[str, str]:
    """The generated files, by their names below `folder`."""
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError:
            version = platform.python_version()
            raise Refused(f"rendering needs Python 3.11 or newer, or the package tomli; this is {version}") from None
    import charts

    groups = parse((folder / "figures.txt").read_text())
    try:
        texts = tomllib.loads((folder / "results.toml").read_text())
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"results.toml: {error}") from None
    lines = ["# Results", "", "<!-- Rendered by benches/figures.py from figures.txt and results.toml: do not edit it. -->", ""]
    lines += [*wrapped(filled(texts.pop("intro"), {}, "intro")), "", *summary(groups, texts)]
    for name, text in texts.items():
        lines += ["", *section(groups.get(name, Group(name, "")), text, name)]
    files = {"RESULTS.md": "\n".join(lines) + "\n"}
    values = {f"{group.name}.{figure.name}": figure.value for group in groups.values() for figure in group.figures}
    for name, draw in charts.CHARTS.items():
        try:
            files[f"charts/{name}"] = draw(values)
        except KeyError as missing:
            raise Refused(f"charts/{name}: figures.txt has no figure {missing}") from None
    return files


def write(folder: pathlib.Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def stale(folder: pathlib.Path, files: dict[str, str]) -> list[str]:
    """The generated files that are not what the data gives."""
    return [name for name, text in files.items() if not (folder / name).exists() or (folder / name).read_text() != text]


# ---- The command


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # For tests.
    parser.add_argument("--folder", type=pathlib.Path, default=HERE, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record", help="replace a group in figures.txt, and render RESULTS.md and the charts")
    recording.add_argument("--group", required=True, help="the group whose lines are kept")
    recording.add_argument("--command", required=True, help="the command that measures the group again, for its head")
    recording.add_argument("run", nargs="*", metavar="-- COMMAND", help="what prints the lines; otherwise standard input")
    rendering = verbs.add_parser("render", help="write RESULTS.md and the charts from figures.txt and results.toml")
    rendering.add_argument("--check", action="store_true", help="write nothing; exit with 1 if one is not what the data gives")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "record":
            status, lines = run(options.run) if options.run else (0, sys.stdin.readlines())
            if status:
                print(f"figures.py: {options.run[0]} ended with {status}: figures.txt is left as it was", file=sys.stderr)
                return status
            record(options.folder, options.group, options.command, lines)
        elif options.check:
            files = stale(options.folder, render(options.folder))
            for name in files:
                message = f"{name} is not what figures.txt and results.toml give: run 'python3 benches/figures.py render'"
                print(f"figures.py: {options.folder / name}: {message}", file=sys.stderr)
            return 1 if files else 0
        else:
            write(options.folder, render(options.folder))
    except Refused as refused:
        print(f"figures.py: {refused}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
