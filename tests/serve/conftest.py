"""The server of most tests. Each file skips itself where a package that the server needs is not installed."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _texts_do_not_end():
    """A model with random weights would end a text anywhere."""
    from resnet_bk.data.byte_text import ByteText

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ByteText, "end", -1)
        yield


@pytest.fixture(scope="session")
def model():
    from serving import tiny

    return tiny(depth={"policy": "exit", "threshold": 0.8})


@pytest.fixture(scope="session")
def client(model):
    from serving import serving

    with serving(model) as client:
        yield client
