"""Which questions the quickstart asks."""


def test_questions_are_taken_at_even_distances():
    from run import spread

    rows = [{"question_id": number} for number in range(10)]
    assert [row["question_id"] for row in spread(rows, 4)] == [0, 2, 5, 7]
    assert spread(rows, 10) == spread(rows, 99) == rows
