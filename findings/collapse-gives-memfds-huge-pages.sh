#!/usr/bin/env bash
# Linux (6.1 and newer; seen on 6.18): a memfd gets huge pages by MADV_COLLAPSE although
# /sys/kernel/mm/transparent_hugepage/shmem_enabled is "never" and MADV_HUGEPAGE gives it none.
#
# A good guess was: with shmem_enabled at "never", shared memory has pages of 4 KiB, whatever a process asks for.
# Seen instead, with numpy 2.1.3 as the process that uses the memory:
#   - MADV_HUGEPAGE and a first touch: no huge page (as the setting says);
#   - MADV_COLLAPSE of a range without any page: EINVAL;
#   - one page of each 2 MiB touched, then MADV_COLLAPSE of all: all of it in huge pages, contents kept.
# It fails where any of that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.1.3
setting=$(cat /sys/kernel/mm/transparent_hugepage/shmem_enabled)
echo "kernel $(uname -r), shmem_enabled: $setting"
case $setting in
    *'[never]'*) ;;
    *) echo "this shows what happens where the setting is never: nothing to see here" && exit 0 ;;
esac
"$folder/venv/bin/python" - <<'PYTHON'
import ctypes
import errno
import mmap
import os

import numpy

HUGE, BYTES = 2 << 20, 64 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def mapped():
    """A memfd of 64 MiB on a boundary of 2 MiB: its address, and the memory as an array."""
    fd = os.memfd_create("finding")
    os.ftruncate(fd, BYTES)
    room = libc.mmap(None, BYTES + HUGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    libc.munmap(room, BYTES + HUGE)
    address = (room + HUGE - 1) // HUGE * HUGE
    assert libc.mmap(address, BYTES, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0) == address
    return address, numpy.ctypeslib.as_array((ctypes.c_uint8 * BYTES).from_address(address))


def advise(address, advice):
    return errno.errorcode[ctypes.get_errno()] if libc.madvise(address, BYTES, advice) else "ok"


def huge_kib(address):
    """KiB of the mapping that huge pages map."""
    inside = False
    for line in open("/proc/self/smaps"):
        if line.startswith(f"{address:x}-"):
            inside = True
        elif inside and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1])
    raise SystemExit("the mapping is not in /proc/self/smaps")


address, memory = mapped()
print("MADV_HUGEPAGE:", advise(address, MADV_HUGEPAGE))
memory[:] = 1
touched = huge_kib(address)
print("touched after MADV_HUGEPAGE:", touched, "KiB in huge pages")

address, memory = mapped()
empty = advise(address, MADV_COLLAPSE)
print("MADV_COLLAPSE of no page:", empty)
memory[::HUGE] = 7
collapsed = advise(address, MADV_COLLAPSE)
huge = huge_kib(address)
kept = bool((memory[::HUGE] == 7).all()) and int(memory.sum(dtype=numpy.uint64)) == 7 * (BYTES // HUGE)
print("MADV_COLLAPSE with one page in each 2 MiB:", collapsed, huge, "KiB in huge pages; contents kept:", kept)
assert (touched, empty, collapsed, huge, kept) == (0, "EINVAL", "ok", BYTES // 1024, True)
print("as described")
PYTHON
