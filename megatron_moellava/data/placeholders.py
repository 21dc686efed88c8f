"""What stands in a text for a picture or a video, and where the pictures of a conversation belong.

In a row each kind of pictures has a placeholder of its own, `<image>` or that of a modality. Below, `<image>` stands for every
picture, in order; the pictures themselves say what they are.
"""

import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_moellava.config import Modality
from megatron_moellava.data.bad_sample import BadSample

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
PLACEHOLDER = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}")


def placed(text: str, shown: Sequence[str]) -> str | None:
    """`text` with what is shown in its places; None unless it has one place for each.

    >>> placed("is <image> in <video>?", ["<image>", "<image><image>"])
    'is <image> in <image><image>?'
    """
    if len(PLACEHOLDER.findall(text)) != len(shown):
        return None
    waiting = iter(shown)
    return PLACEHOLDER.sub(lambda _: next(waiting), text)


def any_of(placeholders: Iterable[str]) -> re.Pattern:
    """Finds each of these and those of pictures and videos."""
    kinds = dict.fromkeys((*placeholders, IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER))
    return re.compile("|".join(map(re.escape, kinds)))


def in_places(text: str, placeholders: Sequence[str]) -> list[int] | None:
    """Which of the things with these placeholders stands in each place of `text`; None unless there is one place for each.

    >>> in_places("is <image> in <depth>?", ["<depth>", "<image>"])
    [1, 0]
    """
    found = any_of(placeholders).findall(text)
    if Counter(found) != Counter(placeholders):
        return None
    waiting = {kind: deque(i for i, other in enumerate(placeholders) if other == kind) for kind in placeholders}
    return [waiting[kind].popleft() for kind in found]


def with_placeholders(texts: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The texts as a row has them: with the placeholder of each picture's own kind for its `<image>`; as they are without
    pictures.

    >>> with_placeholders(["<image> and <image>?", "No <image>."], ["depth", "image", "depth"])
    ['<depth> and <image>?', 'No <depth>.']
    """
    if not kinds:
        return list(texts)
    waiting = iter(kinds)
    return [re.sub(IMAGE_PLACEHOLDER, lambda _: f"<{next(waiting)}>", text) for text in texts]


def in_order(
    pictures: Sequence[Any], modalities: tuple[Modality, ...], texts: Sequence[str], origin: str
) -> tuple[list, list[str]]:
    """(pictures in the order of their placeholders, texts with `<image>` for each of them).

    `pictures`: in order within each kind; their `modality` says which. Raises BadSample where there are more or fewer than
    places.
    """
    waiting = {IMAGE_PLACEHOLDER: deque(picture for picture in pictures if picture.modality is None)}
    for modality in modalities:
        waiting[modality.placeholder] = deque(picture for picture in pictures if picture.modality == modality)
        found, there = sum(text.count(modality.placeholder) for text in texts), len(waiting[modality.placeholder])
        if found != there:
            raise BadSample(
                "image count",
                f"{origin}: {found} `{modality.placeholder}` in the conversation but {there} in `{modality.name}`; write one "
                f"`{modality.placeholder}` per picture, in order",
            )
    ordered: list = []

    def take(place: re.Match) -> str:
        ordered.append(waiting[place[0]].popleft())
        return IMAGE_PLACEHOLDER

    pattern = re.compile("|".join(map(re.escape, waiting)))
    return ordered, [pattern.sub(take, text) for text in texts]
