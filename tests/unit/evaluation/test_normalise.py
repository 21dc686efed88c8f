"""The normalisers, with what the original's code gives for the same strings (worked out by hand from its rules)."""

import pytest

from megatron_moellava.evaluation import normalise
from megatron_moellava.evaluation.metrics import answers_yes


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Two  dogs, and a cat.", "2 dogs and cat"),
        ("The Beatles", "beatles"),
        ("none", "0"),
        ("TEN", "10"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yalld've", "yalld've"),  # lacks two apostrophes at once: not in the original's table
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),  # the original has this one the wrong way round
        ("shed", "shed"),
        ("it's red", "it 's red"),  # 's is split off first
        ("black-and-white", "black and white"),  # a mark inside a word becomes a blank
        ("black - white", "black white"),  # beside a blank it disappears
        ("a/b", "b"),  # "a b", then the article goes
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("line one\nline two", "line 1 line 2"),
        ("what?!", "what"),
        ("", ""),
    ],
)
def test_evalai(answer, normalised):
    assert normalise.evalai(answer) == normalised


def test_evalai_removes_at_most_32_full_stops():
    assert normalise.evalai("x" + "." * 40) == "x" + "." * 8


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", ""),
        ("b", ""),
        ("B. the dog", "B"),
        ("B.", ""),
        ("B) the dog", ""),
        ("The answer is C.", "C"),
        ("Well. The answer is C, surely", "C"),  # any character may follow
        ("The answer is C", ""),  # but one must
        ("The answer is C. The answer is D.", ""),
    ],
)
def test_option_letter(answer, letter):
    assert normalise.option_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not one", False),
        ("Yes. No doubt", True),  # only the first sentence counts
        ("NO", True),  # neither of the three spellings
        ("nothing", True),
        ("Well,no", True),  # the comma goes without leaving a blank
        ("", True),
    ],
)
def test_pope_reads_yes_or_no(answer, yes):
    assert answers_yes(answer) is yes


@pytest.mark.parametrize(
    ("answer", "word"),
    [("Yes", "yes"), ("yes, it is", "yes"), ("No.", "no"), ("Snow", "no"), ("is no", "other"), ("There", "other")],
)
def test_mme_reads_the_first_four_characters(answer, word):
    assert normalise.mme(answer) == word


def test_gqa_keeps_everything_but_case_and_trailing_stops():
    assert normalise.gqa("Yes..") == "yes"
    assert normalise.gqa("the left.") == "the left"


@pytest.mark.parametrize(
    "prompt",
    [
        "What Brand?\nReference OCR token: A, B\nAnswer the question using a single word or phrase.",
        "Reference OCR token: A, B\nWhat Brand?\nAnswer the question using a single word or phrase.",
        "What Brand?\nAnswer the question using a single word or phrase.",
        "OCR tokens: A, B. Question: What Brand? Short answer:",
    ],
)
def test_textvqa_question_is_found_in_every_prompt_layout(prompt):
    assert normalise.textvqa_question(prompt) == "what brand?"
