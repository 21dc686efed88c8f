"""How the benchmarks read an answer before they compare it.

`evalai` is the normaliser that the original applies for VQAv2, VisWiz and TextVQA (its m4c_evaluator, which comes from
MMF's copy of the VQA evaluation). It is not the server's own normaliser, and its oddities are kept because they change
scores: commas and question marks go before anything else, "'s" is split off, "she'd" is never restored from "shed", and
at most 32 full stops are removed (the original passes re.UNICODE, which is 32, where re.sub expects a count).
"""

import re

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # in the original's order
_LONE_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32

# The words whose apostrophes are put back. With one apostrophe, the spelling without it is corrected ("dont"); with
# several, every spelling that lacks exactly one of them ("couldnt've", "couldn'tve").
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    table = {"somebody'd": "somebodyd"}  # reversed in the original, so reversed here
    for word in _CONTRACTED.split():
        places = [index for index, letter in enumerate(word) if letter == "'"]
        table |= {word[:index] + word[index + 1 :]: word for index in places}
    return table


_CONTRACTIONS = _contractions()


def evalai(answer: str) -> str:
    """`"Two  dogs, and a cat."` -> `"2 dogs and cat"`."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _strip_punctuation(text: str) -> str:
    """A mark beside a blank disappears; one inside a word ("black-and-white") becomes a blank."""
    stripped = text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_blank else " ")
    return _LONE_FULL_STOP.sub("", stripped, count=_MOST_FULL_STOPS)


def gqa(answer: str) -> str:
    """Trailing full stops go, lower case; nothing else, as GQA's own evaluation compares exact strings."""
    return answer.rstrip(".").lower()


def mme(answer: str) -> str:
    """Yes, no or other, by the first four characters, as MME's calculation.py reads it."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def option_letter(answer: str) -> str:
    """ScienceQA's extraction: a bare letter A to E, "B. ...", or exactly one "The answer is B."; else "".

    In the last form the original accepts any capital letter and any character after it.
    """
    if answer in ("A", "B", "C", "D", "E"):
        return answer
    if len(answer) >= 3 and answer[0] in "ABCDE" and answer[1:3] == ". ":
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else ""


def textvqa_question(prompt: str) -> str:
    """The question inside a TextVQA prompt, lower-cased: the line that is neither OCR tokens nor the instruction."""
    if match := re.match(r"OCR tokens: .*?Question: (.*?) Short answer:", prompt, re.DOTALL):
        return match.group(1).lower()
    lines = prompt.split("\n")
    first_is_ocr = lines[0].startswith("Reference OCR token:") and len(lines) > 1
    return lines[1 if first_is_ocr else 0].lower()
