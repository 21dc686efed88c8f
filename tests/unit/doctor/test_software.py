"""Versions that fit, that do not, and that are missing."""

from packaging.requirements import Requirement

from megatron_moellava.doctor import software


def test_every_requirement_is_there_in_the_tests_own_environment():
    found = {finding.name: finding for finding in software.versions()}
    assert {"Python", "megatron-moellava"} <= found.keys()
    assert [name for name, finding in found.items() if finding.level == "problem"] == []


def test_a_version_that_was_not_tested_or_misses_is_a_problem_with_a_way_out():
    requirement = Requirement("Megatron_Core~=0.19.2")
    assert software.needed(requirement, "0.19.3").level == "ok"
    other = software.needed(requirement, "0.20.0")
    assert (other.name, other.found, other.level) == ("megatron-core", "0.20.0", "problem")
    assert "tested with ~=0.19.2; pip install 'Megatron_Core~=0.19.2'" in other.meaning
    assert software.needed(requirement, None).found == "missing"


def test_what_a_run_can_do_without_is_no_problem():
    found = {finding.name: finding for finding in software.optional()}
    assert found["Transformer Engine"].level in ("ok", "note")
    assert "flex is refused" in found["DeepEP"].meaning or found["DeepEP"].found == "installed"
    assert all(finding.level != "problem" for finding in found.values())
