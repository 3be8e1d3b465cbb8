"""A hub of this test's own, in place of huggingface.co."""

import pytest
from huggingface_hub import constants

from jaxgpt.hub import client, datasets, models
from tests.hub.fake_hub import FakeHub, serve


def forget() -> None:
    """As in a new process: nothing is known of the hub but what is on disk."""
    for remembered in (client.repository, datasets.dataset_files, models._folder):
        remembered.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.chdir(tmp_path)
    forget()
    with serve(fake) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        yield fake
    forget()
