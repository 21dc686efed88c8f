"""The kinds of routers as data."""

import dataclasses

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.router import MODULES
from megatron_moellava.routers import ROUTERS


def test_every_kind_has_a_module_and_is_found_by_its_own_name():
    assert ROUTERS.keys() == MODULES.keys()
    assert all(name == kind.name for name, kind in ROUTERS.items())


def test_what_a_kind_cannot_honour_are_fields_of_a_run():
    fields = {field.name for field in dataclasses.fields(MoEConfig)}
    for kind in ROUTERS.values():
        assert set(kind.lacks) <= fields


def test_the_originals_gate_counts_padding_over_the_whole_sequence():
    original, megatron = ROUTERS["original"], ROUTERS["megatron"]
    assert original.counts_padding and original.counts_whole_sequence and original.always_has_capacity
    assert not (original.allows_packing or original.allows_context_parallelism) and original.max_topk == 2
    assert not (megatron.counts_padding or megatron.always_has_capacity) and megatron.max_topk is None
