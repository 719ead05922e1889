import pytest
from workers import Workers


@pytest.fixture(scope="session")
def workers(tmp_path_factory):
    pool = Workers(tmp_path_factory.mktemp("workers"), 3)
    yield pool
    pool.terminate()
