"""The chat templates that published packages ship: from wheels, which are read and not installed, and from the engine beside them."""

import ast
import json
import zipfile
from importlib import resources
from pathlib import Path

# Methods of texts that modules build their templates with.
METHODS = {"replace", "split", "strip", "lstrip", "rstrip"}


def is_template(value):
    return isinstance(value, str) and "{%" in value and "messages" in value


def evaluated(node, known):
    """What an expression of constants, earlier names and methods of texts is; None where it is more than that."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return known.get(node.id)
        case ast.BinOp(op=ast.Add()):
            left, right = evaluated(node.left, known), evaluated(node.right, known)
            return left + right if isinstance(left, str) and isinstance(right, str) else None
        case ast.Subscript():
            whole, at = evaluated(node.value, known), evaluated(node.slice, known)
            return whole[at] if isinstance(whole, list) and isinstance(at, int) else None
        case ast.Call(func=ast.Attribute(attr=method), keywords=[]) if method in METHODS:
            text, given = evaluated(node.func.value, known), [evaluated(arg, known) for arg in node.args]
            return getattr(text, method)(*given) if isinstance(text, str) and None not in given else None
    return None


def of_python(source):
    """Texts that a module's top level gives names to, one of which says that it is a template."""
    known = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            known[name] = evaluated(node.value, known)
            if "template" in name.lower() and is_template(known[name]):
                yield name, known[name]


def of_json(value, path=""):
    """Texts under the key `chat_template`, wherever they are."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "chat_template" and is_template(inner):
                yield path, inner
            yield from of_json(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from of_json(inner, f"{path}/{at}")


def of_file(name, text):
    suffix = Path(name).suffix
    if suffix == ".jinja":
        return [("", text)]
    if suffix == ".json" and "chat_template" in text:
        return of_json(json.loads(text))
    if suffix == ".py" and "{%" in text:
        return of_python(text)
    return []


def of_engine():
    """Those that vLLM has for models without one."""
    for file in sorted(resources.files("vllm.transformers_utils.chat_templates").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".jinja"):
            yield f"vllm:{file.name}", file.read_text(encoding="utf-8")


def of_wheel(wheel):
    package = wheel.name.split("-")[0]
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith((".jinja", ".json", ".py")):
                text = archive.read(name).decode("utf-8-sig")
                for inside, template in of_file(name, text):
                    yield f"{package}:{Path(name).name}{'#' if inside else ''}{inside}", template


def templates(folder):
    """Distinct templates: the name of the first place of each, and its text."""
    found = {}
    for wheel in sorted(Path(folder).glob("*.whl")):
        for name, text in of_wheel(wheel):
            found.setdefault(text, name)
    for name, text in of_engine():
        found.setdefault(text, name)
    return [(name, text) for text, name in found.items()]
