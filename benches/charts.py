"""Charts of figures, as SVG. `figures.py render` writes them.

Each chart has a light background of its own, so that it reads the same on a dark page.
"""

import math
from html import escape

INK, FAINT, GRID = "#1f2328", "#59636e", "#d8dee4"
OURS, PEERS = "#0969da", ("#bc4c00", "#6e7781", "#afb8c1")
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Canvas:
    def __init__(self, width: int, height: int, title: str, subtitle: str):
        self.width, self.height = width, height
        self.parts = [f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6" fill="#ffffff" stroke="{GRID}"/>']
        self.text(24, 34, title, size=16, weight=600)
        self.text(24, 54, subtitle, size=12, fill=FAINT)
        self.title = title

    def text(self, x, y, text, size=12, anchor="start", fill=INK, weight=400) -> None:
        # The white edge keeps grid lines out of the letters.
        style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
        style += ' paint-order="stroke" stroke="#ffffff" stroke-width="3"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>')

    def line(self, x1, y1, x2, y2, stroke=GRID) -> None:
        self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{stroke}"/>')

    def rect(self, x, y, width, height, fill) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>')

    def curve(self, points, stroke, dashes="") -> None:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(f'<polyline points="{places}" fill="none" stroke="{stroke}" stroke-width="2.5"{dashes}/>')
        self.parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{stroke}"/>' for x, y in points]

    def svg(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
        head += f' height="{self.height}" role="img" aria-label="{escape(self.title)}" font-family="{FONT}">'
        return "\n".join([head, *self.parts, "</svg>"]) + "\n"


def hit_ratio(values: dict[str, float]) -> str:
    """Hit ratio by capacity: the policy, LRU and the optimum."""
    capacities = (1_000, 5_000, 10_000, 30_000, 50_000)
    sides = [
        ("optimum", "optimum_hit_ratio", PEERS[1], "6 4"),
        ("kvstore", "hit_ratio", OURS, ""),
        ("LRU", "lru_hit_ratio", PEERS[0], ""),
    ]
    canvas = Canvas(720, 400, "Hit ratio by capacity", "Conversation trace; higher is better")
    left, right, top, bottom = 70, 690, 106, 340
    most = math.ceil(max(values[f"eviction.optimum_hit_ratio_{capacity}"] for capacity in capacities) * 10) / 10
    x = lambda capacity: left + 30 + (right - left - 60) * math.log(capacity / capacities[0], capacities[-1] / capacities[0])
    y = lambda value: bottom - value / most * (bottom - top)
    for percent in range(0, round(most * 100) + 1, 10):
        canvas.line(left, y(percent / 100), right, y(percent / 100))
        canvas.text(left - 8, y(percent / 100) + 4, f"{percent}%", anchor="end", fill=FAINT)
    for capacity in capacities:
        canvas.text(x(capacity), bottom + 22, f"{capacity:,}", anchor="middle")
    canvas.text((left + right) / 2, bottom + 44, "capacity in blocks, logarithmic", anchor="middle", fill=FAINT)
    for at, (label, name, colour, dashes) in enumerate(sides):
        points = [(x(capacity), y(values[f"eviction.{name}_{capacity}"])) for capacity in capacities]
        canvas.curve(points, colour, dashes)
        canvas.line(24 + at * 110, 78, 48 + at * 110, 78, stroke=colour)
        canvas.parts.append(f'<circle cx="{36 + at * 110}" cy="78" r="3.5" fill="{colour}"/>')
        canvas.text(56 + at * 110, 82, label)
    return canvas.svg()


def peers(values: dict[str, float]) -> str:
    """Gets and puts by block size beside Redis and Mooncake Store, one block per call."""
    sides = [
        ("kvstore", "kvstore", OURS),
        ("Redis, Unix socket", "redis", PEERS[0]),
        ("Mooncake, same process", "mooncake_local", PEERS[1]),
        ("Mooncake, TCP on loopback", "mooncake_tcp", PEERS[2]),
    ]
    sizes = [("64KiB", "64 KiB"), ("1MiB", "1 MiB"), ("4MiB", "4 MiB")]
    canvas = Canvas(900, 390, "Gets and puts from Python", "GB/s by block size, one block per call; higher is better")
    legend = 24
    for label, _, colour in sides:
        canvas.rect(legend, 70, 12, 12, colour)
        canvas.text(legend + 18, 80.5, label)
        legend += 48 + 6.4 * len(label)
    top, bottom, width = 130, 350, 380
    most = max(values[f"peers.{verb}_{size}_{name}_gbps"] for verb in ("get", "put") for size, _ in sizes for _, name, _ in sides)
    most = math.ceil(most / 3) * 3
    y = lambda value: bottom - value / most * (bottom - top)
    for panel, (verb, title) in enumerate([("get", "Get"), ("put", "Put")]):
        left = 60 + panel * 440
        canvas.text(left, top - 14, title, size=13, weight=600)
        for tick in range(0, most + 1, 3):
            canvas.line(left, y(tick), left + width, y(tick))
            canvas.text(left - 8, y(tick) + 4, str(tick), anchor="end", fill=FAINT)
        step = width / len(sizes)
        for at, (size, label) in enumerate(sizes):
            bar = (step - 22) / len(sides)
            for side, (_, name, colour) in enumerate(sides):
                value = values[f"peers.{verb}_{size}_{name}_gbps"]
                begin = left + at * step + 11 + side * bar
                canvas.rect(begin + 1, y(value), bar - 2, bottom - y(value), colour)
                shown = f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"
                canvas.text(begin + bar / 2, y(value) - 4, shown, size=10, anchor="middle")
            canvas.text(left + at * step + step / 2, bottom + 20, label, anchor="middle")
    return canvas.svg()


CHARTS = {"hit_ratio.svg": hit_ratio, "peers.svg": peers}
