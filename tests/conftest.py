"""What every test may use."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from cubins import Cubins
from ranks import Ranks
from saved_run import make_saved_run
from scoring import make_data, reference_settings
from slurm_cluster import SlurmCluster, missing_programs
from tiny import Settings, make_corpus, run_tiny

# The first call of a torch operator takes longer than hypothesis's default of 200 ms.
hypothesis.settings.register_profile("ptrl", deadline=None)
hypothesis.settings.load_profile("ptrl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the test's new tensors are, without its saying so."""
    if request.param != "cpu":
        torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The session's pool of processes: `ranks.run(world_size, function, *args)`."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of the tiny tokenized corpus."""
    return make_corpus(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def saved_run(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run with checkpoints at steps 4 and 8; tests copy it."""
    return make_saved_run(ranks, prefix, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Cubins:
    """What nvcc makes of the CUDA sources, each compiled once for an architecture."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cubins"
    folder.mkdir(exist_ok=True)
    return Cubins(folder)


@pytest.fixture(scope="session")
def reference(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a finished run on the tiny corpus, to score with."""
    settings = reference_settings(prefix, tmp_path_factory.mktemp("reference") / "run")
    run_tiny(ranks, 1, settings)
    return settings


@pytest.fixture(scope="session")
def unscored(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a few documents of very different lengths, by the tiny corpus's tokenizer."""
    return make_data(tmp_path_factory.mktemp("unscored"), prefix + ".tokenizer.json")


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Started for the first test that wants it."""
    if missing := missing_programs():
        pytest.skip(f"there is no {', '.join(missing)}; Debian has them in slurm-wlm, munge and util-linux")
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster with nothing to do, and Slurm's commands of this test are for it."""
    # What a job has that these tests are run in would be taken for one of the test's own.
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.configuration))
    slurm_cluster.clear()
    return slurm_cluster
