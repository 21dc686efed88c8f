"""Which positions a rank of context parallelism has."""

from megatron_moellava.model.context_parallel import Piece, attention_pieces, chunks_of_rank, longest_first


def test_every_rank_has_early_and_late_positions_and_nobody_shares_one():
    chunks = [chunks_of_rank(24, 3, rank) for rank in range(3)]
    assert chunks[0] == ((0, 4), (20, 24))
    held = sorted(position for rank in chunks for start, stop in rank for position in range(start, stop))
    assert held == list(range(24))
    work = [sum(position + 1 for start, stop in rank for position in range(start, stop)) for rank in chunks]
    assert len(set(work)) == 1  # of causal attention over one sample


def test_pieces_end_at_the_boundaries_of_samples_and_chunks():
    pieces = list(attention_pieces(((0, 2), (6, 8)), [0, 3, 8]))
    assert pieces == [Piece(slice(0, 2), slice(0, 2)), Piece(slice(2, 4), slice(3, 8))]
    for rank in range(2):  # every query sees exactly the keys of its sample up to itself
        chunks = chunks_of_rank(16, 2, rank)
        mine = [position for start, stop in chunks for position in range(start, stop)]
        for piece in attention_pieces(chunks, [0, 5, 6, 16]):
            queries = mine[piece.queries]
            assert queries[-1] == piece.keys.stop - 1
            assert all(max(start for start in (0, 5, 6) if start <= q) == piece.keys.start for q in queries)


def test_the_dearest_items_are_dealt_first():
    assert longest_first([1.0, 4.0, 2.0, 2.0], 2) == [[1, 0], [2, 3]]
    assert longest_first([3.0], 2) == [[0], []] and longest_first([], 2) == [[], []]
    shares = longest_first([float(cost) for cost in range(1, 30)], 4)
    totals = [sum(number + 1 for number in share) for share in shares]
    assert sorted(number for share in shares for number in share) == list(range(29))
    assert max(totals) <= 1.1 * sum(totals) / 4
