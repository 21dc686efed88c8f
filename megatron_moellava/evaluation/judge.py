"""A language model as judge, behind any server that speaks OpenAI's /chat/completions.

Scores of different judges are not comparable (LLaVA-Bench went from 63 to 87-97 between two papers for that reason
alone), so that a judge always carries its label: the model name that the server reported, not the one asked for, and
the server's host. The label goes into every score, review and table.
"""

import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_moellava.config import ConfigError, MoELlavaError

_RETRIED_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})
logger = logging.getLogger(__name__)


class JudgeError(MoELlavaError):
    """The judge cannot be reached or refuses; what it has judged so far is kept."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow a redirect with all headers, and so hand the key to another host."""

    def redirect_request(self, *args: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What the judge said, and who it says it is."""

    text: str
    model: str  # as the server names it


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """A chat-completions server with its model and its patience. ConfigError for a URL that is not HTTP, or no model."""

    url: str  # base, e.g. "https://api.openai.com/v1"; "/chat/completions" is appended
    model: str
    key_variable: str = "OPENAI_API_KEY"  # environment variable with the bearer token; unset: no header
    timeout_seconds: float = 120.0
    retries: int = 5
    first_wait_seconds: float = 0.5  # doubles with every retry
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise ConfigError(
                f"judge.url={self.url!r}: must start with http:// or https://, as https://api.openai.com/v1"
            )
        if not self.model:
            raise ConfigError("judge.model is empty: name the model that judges, as the server lists it")

    def ask(self, messages: Sequence[dict], *, temperature: float, max_tokens: int) -> Reply:
        """One completion. Waits and retries when the server is busy; JudgeError when it stays so or refuses."""
        body = json.dumps(
            {"model": self.model, "messages": list(messages), "temperature": temperature, "max_tokens": max_tokens}
        ).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._ask_once(body)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
                if error.code not in _RETRIED_STATUS:
                    break
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                problem = str(error)
            if attempt < self.retries:
                logger.warning("judge %s: %s; trying again", self.url, problem)
                time.sleep(self.first_wait_seconds * 2**attempt)
        raise JudgeError(
            f"judge.url={self.url}, judge.model={self.model}: {problem}; run again to go on where it stopped"
        )

    def _ask_once(self, body: bytes) -> Reply:
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", data=body, method="POST")
        request.add_header("Content-Type", "application/json")
        if key := os.environ.get(self.key_variable):
            request.add_header("Authorization", f"Bearer {key}")
        for name, value in self.headers.items():
            request.add_header(name, value)
        with _OPENER.open(request, timeout=self.timeout_seconds) as response:
            payload = response.read()
        try:
            answer = json.loads(payload)
            return Reply(
                text=answer["choices"][0]["message"]["content"] or "",
                model=answer.get("model") or f"{self.model} (asked)",
            )
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise JudgeError(
                f"judge.url={self.url} answered without choices[0].message.content: {payload[:300]!r}"
            ) from error

    @property
    def host(self) -> str:
        """The server's host and port, without credentials."""
        return urllib.parse.urlsplit(self.url).netloc.rpartition("@")[2]
