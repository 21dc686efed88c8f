"""The error of one row crosses processes."""

import pickle

from megatron_moellava.data.bad_sample import BadSample


def test_it_keeps_its_reason_and_message():
    error = pickle.loads(pickle.dumps(BadSample("missing image", "row 1: no such file")))  # noqa: S301
    assert (error.reason, str(error)) == ("missing image", "row 1: no such file")
