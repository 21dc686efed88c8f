"""The design rules, each one test that lists every offender. tests/helpers/rules.py has the rules themselves."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers import rules
from tests.helpers.paths import REPO
from tests.helpers.requirements import all_requirements
from tests.helpers.rules import TABLE, table_rows
from tests.helpers.sources import Source, read_sources

PROGRAMS = sorted([*REPO.glob("tools/*.py"), *REPO.glob("examples/*/run.py")])

# {test: (why it is shared, modules)}: modules whose test is not a file of their own.
SHARED_TESTS = {
    "tests/unit/backbones/test_families.py": (
        "sizes and weight mappings of one shape, asserted in tables over all families",
        [f"backbones/{name}" for name in ("deepseek_moe", "deepseek_v3", "dots1", "llama", "minicpm", "mistral", "mixtral",
                                          "olmoe", "phi2", "qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm2")],
    ),
    "tests/unit/towers/test_families.py": ("the same for towers", ["towers/clip", "towers/siglip", "towers/siglip2"]),
    "tests/unit/commands/test_main.py": (
        "a parser and one call of the function that a test of another room is about",
        ["__main__", *(f"commands/{name}" for name in ("analyze", "chat", "convert", "evaluate", "launch", "plan",
                                                       "prepare_data", "serve", "verify", "watch"))],
    ),
    "tests/unit/data/test_tokenizer.py": (
        "one table of recorded ids over all kinds of tokenizer folders",
        [f"data/{name}" for name in ("byte_tokenizer", "llama_tokenizer", "tiktoken_ranks", "tokenizer_files")],
    ),
    "tests/unit/data/test_native.py": ("two numbers, which native.py and tiling.py make", ["data/plan"]),
    "tests/unit/data/test_templates.py": ("the original's labels beside ours, template by template", ["data/original"]),
    "tests/unit/training/test_loop.py": (
        "one call of Megatron-Core's schedules, which every step of a run makes",
        ["training/schedule"],
    ),
    "tests/unit/experiments/test_nodes.py": ("a chain of stages, trained", ["experiments/stage"]),
    "tests/parity/test_languagebind.py": (
        "published folders in and out, and the numbers of their own code",
        ["towers/languagebind_image", "towers/languagebind_video"],
    ),
    "tests/parity/test_hf_conversion.py": ("runs inside transformers", ["conversion/modeling_moe_llava"]),
    "tests/parity/test_golden.py": (
        "they compare models with recordings, and a wrong number has to be seen",
        [f"verify/{name}" for name in ("conversations", "curves", "dense", "moe", "session", "static")],
    ),
    "tests/vllm/test_vllm.py": ("vLLM is in an environment of its own", ["serving/vllm_plugin", "serving/vllm_model"]),
    "tests/lmms/test_plugin.py": (
        "lmms-eval is in an environment of its own",
        ["evaluation/lmms_eval", "evaluation/lmms_eval_model"],
    ),
}  # fmt: skip


@cache
def package() -> list[Source]:
    return read_sources(REPO, "megatron_moellava/**/*.py")


@cache
def programs() -> list[Source]:
    """Package, commands and examples."""
    return [*package(), *read_sources(REPO, "tools/*.py", "examples/**/*.py")]


def assert_none(offenders: list[str]) -> None:
    assert not offenders, "\n" + "\n".join(offenders)


def test_every_room_has_a_floor_and_every_rule_a_room():
    assert_none(rules.rooms_without_a_floor(package()) + rules.rooms_that_do_not_exist(package()))


def test_imports_point_downward():
    assert_none(rules.imports_that_point_upward(package()))


def test_forbidden_imports_are_absent():
    assert_none(rules.forbidden_imports(package()))


def test_every_constant_has_one_home():
    assert_none(rules.constants_with_two_homes(programs()))


def test_only_platform_chooses_devices():
    assert_none(rules.device_choices(programs()))


def test_optional_imports_are_in_platform_alone():
    assert_none(rules.optional_imports(programs()))


def test_nothing_trusts_remote_code_or_unpickles():
    assert_none(rules.dangerous_calls(programs()))


def test_tests_leave_the_search_path_alone():
    assert_none(rules.edits_of_the_search_path(read_sources(REPO, "tests/**/*.py")))


def test_public_classes_and_functions_have_docstrings():
    assert_none(rules.public_names_without_a_docstring(package()))


def test_every_module_has_a_unit_test_file():
    shared = {f"megatron_moellava/{name}.py": test for test, (_, modules) in SHARED_TESTS.items() for name in modules}
    assert_none(rules.modules_without_a_test(package(), REPO, shared))


def test_private_names_of_others_are_those_of_the_table():
    assert_none(rules.table_offenders(programs(), (REPO / TABLE).read_text()))


def test_rows_of_the_table_are_true():
    """The version is one that setup.py asks for; files and test exist (test_platform.py looks the names up)."""
    offenders = []
    pinned = all_requirements()
    for name, version, where, _, test in table_rows((REPO / TABLE).read_text()):
        package, _, number = version.partition(" ")
        file, _, function = test.partition("::")
        if not Requirement(pinned[package]).specifier.contains(number):
            offenders.append(f"{name}: {version} is not what setup.py asks for ({pinned[package]})")
        if not all((REPO / "megatron_moellava" / path).exists() for path in where.split(", ")):
            offenders.append(f"{name}: a file of {where} does not exist")
        if not (REPO / file).exists() or f"def {function}(" not in (REPO / file).read_text():
            offenders.append(f"{name}: {test} does not exist")
    assert_none(offenders)


def test_help_answers_at_once():
    """Two seconds of CPU, and neither torch nor what imports it."""
    code = """
import runpy, sys, time
sys.argv = [sys.argv[1], "--help"]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [name for name in ("torch", "transformers", "megatron.core") if name in sys.modules]
assert not heavy, f"imports {heavy}"
assert time.process_time() < 2, f"takes {time.process_time():.1f} s"
"""
    offenders = []
    for path in PROGRAMS:
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=REPO)
        if done.returncode or len(done.stdout.splitlines()) <= 3:
            offenders.append(f"{path.relative_to(REPO)}: {done.stderr.strip().rpartition(chr(10))[2] or 'says little'}")
    assert_none(offenders)


# Every rule, seen red: {file: source} of a made-up tree, and what the rule has to say of it.
BROKEN = [
    (rules.rooms_without_a_floor, {"attic/a.py": ""}, "attic belongs"),
    (rules.rooms_that_do_not_exist, {"config.py": ""}, "names conversion"),
    (rules.imports_that_point_upward, {"data/a.py": "def f():\n    from megatron_moellava.model import b"}, "a.py:2"),
    (rules.imports_that_point_upward, {"costs/a.py": "import megatron_moellava.data.b"}, "megatron_moellava.data.b"),
    (rules.imports_that_point_upward, {"model/a.py": "from ..training import loop"}, "megatron_moellava.training.loop"),
    (rules.forbidden_imports, {"config.py": "from torch.nn import Module"}, "config must not import torch"),
    (rules.forbidden_imports, {"data/a.py": "from megatron.core import mpu"}, "data must not import megatron.core"),
    (rules.constants_with_two_homes, {"a.py": "PORT = 8000", "b.py": "PORT: int = 8000"}, "a.py, megatron_moellava/b.py"),
    (rules.constants_with_two_homes, {"a.py": "RUN = 'a/long/string'", "b.py": "LAST = 'a/long/string'"}, "a constant"),
    (rules.device_choices, {"a.py": "import torch.cuda"}, "imports torch.cuda"),
    (rules.device_choices, {"a.py": "import torch\ntorch.cuda.synchronize()"}, "a.py:2: torch.cuda"),
    (rules.device_choices, {"a.py": "x = y.to('cuda:0')"}, "y.to"),
    (rules.device_choices, {"a.py": "x = zeros(1, device='cpu')"}, "zeros"),
    (rules.device_choices, {"a.py": "x = y.device.type == 'cpu'"}, "y.device.type"),
    (rules.optional_imports, {"a.py": "try:\n    import av\nexcept ModuleNotFoundError:\n    av = None"}, "inside try"),
    (rules.optional_imports, {"a.py": "try:\n    import av\nexcept:\n    av = None"}, "inside try"),
    (rules.dangerous_calls, {"a.py": "load(x, trust_remote_code=True)"}, "trust_remote_code is not False"),
    (rules.dangerous_calls, {"a.py": "load(x, trust_remote_code=asked)"}, "trust_remote_code is not False"),
    (rules.dangerous_calls, {"a.py": "torch.load(x)"}, "without weights_only=True"),
    (rules.dangerous_calls, {"a.py": "pickle.loads(x)"}, "pickle.loads"),
    (rules.dangerous_calls, {"a.py": "run(x, shell=True)"}, "shell is not False"),
    (rules.edits_of_the_search_path, {"a.py": "import sys\nsys.path.insert(0, 'b')"}, "a.py:2: edits sys.path"),
    (rules.public_names_without_a_docstring, {"a.py": "X = 1\ndef f():\n    return X"}, "a.py:2: f has no docstring"),
    (rules.public_names_without_a_docstring, {"a.py": "async def f():\n    '  '"}, "a.py:1: f has no docstring"),
    (rules.public_names_without_a_docstring, {"a.py": "class A:\n    x: int  # what"}, "a.py:1: A has no docstring"),
]  # fmt: skip


def made_up(root: Path, files: dict[str, str]):
    for name, source in files.items():
        path = root / "megatron_moellava" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_sources(root, "megatron_moellava/**/*.py")


@pytest.mark.parametrize(("rule", "files", "message"), BROKEN)
def test_each_rule_names_its_offender(rule, files, message, tmp_path):
    assert any(message in offender for offender in rule(made_up(tmp_path, files)))


def test_private_names_methods_and_documented_names_need_no_docstring(tmp_path):
    source = "def _f(): ...\nclass _A: ...\nclass B:\n    'What.'\n    def f(self): ...\ndef g():\n    'Why.'"
    assert not rules.public_names_without_a_docstring(made_up(tmp_path, {"a.py": source}))


def test_a_module_without_its_test_is_named(tmp_path):
    sources = made_up(tmp_path, {"data/a.py": "", "data/b.py": "", "data/__init__.py": ""})
    tests = tmp_path / "tests" / "unit" / "data"
    tests.mkdir(parents=True)
    (tests / "test_a.py").touch()
    modules = ["megatron_moellava", "data", "b.py"]
    assert rules.modules_without_a_test(sources, tmp_path, {}) == [
        "/".join(modules) + " has no " + "/".join(["tests", "unit", "data", "test_b.py"])
    ]
    shared = {"/".join(modules): str((tests / "test_a.py").relative_to(tmp_path))}
    assert not rules.modules_without_a_test(sources, tmp_path, shared)
    assert rules.modules_without_a_test(sources, tmp_path, dict.fromkeys(shared, "none"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch import _utils", "_utils"),
        ("import torch._dynamo", "_dynamo"),
        ("import torch\ntorch._utils.f()", "_utils"),
        ("def f(loader):\n    loader._iterator = None", "_iterator"),
        ("class A(B):\n    def _step(self):\n        return super()._step()", "_step"),
        ("from torch import nn\nnn.Linear.forward = None", "forward"),
        ("from megatron.core import mpu\nPATCHES = ((mpu, 'is_initialized', None),)", "is_initialized"),
        ("getattr(thing, '_secret', None)", "_secret"),
        ("ALLOWED = {'torch.serialization': {'_get_layout'}}", "_get_layout"),
        ("REWRITES = {'megatron.core.utils': [('a', 'b')]}", "megatron.core.utils"),
    ],
)
def test_touched_names_are_found_and_must_stand_in_the_table(source, name, tmp_path):
    sources = made_up(tmp_path, {"a.py": source})
    assert set(rules.private_names(sources)) == {name}
    assert "lacks" in rules.table_offenders(sources, "")[0]
    row = f"| `{name}` | torch 2 | a.py | why | test |"
    assert not rules.table_offenders(sources, row)
    assert "nothing touches" in rules.table_offenders([], row)[0]


def test_own_names_are_no_names_of_others(tmp_path):
    own = "import os\nclass A:\n    def _f(self):\n        self._x = self._f()\n        os._exit(0)"
    assert not rules.private_names(made_up(tmp_path, {"a.py": own}))
