"""What every test may use."""

from collections.abc import Iterator

import hypothesis
import pytest
from ranks import Ranks
from tiny import make_corpus

# The first call of a torch operator takes longer than hypothesis's default of 200 ms.
hypothesis.settings.register_profile("ptrl", deadline=None)
hypothesis.settings.load_profile("ptrl")


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
