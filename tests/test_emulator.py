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
RIGHT_CLUSTER, NO_FIRST, NO_LAST, MISSED_CLUSTER, NOT_ARRIVED, NOT_WAITED, COPIED, LATE, NEVER = range(5, 14)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("mistakes") / "mistakes.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(FOLDER / "mistakes.cpp"), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.run.restype = ctypes.c_char_p
    return library


def run(library: ctypes.CDLL, kernel: int, seed: int, blocks: int = 1) -> list[int] | str:
    out = (ctypes.c_int * THREADS)()
    failure = library.run(kernel, blocks, seed, out)
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


def test_clusters_need_a_barrier_before_they_look_at_each_other(library):
    assert all(run(library, RIGHT_CLUSTER, seed, blocks=2)[:2] == [1, 0] for seed in range(20))
    found = [run(library, NO_FIRST, seed, blocks=2)[:2] for seed in range(20)]
    assert sum(pair != [1, 0] for pair in found) > 10


@pytest.mark.parametrize(
    "kernel, says",
    [
        (NO_LAST, "a block may end while a peer looks at its shared memory"),
        (MISSED_CLUSTER, "a finished thread is waited for"),
        (NOT_ARRIVED, "a thread waits at a cluster barrier before it arrives"),
        (NOT_WAITED, "a thread ends between arriving at a cluster barrier and waiting"),
    ],
)
def test_a_cluster_barrier_that_cannot_be_is_an_error(library, kernel, says):
    assert all(run(library, kernel, seed, blocks=2) == says for seed in range(20))


def test_a_copy_arrives_when_it_is_waited_for(library):
    assert run(library, COPIED, 0) == list(range(THREADS))
    assert run(library, LATE, 0) == [-1] * THREADS
    assert run(library, NEVER, 0) == "a copy is not waited for"
