"""What ``attend.c`` compiles to, made once a machine by the C compiler that is there."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from spectral_compile.files import cache_folder

SOURCE = Path(__file__).with_name("attend.c")
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-shared", "-fPIC")
WISHES = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())  # the first that a compiler knows
MISSING = (
    "no C compiler made the code for attention on this CPU, so it runs in PyTorch and takes several times as long: install gcc"
    " or clang, or name one in CC"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None and a warning where there is no compiler, or none that makes it."""
    compiler = shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError):
        warnings.warn(MISSING, stacklevel=2)
        return None


def _compiled(compiler: list[str]) -> Path:
    """The file of this source, compiler and processor; compiled if there is none yet."""
    if not compiler:
        raise FileNotFoundError
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + version + _processor().encode() + repr((FLAGS, WISHES)).encode())
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp())
    file = folder / f"attend-{key.hexdigest()[:16]}.so"
    if file.exists():
        return file
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / file.name
        for wish in WISHES:
            done = subprocess.run([*compiler, *FLAGS, *wish, str(SOURCE), "-o", str(made), "-lm"], capture_output=True)
            if done.returncode == 0:
                break
        done.check_returncode()
        os.replace(made, file)  # whole, whoever else makes it
    return file


def _processor() -> str:
    """What tells processors apart for which other instructions are compiled."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return "\n".join({platform.machine(), platform.processor(), *(x for x in lines if x.startswith(("flags", "Features")))})
