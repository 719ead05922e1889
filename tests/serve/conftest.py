"""The server of most tests. Each file skips itself where a package that the server needs is not installed."""

import pytest


@pytest.fixture(autouse=True)
def _texts_do_not_end(monkeypatch):
    """A model with random weights would end a text anywhere."""
    monkeypatch.setattr("resnet_bk.data.byte_text.ByteText.end", -1)


@pytest.fixture(scope="session")
def model():
    from serving import tiny

    return tiny(depth={"policy": "exit", "threshold": 0.8})


@pytest.fixture(scope="session")
def client(model):
    from serving import serving

    with serving(model) as client:
        yield client
