"""A conversation in the terminal."""

import base64
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_moellava.config import DataError
from megatron_moellava.data.images import open_image
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, Turn
from megatron_moellava.inference.requests import Request, Sampling

HELP = """/image FILE   show a picture with the next question (several times: several pictures)
/clear        begin a new conversation
/save FILE    write the conversation as a LLaVA record (JSON)
/help         this list
/quit         leave (or Ctrl-D)"""


@dataclass(slots=True)
class Conversation:
    """One conversation with its pictures; /clear begins another."""

    engine: Any  # with `stream` and `cancel`: an Engine, or one that tells other ranks
    sampling: Sampling
    turns: list[Turn] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    pending: list[tuple[str, Image.Image]] = field(default_factory=list)  # shown with the next question
    _numbers: itertools.count = field(default_factory=itertools.count)

    def show(self, file: str) -> None:
        """Raises DataError when it is no readable picture."""
        file = os.path.abspath(os.path.expanduser(file.strip("\"'")))  # a later `cd` must not lose it
        image, _ = open_image(file, file)
        self.pending.append((file, image))

    def clear(self) -> None:
        """Forget turns and pictures, also those not yet asked about."""
        for part in (self.turns, self.images, self.names, self.pending):
            part.clear()

    def ask(self, question: str, say: Callable[[str], None]) -> str:
        """The answer, said piece by piece on the way. Interrupted or refused, the question is as if not asked."""
        text = f"{IMAGE_PLACEHOLDER}\n" * len(self.pending) + question.replace(IMAGE_PLACEHOLDER, "< image >")
        turns = (*self.turns, Turn(role="user", text=text))
        request = Request(
            id=str(next(self._numbers)),
            turns=turns,
            images=(*self.images, *(image for _, image in self.pending)),
            sampling=self.sampling,
        )
        answer = ""
        try:
            for event in self.engine.stream(request):
                say(event.delta)
                answer += event.delta
        except KeyboardInterrupt:
            self.engine.cancel(request.id)
            say(" [interrupted]")
        self.turns = [*turns, Turn(role="assistant", text=answer)]
        self.names += [name for name, _ in self.pending]
        self.images += [image for _, image in self.pending]
        self.pending.clear()
        return answer

    def save(self, file: str) -> None:
        """A record that training reads as it is: names below the file's folder, other pictures inside of it."""
        speakers = {"user": "human", "assistant": "gpt"}
        folder = Path(file).expanduser().resolve().parent
        record: dict = {"id": Path(file).stem, "conversations": []}
        if self.names:
            record["image"] = [_portable(name, folder) for name in self.names]
        for turn in self.turns:
            text = turn.text if turn.role == "user" else turn.text.replace(IMAGE_PLACEHOLDER, "< image >")
            record["conversations"].append({"from": speakers[turn.role], "value": text})
        content = json.dumps([record], ensure_ascii=False, indent=1) + "\n"
        Path(file).expanduser().write_text(content, encoding="utf-8")


def _portable(name: str, folder: Path) -> str:
    path = Path(name).expanduser().resolve()
    if path.is_relative_to(folder):
        return str(path.relative_to(folder))
    return "data:;base64," + base64.b64encode(path.read_bytes()).decode()


def run_chat(conversation: Conversation, images: list[str]) -> None:
    """Read lines until the end of the input."""
    for file in images:
        conversation.show(file)
    print(f"Type a question, or /help.{_shown(conversation)}", flush=True)
    while (line := _read()) is not None:
        line = line.strip()
        if line in ("/quit", "/exit"):
            return
        if line:
            try:
                _obey(conversation, line)
            except (DataError, OSError) as error:
                print(f"{error}", flush=True)


def _read() -> str | None:
    try:
        return input("you> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _obey(conversation: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/image" and argument:
        conversation.show(argument)
        print(_shown(conversation).strip())
    elif command == "/clear":
        conversation.clear()
        print("A new conversation.")
    elif command == "/save" and argument:
        conversation.save(argument)
        print(f"Saved to {argument}.")
    elif command.startswith("/"):
        print(HELP)
    else:
        conversation.ask(line, _say)
        print(flush=True)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _shown(conversation: Conversation) -> str:
    count = len(conversation.pending)
    return f" {count} picture{'s' if count > 1 else ''} with the next question." if count else ""
