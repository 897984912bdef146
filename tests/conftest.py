"""What every test may use."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from cubins import Cubins
from ranks import Ranks
from tiny import make_corpus

# The first call of a torch operator takes longer than hypothesis's default of 200 ms.
hypothesis.settings.register_profile("ptrl", deadline=None)
hypothesis.settings.load_profile("ptrl")


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
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Cubins:
    return Cubins(tmp_path_factory.mktemp("cubins"))
