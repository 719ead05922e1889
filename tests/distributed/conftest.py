import pytest
from crew import Crew


@pytest.fixture(scope="session")
def crew(tmp_path_factory):
    members = Crew(tmp_path_factory.mktemp("crew"), 3)
    yield members
    members.dismiss()
