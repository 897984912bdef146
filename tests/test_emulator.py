"""The emulation of thread blocks shows the mistakes it is there for."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
FOLDER = Path(__file__).parent / "cuda_emulation"
THREADS = 64
RIGHT, NO_BARRIER, MISSED, FINISHED, DIFFERENT = range(5)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("mistakes") / "mistakes.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(FOLDER / "mistakes.cpp"), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.run.restype = ctypes.c_char_p
    return library


def run(library: ctypes.CDLL, kernel: int, seed: int) -> list[int] | str:
    out = (ctypes.c_int * THREADS)()
    failure = library.run(kernel, seed, out)
    return list(out) if failure is None else failure.decode()


def test_a_missing_barrier_is_a_wrong_result(library):
    expected = [thread ^ 32 for thread in range(THREADS)]
    assert all(run(library, RIGHT, seed) == expected for seed in range(20))
    assert all(run(library, NO_BARRIER, seed) != expected for seed in range(20))


@pytest.mark.parametrize(
    "kernel, says",
    [
        (MISSED, "a finished thread is waited for"),
        (FINISHED, "a finished thread is waited for"),
        (DIFFERENT, "threads meet in different calls"),
    ],
)
def test_a_meeting_that_cannot_be_is_an_error(library, kernel, says):
    assert all(run(library, kernel, seed) == says for seed in range(20))
