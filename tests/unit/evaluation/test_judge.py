"""The judge's server: asked again when busy, never sent the key elsewhere."""

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.evaluation.judge import Judge, JudgeError


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(stub):
    server = stub([429, 500, "fine"])
    assert server.judge().ask([], temperature=0.0, max_tokens=1).text == "fine"
    server.script = [401, "never"]
    with pytest.raises(JudgeError, match="HTTP 401"):
        server.judge().ask([], temperature=0.0, max_tokens=1)
    assert server.script == ["never"]


def test_the_key_travels_as_a_bearer_token_and_only_when_set(stub, monkeypatch):
    server = stub(["a", "b"])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.judge().ask([], temperature=0.0, max_tokens=1)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.judge(key_variable="JUDGE_KEY").ask([], temperature=0.0, max_tokens=1)
    assert "Authorization" not in server.headers[0]
    assert server.headers[1]["Authorization"] == "Bearer secret"


def test_a_redirect_is_not_followed_with_the_key(stub):
    server = stub([302, "stolen"])
    with pytest.raises(JudgeError, match="HTTP 302"):
        server.judge().ask([], temperature=0.0, max_tokens=1)
    assert len(server.requests) == 1


def test_an_unreachable_judge_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    judge = Judge(url="http://127.0.0.1:9/v1", model="m", retries=0)
    with pytest.raises(JudgeError, match=r"judge\.url=http://127\.0\.0\.1:9/v1"):
        judge.ask([], temperature=0.0, max_tokens=1)


def test_a_judge_needs_an_http_address_and_a_model():
    with pytest.raises(ConfigError, match=r"judge\.url='file:///etc/passwd'"):
        Judge(url="file:///etc/passwd", model="m")
    with pytest.raises(ConfigError, match=r"judge\.model is empty"):
        Judge(url="http://localhost/v1", model="")
