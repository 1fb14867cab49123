"""One export and one server with an API key for the whole room."""

import pytest

from tests.serve.made import API_KEY, load_made, save_made


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    return save_made(tmp_path_factory.mktemp("served") / "export")


@pytest.fixture(scope="session")
def robot(export):
    """Computes the right answers: another copy than the served one."""
    return load_made(export)[0]


@pytest.fixture(scope="session")
def port(export):
    """A server for everybody, which wants API_KEY."""
    from recap_ds.serve.run import metadata_of, serving
    from recap_ds.serve.server import ServerSettings

    served, record = load_made(export)
    settings = ServerSettings(port=0, api_key=API_KEY, max_clients=20, max_message_bytes=200_000, ping_seconds=5.0)
    with serving(served, metadata_of(served, record), settings) as port:
        yield port
