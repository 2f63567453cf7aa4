"""Chat templates at random, from the constructs that real ones use."""

TEXTS = [
    "'a'",
    '"it\'s"',
    "' x '",
    "'<|im_start|>'",
    "'\\n'",
    "'é🙂'",
    "''",
    "'user'",
    "'a,b,,c'",
    "'Hello wORLD'",
    "'</think>'",
    "'12'",
]
KEYS = ["role", "content", "tool_calls", "reasoning_content", "name", "tool_call_id", "nothing"]
NAMES = [
    "messages",
    "tools",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "enable_thinking",
    "documents",
    "nothing",
    "reasoning_effort",
]
TESTS = [
    "defined",
    "not defined",
    "none",
    "not none",
    "string",
    "mapping",
    "iterable",
    "sequence",
    "number",
    "boolean",
    "true",
    "false",
    "undefined",
]
TEXT_FILTERS = [
    "trim", "upper", "lower", "title", "capitalize", "replace('a', 'bb')", "string", "safe", "e", "default('d')", "tojson",
    "indent(2)", "reverse", "list|join('-')", "length|string", "first", "last", "int", "default('d', true)", "wordcount|string",
    "trim('a')", "float|string", "center(9)",
]  # fmt: skip
TEXT_METHODS = [
    "strip()", "lstrip()", "rstrip('\\n')", "upper()", "lower()", "title()", "split(',')[0]", "split()|length|string",
    "replace('a', '')", "strip('a x')", "capitalize()", "split('</think>')[-1]", "format(1)", "splitlines()|join('/')",
    "rsplit(' ', 1)|last", "removeprefix('a')", "zfill(4)",
]  # fmt: skip
LIST_FILTERS = [
    "list", "reverse|list", "map('string')|list", "map('upper')|list", "sort", "unique|list", "map('length')|list",
    "select('string')|list", "reject('none')|list", "selectattr('role', 'equalto', 'user')|list",
    "rejectattr('role', 'equalto', 'user')|list", "map(attribute='role')|list", "selectattr('tool_calls', 'defined')|list",
    "batch(2)|list", "map('tojson')|list", "selectattr('role', 'in', ['user', 'tool'])|list",
]  # fmt: skip
JSON_ARGUMENTS = [
    "",
    "(indent=2)",
    "(indent=4)",
    "(ensure_ascii=False)",
    "(ensure_ascii=true)",
    "(sort_keys=true)",
    "(separators=(',', ':'))",
]
SIGNS = ["", "", "", "-"]


class Grammar:
    """One template. `random` makes every choice."""

    def __init__(self, random):
        self.random = random
        self.names = list(NAMES)
        self.loops = 0
        self.macros = 0

    def pick(self, *made):
        return self.random.choice(made)()

    def chance(self, share):
        return self.random.random() < share

    def of(self, values):
        return self.random.choice(values)

    # Expressions: each is mostly of its type.

    def number(self, depth):
        constants = lambda: self.of(["0", "1", "2", "-1", "7", "3.0", "0.5", "1e3"])
        if depth <= 0:
            return constants()
        return self.pick(
            constants,
            lambda: f"({self.list(depth - 1)}|length)",
            lambda: f"({self.number(depth - 1)} {self.of(['+', '-', '*', '%', '//', '/'])} {self.of(['2', '3', '5'])})",
            lambda: self.of(["loop.index", "loop.index0", "loop.length"]) if self.loops else "4",
        )

    def text(self, depth):
        if depth <= 0:
            return self.of(TEXTS)
        return self.pick(
            lambda: self.of(TEXTS),
            lambda: f"({self.text(depth - 1)} + {self.text(depth - 1)})",
            lambda: f"({self.any(depth - 1)} ~ {self.any(depth - 1)})",
            lambda: f"({self.text(depth - 1)}|{self.of(TEXT_FILTERS)})",
            lambda: f"{self.text(depth - 1)}.{self.of(TEXT_METHODS)}",
            lambda: f"({self.any(depth - 1)}|tojson{self.of(JSON_ARGUMENTS)})",
            lambda: f"({self.any(depth - 1)}|string)",
            lambda: f"{self.message()}.{self.of(['content', 'role'])}",
            lambda: f"({self.text(depth - 1)} if {self.truth(depth - 1)} else {self.text(depth - 1)})",
            lambda: f"({self.list(depth - 1)}|join({self.text(0)}))",
            lambda: f"{self.text(depth - 1)}[{self.of(['1:', ':-1', '-2:', '0', ':2', '::-1'])}]",
            lambda: f"({self.of(['%s|%s', '%r-%s'])!r} % ({self.any(depth - 1)}, {self.any(0)}))",
        )

    def list(self, depth):
        if depth <= 0:
            return self.of(["messages", "[1, 'a', none, true, 1.5]", "[]", "['b', 'a', 'B']", "(1, 'x')", "range(3)|list"])
        return self.pick(
            lambda: f"messages[{self.of(['1:', ':-1', '::-1', '-2:', ':0'])}]",
            lambda: f"({self.list(depth - 1)}|{self.of(LIST_FILTERS)})",
            lambda: f"[{self.any(depth - 1)}, {self.any(depth - 1)}]",
            lambda: f"({self.list(0)} + [{self.any(depth - 1)}])",
            lambda: f"({self.dict(depth - 1)}.{self.of(['keys', 'values', 'items'])}()|list)",
            lambda: f"({self.dict(depth - 1)}|{self.of(['items|list', 'dictsort', 'list'])})",
            lambda: f"{self.text(depth - 1)}.split({self.of(TEXTS)})",
            lambda: f"({self.message()}.tool_calls or [])",
            lambda: "(tools or [])",
        )

    def message(self):
        return self.of(["messages[0]", "messages[-1]", "(messages|first)", *(["message"] * 3 if self.loops else [])])

    def dict(self, depth):
        if depth <= 0:
            return self.of(["{'a': 1, 'b': [none, true]}", "{}", "{'z': 'it\\'s', 'a': 2.0}", "messages[0]"])
        return self.pick(
            self.message,
            lambda: f"{{{self.of(TEXTS)}: {self.any(depth - 1)}, 'k': {self.any(depth - 1)}}}",
            lambda: f"({self.list(depth - 1)}|first)",
            lambda: "(tools[0] if tools else {})",
            lambda: f"dict(a={self.any(depth - 1)})",
        )

    def truth(self, depth):
        if depth <= 0:
            return self.of(["true", "false", "none", "tools", "add_generation_prompt", "nothing"])
        return self.pick(
            lambda: f"{self.any(depth - 1)} is {self.of(TESTS)}",
            lambda: f"{self.name()} is {self.of(TESTS)}",
            lambda: f"{self.message()}.{self.of(KEYS)} is {self.of(TESTS)}",
            lambda: f"({self.truth(depth - 1)} {self.of(['and', 'or'])} {self.truth(depth - 1)})",
            lambda: f"(not {self.truth(depth - 1)})",
            lambda: f"({self.any(depth - 1)} {self.of(['==', '!='])} {self.any(depth - 1)})",
            lambda: f"({self.number(depth - 1)} {self.of(['<', '>', '<=', '>=', '=='])} {self.number(depth - 1)})",
            lambda: f"({self.text(depth - 1)} {self.of(['in', 'not in'])} {self.container(depth - 1)})",
            lambda: f"{self.text(depth - 1)}.{self.of(['startswith', 'endswith'])}({self.text(0)})",
            lambda: self.of(["loop.first", "loop.last"]) if self.loops else "true",
        )

    def container(self, depth):
        return self.pick(lambda: self.text(depth), lambda: self.list(depth))

    def name(self):
        return self.of(self.names)

    def any(self, depth):
        return self.pick(
            lambda: self.text(depth),
            lambda: self.text(depth),
            lambda: self.number(depth),
            lambda: self.list(depth),
            lambda: self.dict(depth),
            lambda: f"({self.truth(depth)})",
            self.name,
            lambda: f"{self.message()}.{self.of(KEYS)}",
            lambda: f"{self.message()}.get({self.of(KEYS)!r}{self.of(['', ', 1'])})",
        )

    # Statements.

    def tag(self, inside):
        return f"{{%{self.of(SIGNS)} {inside} {self.of(SIGNS)}%}}"

    def shown(self, depth):
        return f"{{{{{self.of(SIGNS)} {self.any(depth)} {self.of(SIGNS)}}}}}"

    def branch(self, depth):
        out = self.tag(f"if {self.truth(2)}") + self.body(depth - 1)
        if self.chance(0.3):
            out += self.tag(f"elif {self.truth(2)}") + self.body(depth - 1)
        if self.chance(0.5):
            out += self.tag("else") + self.body(depth - 1)
        return out + self.tag("endif")

    def loop(self, depth):
        over = self.of(["messages", "messages", "messages[1:]", "messages if message.role != 'system'"])
        out = self.tag(f"for message in {over}")
        self.loops += 1
        if self.chance(0.15):
            out += self.tag(f"if {self.truth(1)}") + self.tag(self.of(["continue", "break"])) + self.tag("endif")
        out += self.body(depth - 1)
        self.loops -= 1
        return out + self.tag("endfor")

    def items(self, depth):
        name = f"v{len(self.names)}"
        two = self.chance(0.4)
        out = self.tag(f"for k, {name} in {self.dict(1)}|items" if two else f"for {name} in {self.list(2)}")
        out += f"{{{{ {name} }}}}" + ("{{ k }}" if two else "") + self.shown(2)
        return out + (self.tag("else") + "none" if self.chance(0.2) else "") + self.tag("endfor")

    def set(self, depth):
        name = f"s{len(self.names)}"
        out = self.tag(f"set {name} = {self.any(3)}")
        if self.chance(0.2):
            out = self.tag(f"set {name}") + self.body(depth - 1) + self.tag("endset")
        self.names.append(name)
        return out

    def space(self, depth):
        name = f"ns{len(self.names)}"
        out = self.tag(f"set {name} = namespace(a={self.any(1)}, n=0)") + self.tag("for message in messages")
        out += self.tag(f"set {name}.n = {name}.n + 1") + self.tag("endfor")
        return out + f"{{{{ {name}.n ~ {name}.a }}}}"

    def macro(self, depth):
        self.macros += 1
        name = f"m{self.macros}"
        out = self.tag(f"macro {name}(x, y={self.text(0)})") + "{{ x }}" + self.shown(1) + "{{ y|upper }}" + self.tag("endmacro")
        return out + f"{{{{ {name}({self.any(2)}{self.of(['', ', ' + self.text(1)])}) }}}}"

    def body(self, depth):
        out = ""
        for _ in range(self.random.randint(1, 3)):
            kind = self.random.random()
            if kind < 0.15:
                out += self.of(["\n", "text\n", "  ", "<|end|>", "{# a note #}", "{#- b -#}\n"])
            elif kind < 0.6 or depth <= 0:
                out += self.shown(self.of([2, 3]))
            else:
                makers = [self.branch, self.loop, self.items, self.set, self.space, self.macro, self.generation]
                out += self.of(makers)(depth)
        return out

    def generation(self, depth):
        return self.tag("generation") + self.body(0) + self.tag("endgeneration")


def template(random):
    grammar = Grammar(random)
    return "".join(grammar.body(3) for _ in range(3)) + "{{ bos_token }}"
