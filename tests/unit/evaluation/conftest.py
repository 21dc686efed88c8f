"""A judge that several tests ask."""

import pytest

from tests.helpers.judge_server import StubJudge


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started = []

    def start(script, **more):
        started.append(StubJudge(script, **more))
        return started[-1]

    yield start
    for each in started:
        each.server.shutdown()
        each.server.server_close()
