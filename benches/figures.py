"""Figures of benches in Python: printed as they come, and written to RESULTS.md under their group's heading."""

import datetime
import os
import pathlib
import platform


class Figures:
    """Those of one group; `command` measures them."""

    def __init__(self, group: str, command: str):
        self.group, self.command, self.lines = group, command, []

    def add(self, name: str, value: float, target: str = "none") -> None:
        shown = f"{value:.1f}" if abs(value) >= 100 else f"{value:.4f}"
        self.lines.append(f"figure {self.group}.{name} {shown} target {target}")
        print(self.lines[-1], flush=True)

    def write(self, path: pathlib.Path, rounds: int) -> None:
        text = path.read_text()
        heading = f"## {self.group}\n"
        before, _, rest = text.partition(heading)
        cut = rest.find("\n## ")
        after = rest[cut + 1 :] if cut >= 0 else ""
        machine = f"{os.cpu_count()} cores of {_processor()}, Linux {platform.release()}, virtual machine"
        head = f"`{self.command}`, {datetime.date.today()}, {machine}; Python {platform.python_version()}, {rounds} rounds"
        section = f"{heading}\n{head}\n\n```\n" + "\n".join(self.lines) + "\n```\n"
        if not rest:
            # Before what is said of them.
            before, mark, out = before.partition("## Out of reach")
            after = mark + out
        path.write_text(f"{before.rstrip()}\n\n{section}\n{after}".rstrip() + "\n")


def _processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
