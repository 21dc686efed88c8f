"""Records -> `Sample`: LLaVA's format, and those that other tools write.

A record is {"id", "image": name or names, "conversations": [{"from": "human"|"gpt", "value": text}, ...]}, with
`video` in place of `image` where there is one, and an optional `tag` (question type, for metrics). `images` and
`messages` with `role` and `content`, and a system prompt as the field `system` or as a first turn, mean the same.
Whatever is wrong with a record, an unknown key included, becomes one `BadSample` that names the row and the way out:
nothing is repaired in silence, no row is understood by half, and no other sample takes its place (the original
replaces a broken sample by a random one).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_moellava.config import Modality
from megatron_moellava.data.bad_sample import BadSample
from megatron_moellava.data.placeholders import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, in_order
from megatron_moellava.data.regions import REGION_KEYS, Region, parse_regions

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
KEYS = ("id", "conversations", "messages", "system", "image", "images", "video", "frames", "tag", *REGION_KEYS)
# About the row, not of it: LLaVA's mixes, ShareGPT and InternVL have them. They change nothing that is trained.
INERT = frozenset(
    (
        *("model", "source", "dataset", "data_source", "question_id", "split", "category", "type", "language"),
        *("license", "metadata", "width", "height", "width_list", "height_list"),
    )
)
NEAR = {  # what another key probably means -> what to do
    ("image", "img", "pic", "photo"): "name pictures in `image`",
    ("video", "clip"): "name a video in `video`",
    ("system",): "put a system prompt into `system`",
    ("conversation", "dialog", "chat", "turn", "message"): "put the turns into `conversations` or `messages`",
    ("question", "query", "instruction", "prompt", "input"): "make it the human turn of `conversations`",
    ("answer", "response", "output", "completion", "caption"): "make it the gpt turn of `conversations`",
    ("depth", "thermal", "infrared", "disparity", "radar"): "declare such pictures in data.modalities",
    ("weight", "loss", "train", "mask"): "every answer is trained alike: split or remove what is not to be trained",
    ("given twice",): "keep one of the two",
}
# Keys that rows have here or there, and placeholders: no modality may have such a name.
TAKEN = frozenset(
    (
        *(*KEYS, *INERT, "box", "point", "polygon", "prompt", "chosen", "rejected", "question", "answer", "text"),
        *("output_1", "output_2", "preference", "image_url", "path", "url"),
        *("boxes", "clear", "save", "help", "quit", "exit"),  # of a chat
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str  # "user" or "assistant"
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """A picture by name, by content, or as a frame of a video."""

    name: str  # path below the image folder, or a data: URI
    data: bytes | None = None  # the file itself, when it came from a tar
    frame: tuple[int, int] | None = None  # (i, n): the i-th of n frames spread evenly over a video
    is_still: bool = False  # of a frame: `name` and `data` are the picture itself, taken from the video before
    modality: Modality | None = None  # None: a plain picture

    @property
    def key(self) -> str:
        """Of the row that names its file."""
        if self.frame is not None and not self.is_still:
            return "video"
        return "image" if self.modality is None else self.modality.name

    @property
    def is_apart(self) -> bool:
        """Whether its modality has a tower or a projector of its own."""
        return self.modality is not None and self.modality.is_apart


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One record, checked, in the only form that the code below knows."""

    id: str
    origin: str  # "train.json row 17", for messages
    turns: tuple[Turn, ...]  # user and assistant alternate, user first
    images: tuple[ImageRef, ...] = ()  # one per `<image>` in the turns, in that order; if none, `<image>` is text
    system: str = ""  # in place of the template's own system prompt
    regions: tuple[Region, ...] = ()  # one per `<box>`, `<point>`, `<polygon>` in the turns, in that order
    box_format: str = "pixels"  # what their numbers mean: a name in box_formats.FORMATS
    leading: str = ""  # an answer before the first question: of the original's templates only `v0` keeps it
    tag: str = ""
    notes: tuple[str, ...] = ()  # what is odd about it, for the counters


def eight_frames(name: str) -> Sequence[str]:
    """Of any video, and nothing about them but their pictures."""
    return [IMAGE_PLACEHOLDER] * 8


def parse_record(
    record: dict,
    *,
    origin: str,
    max_images: int = 16,
    ignore_keys: tuple[str, ...] = (),
    frames: Callable[[str], Sequence[str]] = eight_frames,
    modalities: tuple[Modality, ...] = (),
) -> Sample:
    """Check one record; raises BadSample. `frames`: the text of each frame of a video by name, one `<image>` in each.

    `modalities`: those of the run. In the sample `<image>` stands for every picture, and `ImageRef.modality` says what it is.
    """
    if not isinstance(record, dict):
        raise BadSample("not a record", f"{origin}: a row must be a JSON object, found {type(record).__name__}")
    record = {key: value for key, value in record.items() if key not in ignore_keys}
    system, leading, turns, inline, notes = _parse_turns(*_conversation(record, origin), origin, modalities)
    own = {modality.name for modality in modalities}
    _refuse_unknown(record, {*KEYS, *INERT, *own}, origin, "data.ignore_keys=[{}] passes over it")
    images, turns = _parse_images(record, turns, inline, origin, frames, modalities)
    regions, turns = _parse_regions(record, turns, images, origin)
    if len(images) > max_images:
        raise BadSample(
            "too many images", f"{origin}: {len(images)} images, more than data.max_images={max_images}; raise it"
        )
    if not images and any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        notes.append("`<image>` without a picture")
    if not images and any(modality.placeholder in turn.text for modality in modalities for turn in turns):
        notes.append("placeholder of a modality without a picture")
    return Sample(
        id=_utf8(str(record.get("id", origin)), origin),
        origin=origin,
        turns=turns,
        images=images,
        regions=regions,
        box_format=record.get("box_format") or "pixels",
        system=_system(record, system, origin),
        leading=leading,
        tag=_utf8(str(record.get("tag", "")), origin),
        notes=tuple(notes),
    )


def _empty(value) -> bool:
    return value is None or value in ("", [], {})


def _refuse_unknown(record: dict, known: set[str], where: str, otherwise: str) -> None:
    """A key that is not read may hold half of the row; one without a value holds nothing."""
    unknown = [key for key, value in record.items() if key not in known and not _empty(value)]
    if not unknown:
        return
    key = unknown[0]
    near = (advice for words, advice in NEAR.items() if any(word in key.lower() for word in words))
    advice = next(near, None) if "given twice" not in key else NEAR[("given twice",)]
    fix = f"{advice}, or remove it" if advice else "remove it"
    also = f" (also {', '.join(map(repr, unknown[1:6]))})" if unknown[1:] else ""
    raise BadSample("unknown key", f"{where}: unknown key {key!r}{also}; {fix}; {otherwise.format(key)}")


def _conversation(record: dict, origin: str) -> tuple[str, list]:
    """(name of the field, turns)"""
    found = [name for name in ("conversations", "messages") if record.get(name) is not None]
    if len(found) == 2:
        raise BadSample("no conversation", f"{origin}: has both `conversations` and `messages`; keep one of them")
    turns = record[found[0]] if found else None
    if not isinstance(turns, list) or not turns:
        keys = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        raise BadSample(
            "no conversation",
            f"{origin}: `conversations` must be a non-empty list of turns (or `messages`); the row's keys are {keys}: "
            'write {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}',
        )
    return found[0], turns


def _parse_turns(
    name: str, conversation: list, origin: str, modalities: tuple[Modality, ...]
) -> tuple[str, str, tuple[Turn, ...], list[ImageRef], list[str]]:
    """(system prompt, answer before the first question, turns, pictures named inside of turns, notes)"""
    system, leading, inline = "", "", []
    turns: list[Turn] = []
    notes: list[str] = []
    for number, turn in enumerate(conversation):
        where = f"{origin}: turn {number} of `{name}`"
        role, text, pictures = _parse_turn(turn, where, modalities)
        if role == "system":
            if number:
                raise BadSample("unknown role", f"{where} is a system prompt; only the first turn may be one")
            system = text
            continue
        if not turns and role == "assistant" and not notes:
            notes.append("leading answer dropped")  # as in the original, `v0` apart
            leading = "" if pictures or IMAGE_PLACEHOLDER in text else text
            continue
        turns.append(Turn(role=role, text=text))
        inline += pictures
    if any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        raise BadSample(
            "roles do not alternate", f"{origin}: turns must alternate human, gpt, human, gpt; found a repetition"
        )
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if not any(answer.strip() for answer in answers):
        raise BadSample("empty answer", f"{origin}: no answer to learn from; remove the row or fill the gpt turn")
    if not all(answer.strip() for answer in answers):
        notes.append("empty answer among others")
    if turns[-1].role == "user":
        notes.append("question without an answer")
    return system, leading, tuple(turns), inline, notes


def _parse_turn(turn, where: str, modalities: tuple[Modality, ...]) -> tuple[str, str, list[ImageRef]]:
    """(role, text, pictures named in it) of {"from", "value"} or {"role", "content"}."""
    if not isinstance(turn, dict):
        raise BadSample("malformed turn", f"{where} must be an object with `from` and text `value`")
    keys = ("from", "value") if "from" in turn or "value" in turn else ("role", "content")
    _refuse_unknown(turn, {*keys}, where, "an answer would be trained without it")
    speaker, content = (turn.get(key) for key in keys)
    pictures: list[ImageRef] = []
    if isinstance(content, list):
        content, pictures = _parse_parts(content, where, modalities)
    if not isinstance(content, str):
        found = f"found {type(content).__name__}" if keys[1] in turn else f"its keys are {list(turn)[:6]}"
        raise BadSample(
            "malformed turn", f"{where} must be an object with `from` and text `value` (or `role`, `content`); {found}"
        )
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadSample(
            "unknown role",
            f"{where} is from {speaker!r}; use 'human' or 'gpt' (or 'user', 'assistant', and 'system' for the first)",
        )
    if role == "system" and (pictures or IMAGE_PLACEHOLDER in content):
        raise BadSample("malformed turn", f"{where}: a system prompt cannot hold a picture; move it to a human turn")
    return role, _utf8(content, where), pictures


def _parse_parts(parts: list, where: str, modalities: tuple[Modality, ...]) -> tuple[str, list[ImageRef]]:
    """(text with a placeholder per picture, each on its line; pictures named here) of OpenAI's content parts."""
    lines, pictures = [], []
    own = {modality.name: modality for modality in modalities}
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _refuse_unknown(part, {"type", "text"}, where, "it would be lost")
            lines.append(part["text"])
            continue
        if not isinstance(kind, str) or kind not in ("image", "image_url", *own):
            raise BadSample("malformed turn", f"{where}: a part of its content is {kind!r}; use 'text' or 'image'")
        modality = own.get(kind)
        lines.append(modality.placeholder if modality else IMAGE_PLACEHOLDER)
        keys = (*((kind,) if modality else ("image", "image_url")), "path", "url")
        _refuse_unknown(part, {"type", *keys}, where, "it would be lost")
        names = [part[key] for key in keys if not _empty(part.get(key))]
        pictures += [ImageRef(name=_name(value, kind, where), modality=modality) for value in names]
        if len(names) > 1:
            raise BadSample("malformed turn", f"{where}: a picture has several names; keep one")
    return "\n".join(lines), pictures


def _system(record: dict, turn: str, origin: str) -> str:
    field = record.get("system")
    if not _empty(field) and not isinstance(field, str):
        raise BadSample("malformed turn", f"{origin}: `system` must be text, found {type(field).__name__}")
    if field and turn and field != turn:
        raise BadSample("malformed turn", f"{origin}: has a `system` and another system turn; keep one")
    return _utf8(field or turn, origin)


def _parse_images(
    record: dict,
    turns: tuple[Turn, ...],
    inline: list[ImageRef],
    origin: str,
    frames: Callable,
    modalities: tuple[Modality, ...],
):
    """(one ImageRef per `<image>`, turns). Without any picture `<image>` and the placeholders of modalities are text."""
    others = [ref for ref in inline if ref.modality is not None]
    for modality in modalities:
        names = _names(record.get(modality.name), modality.name, origin)
        others += [ImageRef(name=name, modality=modality) for name in names]
        if names and inline:
            raise BadSample(
                "image and video",
                f"{origin}: has pictures in both `{modality.name}` and the content of the turns; keep one of them",
            )
    images, turns = _plain_images(record, turns, inline, origin, frames, beside=bool(others))
    if not modalities or not (images or others):
        return images, turns
    ordered, texts = in_order([*images, *others], modalities, [turn.text for turn in turns], origin)
    return tuple(ordered), tuple(replace(turn, text=text) for turn, text in zip(turns, texts, strict=True))


def _plain_images(
    record: dict, turns: tuple[Turn, ...], inline: list[ImageRef], origin: str, frames: Callable, beside: bool
):
    """(one ImageRef per `<image>`, turns). Without any picture, also not `beside` them, `<image>` is text."""
    given = {key: _names(record.get(key), key, origin) for key in ("image", "images", "video")}
    used = [key for key, names in given.items() if names] + ["content of the turns"] * bool(inline)
    if len(used) > 1:
        raise BadSample(
            "image and video",
            f"{origin}: has pictures in both `{used[0]}` and `{used[1]}`; keep one, or split it into two rows",
        )
    field = used[0] if used else next((key for key in given if record.get(key) is not None), None)
    if field == "video":
        return _parse_video(given["video"], turns, origin, frames)
    images = tuple(ref for ref in inline if ref.modality is None)
    images = images or tuple(ImageRef(name=name) for name in (*given["image"], *given["images"]))
    images = _as_frames(record.get("frames"), images, origin)
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if (field is not None or beside) and placeholders != len(images):
        field = field or "image"
        raise BadSample(
            "image count",
            f"{origin}: {placeholders} `<image>` in the conversation but {len(images)} in `{field}`; "
            "write one `<image>` per image, in order"
            + ("" if images or beside else f", or remove `{field}` from a row whose text speaks of `<image>`"),
        )
    return images, turns


def frame_counts(places: Iterable[tuple[int, int] | None]) -> list[int]:
    """The field `frames` of a row with these pictures, by the `ImageRef.frame` of each; [] without a video."""
    counts = [place[1] if place else 0 for place in places if place is None or place[0] == 0]
    return counts if any(counts) else []


def _as_frames(counts, images: tuple[ImageRef, ...], origin: str) -> tuple[ImageRef, ...]:
    """`frames` of a row of shards: how many pictures, one after the other, are the frames of each video; 0 for a picture."""
    if _empty(counts):
        return images
    good = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
    if not good or sum(n or 1 for n in counts) != len(images):
        raise BadSample(
            "image count",
            f"{origin}: `frames` is {counts!r:.80} for {len(images)} pictures; give the frames of each video",
        )
    places = [(i, n) if n else None for n in counts for i in range(n or 1)]
    return tuple(
        replace(image, frame=place, is_still=place is not None) for image, place in zip(images, places, strict=True)
    )


def _parse_video(names: list[str], turns: tuple[Turn, ...], origin: str, frames: Callable[[str], Sequence[str]]):
    found = sum(turn.text.count(VIDEO_PLACEHOLDER) for turn in turns)
    stills = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if stills or found != len(names):
        raise BadSample(
            "image count",
            f"{origin}: {found} `<video>` and {stills} `<image>` in the conversation but {len(names)} in `video`; "
            "write one `<video>` per video, in order, and no `<image>`",
        )
    shown = [(name, frames(name)) for name in names]
    waiting = ("".join(texts) for _, texts in shown)
    turns = tuple(
        Turn(role=turn.role, text=re.sub(VIDEO_PLACEHOLDER, lambda _: next(waiting), turn.text)) for turn in turns
    )
    return tuple(ImageRef(name=name, frame=(i, len(texts))) for name, texts in shown for i in range(len(texts))), turns


def _parse_regions(record: dict, turns: tuple[Turn, ...], images: tuple[ImageRef, ...], origin: str):
    """(regions, turns). A frame of a video has no boxes: which frame it would be no row says."""
    if all(_empty(record.get(key)) for key in REGION_KEYS):
        return (), turns
    if any(ref.frame is not None for ref in images):
        raise BadSample("malformed box", f"{origin}: boxes in a video are not supported; name a frame in `image`")
    regions, texts = parse_regions(record, [turn.text for turn in turns], len(images), origin)
    return regions, tuple(replace(turn, text=text) for turn, text in zip(turns, texts, strict=True))


def _names(value, key: str, origin: str) -> list[str]:
    if value is None or value == "":
        return []
    return [_name(name, key, origin) for name in (value if isinstance(value, list) else [value])]


def _name(value, key: str, origin: str) -> str:
    """A name, also as {"path": name}, {"url": name} or {"bytes": data: URI, "path": its old name}."""
    if isinstance(value, dict):
        value = next((value[part] for part in ("bytes", "path", "url") if value.get(part)), None)
    if not isinstance(value, str) or not value:
        raise BadSample("malformed image field", f"{origin}: `{key}` must be a name or a list of names")
    return _utf8(value, origin)


def _utf8(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: the file held bytes that are not UTF-8
        raise BadSample("invalid UTF-8", f"{where}: text is not valid UTF-8; re-encode the file") from None
    return text
