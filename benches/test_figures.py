"""python3 -m unittest discover --start-directory benches"""

import contextlib
import io
import pathlib
import sys
import tempfile
import unittest
import unittest.mock

import figures

TEXT = """# one: make one, 2026-01-01, a machine
figure one.fast 2.5000 target >= 2
figure one.note 0.0038 target none

# two: make two, 2026-01-02, a machine
figure two.slow 3 target < 2.5
"""

HIT_RATIOS = "".join(
    f"figure eviction.{name}_{capacity} 0.3000 target none\n"
    for name in ("hit_ratio", "lru_hit_ratio", "optimum_hit_ratio")
    for capacity in (1000, 5000, 10000, 30000, 50000)
)
RATES = "".join(
    f"figure peers.{verb}_{size}_{side}_gbps 1.0000 target none\n"
    for verb in ("get", "put")
    for size in ("64KiB", "1MiB", "4MiB")
    for side in ("kvstore", "redis", "mooncake_local", "mooncake_tcp")
)
CHARTED = f"\n# eviction: c, 2026-01-01, m\n{HIT_RATIOS}\n# peers: c, 2026-01-01, m\n{RATES}"

ROWS = """
intro = "An introduction."

[one]
heading = "One thing"
what = "It was measured."
notes = '''
A note, with {note:%}.
'''
[one.rows.fast]
what = "Speed"
against = "a peer"
unit = "x"
means = "It is fast."

[two]
heading = "Another"
what = "Measured, too."
[two.rows.slow]
what = "Time"
against = "a limit"
unit = "s"
means = "It is slow."
"""


class Parsing(unittest.TestCase):
    def refused(self, text: str) -> str:
        with self.assertRaises(figures.Refused) as refused:
            figures.parse(text)
        return str(refused.exception)

    def test_groups_keep_their_order_heads_and_lines(self):
        groups = figures.parse(TEXT)
        self.assertEqual(list(groups), ["one", "two"])
        self.assertEqual(groups["one"].head, "make one, 2026-01-01, a machine")
        self.assertEqual([figure.name for figure in groups["one"].figures], ["fast", "note"])
        self.assertEqual(figures.unparse(groups), TEXT)

    def test_a_malformed_line_is_refused_by_name(self):
        for line in ("figure one.bad 1.0 target about 2", "figure one.bad 1.0", "figure one.bad 1.0 target >= 2 3"):
            message = self.refused(TEXT.replace("figure one.note 0.0038 target none", line))
            self.assertIn("line 3: one.bad: malformed", message)
        for value in ("fast", "NaN", "inf"):
            self.assertIn("one.bad: not a ", self.refused(f"# one: c\nfigure one.bad {value} target none\n"))

    def test_a_figure_in_a_wrong_place_is_refused_by_name(self):
        self.assertIn("two.slow: not a figure of group one", self.refused("# one: c\nfigure two.slow 1 target none\n"))
        self.assertIn("one.a: there twice", self.refused("# one: c\n" + "figure one.a 1 target none\n" * 2))
        self.assertIn("group one: there twice", self.refused("# one: c\n\n# one: c\n"))
        self.assertIn("a group begins with", self.refused("figure one.a 1 target none\n"))


class Targets(unittest.TestCase):
    def met(self, value: str, target: str) -> bool | None:
        return figures.parse_figure(f"figure g.f {value} target {target}").met

    def test_each_operator(self):
        for target, below, at, above in [
            (">= 2", False, True, True),
            ("> 2", False, False, True),
            ("<= 2", True, True, False),
            ("< 2", True, False, False),
            ("= 2", False, True, False),
            ("none", None, None, None),
        ]:
            with self.subTest(target):
                self.assertEqual([self.met(value, target) for value in ("1.9", "2.0", "2.1")], [below, at, above])

    def test_negative_targets(self):
        self.assertTrue(self.met("-0.0010", ">= -0.002"))
        self.assertFalse(self.met("-0.0030", ">= -0.002"))


class Values(unittest.TestCase):
    def shown(self, line: str, unit: str) -> str:
        return figures.shown(figures.parse_figure(f"figure g.f {line}"), unit)

    def test_units(self):
        self.assertEqual(self.shown("1.6021 target >= 0.7", "x"), "1.60x")
        self.assertEqual(self.shown("0.0594 target none", "%"), "5.94%")
        self.assertEqual(self.shown("0.4000 target <= 1", "percent"), "0.400%")
        self.assertEqual(self.shown("29250.0 target none", "ns"), "29,250 ns")
        self.assertEqual(self.shown("0.0000 target = 0", "bytes"), "0 bytes")

    def test_no_more_decimals_than_were_measured(self):
        self.assertEqual(self.shown("0.74 target none", "x"), "0.74x")

    def test_rounding_does_not_move_a_value_across_its_target(self):
        self.assertEqual(self.shown("2.9998 target >= 3", "x"), "2.9998x")
        self.assertEqual(self.shown("3.0001 target <= 3", "x"), "3.0001x")


class Files(unittest.TestCase):
    """What the command does to files."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        (self.folder / "figures.txt").write_text(TEXT + CHARTED)
        (self.folder / "results.toml").write_text(ROWS)

    def run_main(self, *arguments: str) -> tuple[int, str]:
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            status = figures.main(["--folder", str(self.folder), *arguments])
        return status, err.getvalue()

    def record(self, script: str) -> tuple[int, str]:
        return self.run_main("record", "--group", "one", "--command", "make one", "--", sys.executable, "-c", script)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def test_a_group_is_replaced_in_its_place(self):
        script = "print('hello'); print('about one: 7 rounds'); print('figure one.fast 1.0000 target >= 2')"
        self.assertEqual(self.record(script), (0, ""))
        groups = figures.parse(self.read("figures.txt"))
        self.assertEqual(list(groups), ["one", "two", "eviction", "peers"])
        self.assertEqual([figure.line for figure in groups["one"].figures], ["figure one.fast 1.0000 target >= 2"])
        self.assertTrue(groups["one"].head.startswith("make one, 20"))
        self.assertTrue(groups["one"].head.endswith("; 7 rounds"))
        self.assertIn(TEXT.partition("\n\n")[2], self.read("figures.txt"))
        self.assertIn("| Speed | a peer | 1.00x | >= 2x | **no** | It is fast. |", self.read("RESULTS.md"))

    def test_a_new_group_comes_last(self):
        with unittest.mock.patch("sys.stdin", io.StringIO("figure build.size_mib 12.5 target <= 40\n")):
            self.assertEqual(self.run_main("record", "--group", "build", "--command", "make build"), (0, ""))
        self.assertEqual(list(figures.parse(self.read("figures.txt")))[-1], "build")

    def test_a_bench_that_fails_keeps_its_status_and_leaves_the_file_alone(self):
        script = "import sys; print('figure one.fast 1.0000 target >= 2'); sys.exit(3)"
        status, message = self.record(script)
        self.assertEqual(status, 3)
        self.assertIn("figures.txt is left as it was", message)
        self.assertEqual(self.record("import os; os.kill(os.getpid(), 9)")[0], 128 + 9)
        self.assertEqual(self.read("figures.txt"), TEXT + CHARTED)

    def test_what_cannot_be_recorded_leaves_the_file_alone(self):
        for script, message in [
            ("print('nothing')", "no figure of group one"),
            ("print('figure one.bad 1.0')", "one.bad: malformed"),
            ("print('figure two.slow 1 target none')", "two.slow: not a figure of group one"),
            ("print('  3% figure one.glued 1 target none')", "malformed"),
        ]:
            status, shown = self.record(script)
            self.assertEqual(status, 1)
            self.assertIn(message, shown)
        self.assertEqual(self.run_main("record", "--group", "one", "--command", "c", "--", "/nowhere/bench")[0], 1)
        self.assertEqual(self.read("figures.txt"), TEXT + CHARTED)

    def test_a_process_that_a_bench_leaves_behind_is_not_waited_for(self):
        script = "import subprocess; subprocess.Popen(['sleep', '3']); print('figure one.fast 1.0000 target >= 2')"
        with unittest.mock.patch("figures.LAST_LINES_S", 2.0):
            self.assertEqual(self.record(script), (0, ""))
        self.assertIn("figure one.fast 1.0000 target >= 2", self.read("figures.txt"))

    def test_tables_have_values_targets_and_whether_they_are_met(self):
        self.assertEqual(self.run_main("render"), (0, ""))
        results = self.read("RESULTS.md")
        self.assertIn("2 figures have a target. 1 of them meet it.", results)
        self.assertIn("| Speed | a peer | 2.50x | >= 2x | yes | It is fast. |", results)
        self.assertIn("| Time | a limit | 3 s | < 2.5 s | **no** | It is slow. |", results)
        self.assertIn("A note, with 0.38%.", results)
        self.assertIn("Group `one`: `make one`, 2026-01-01, a machine.", results)

    def test_check_notices_an_edit_by_hand(self):
        self.run_main("render")
        self.assertEqual(self.run_main("render", "--check"), (0, ""))
        for name, new in [("RESULTS.md", "9.99x"), ("charts/peers.svg", "9.9")]:
            before = self.read(name)
            old = "2.50x" if name == "RESULTS.md" else "1.0"
            (self.folder / name).write_text(before.replace(old, new, 1))
            status, message = self.run_main("render", "--check")
            self.assertEqual(status, 1)
            self.assertIn(f"{name} is not what figures.txt and results.toml give", message)
            self.assertIn(new, self.read(name), "a check writes nothing")
            (self.folder / name).write_text(before)
        (self.folder / "charts/hit_ratio.svg").unlink()
        self.assertEqual(self.run_main("render", "--check")[0], 1)

    def test_a_wrong_text_is_refused_by_name(self):
        for old, new, message in [
            ('unit = "x"\n', "", "one.rows.fast: missing ['unit']"),
            ("It is fast.", "It is {fast", "one.rows.fast: a brace"),
            ('heading = "One thing"', 'heading = "One thing"\ncolour = "red"', "one: missing [], unknown ['colour']"),
        ]:
            (self.folder / "results.toml").write_text(ROWS.replace(old, new))
            status, shown = self.run_main("render")
            self.assertEqual(status, 1)
            self.assertIn(message, shown)

    def test_a_row_without_its_figure_says_so(self):
        (self.folder / "results.toml").write_text(ROWS.replace("two.rows.slow", "two.rows.other"))
        self.run_main("render")
        self.assertIn("| Time | a limit | not measured | none |  | It is slow. |", self.read("RESULTS.md"))

    def test_a_chart_without_its_figures_is_refused_by_name(self):
        (self.folder / "figures.txt").write_text(TEXT)
        status, message = self.run_main("render")
        self.assertEqual(status, 1)
        self.assertIn("figures.txt has no figure 'eviction.", message)


class Ours(unittest.TestCase):
    """The project's own figures."""

    def test_every_figure_with_a_target_has_a_row(self):
        import tomllib

        texts = tomllib.loads((figures.HERE / "results.toml").read_text())
        groups = figures.parse((figures.HERE / "figures.txt").read_text())
        named = {f"{name}.{row}" for name, text in texts.items() if name != "intro" for row in text["rows"]}
        targets = [f"{figure.group}.{figure.name}" for group in groups.values() for figure in group.figures if figure.op]
        self.assertEqual([name for name in targets if name not in named], [])


if __name__ == "__main__":
    unittest.main()
