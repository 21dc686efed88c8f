"""setup.py, Makefile, Dockerfile and documents say the same, and name only what exists."""

import ast
import fnmatch
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import REPO
from tests.helpers.requirements import all_requirements, name_of, setup_lists
from tests.helpers.sources import read_sources

TEXTS = [REPO / "Dockerfile", *REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("examples/**/*.y*ml")]
TEXTS += [path for path in REPO.glob("examples/**/*") if path.suffix in (".sh", ".md")]
SCRIPTS = [REPO / ".ci/run", REPO / ".ci/find_python", *REPO.glob("examples/**/*.sh"), *REPO.glob("tests/**/*.sh")]


def dockerfile_stages() -> dict[str, list[tuple[str, str]]]:
    """{stage: [(instruction, arguments)]}, continuation lines joined, comments dropped."""
    lines = [line for line in (REPO / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    stages: dict[str, list[tuple[str, str]]] = {}
    for line in filter(str.strip, joined.splitlines()):
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            stages[arguments.split()[-1]] = []
        stages[list(stages)[-1]].append((instruction, arguments))
    return stages


STAGES = dockerfile_stages()
COPIES = [args for stage in STAGES.values() for name, args in stage if name == "COPY" and "--from" not in args]


def tool(name: str) -> str:
    """A linter of the dev extra: beside the interpreter, or on PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or name


@pytest.mark.parametrize("arguments", sorted(set(COPIES)))
def test_copied_paths_exist_and_reach_the_builder(arguments):
    withheld = (REPO / ".dockerignore").read_text().split()
    for source in shlex.split(arguments)[:-1]:
        assert (REPO / source).exists(), f"Dockerfile copies {source}, which does not exist"
        assert not any(fnmatch.fnmatch(source, pattern) for pattern in withheld), f".dockerignore withholds {source}"


def test_what_git_ignores_stays_out_of_the_image():
    """An environment of several GB in the clone must not become part of an image."""
    withheld = [pattern.removeprefix("**/") for pattern in (REPO / ".dockerignore").read_text().split()]
    ignored = [line.strip("/") for line in (REPO / ".gitignore").read_text().split() if line.endswith("/")]
    assert ".lmms-venv" in ignored
    for folder in ignored:
        assert any(fnmatch.fnmatch(folder, pattern) for pattern in withheld), f".dockerignore lets {folder} through"


def test_each_stage_copies_what_its_installation_reads():
    """setup.py needs its own file, the tool settings with the build system, and the license."""
    for name in ("cpu-build", "gpu"):
        words = {word for instruction, args in STAGES[name] if instruction == "COPY" for word in args.split()}
        assert {"setup.py", "pyproject.toml", "LICENSE", "megatron_moellava"} <= words, name


def test_commands_of_the_images_are_make_targets():
    for stage in STAGES.values():
        for instruction, arguments in stage:
            if instruction == "CMD":
                program, target = ast.literal_eval(arguments)
                assert program == "make" and re.search(rf"^{target}:", (REPO / "Makefile").read_text(), re.M)


def test_gpu_stage_installs_neither_torch_nor_apex_nor_transformer_engine():
    """They come with the NGC image; and the image's pip constraints stay in force."""
    for instruction, arguments in STAGES["gpu"]:
        assert "PIP_CONSTRAINT" not in arguments
        if instruction == "RUN":
            for command in re.findall(r"pip install ([^&|]*)", arguments):
                assert not re.search(r"\b(torch|apex|transformer.engine|flash.attn)\b|\[gpu\]", command), command


def test_extras_of_the_dockerfile_exist():
    _, extras = setup_lists()
    named = re.findall(r"'\.\[([\w,-]+)\]'", (REPO / "Dockerfile").read_text() + (REPO / "Makefile").read_text())
    assert named
    for group in named:
        assert set(group.split(",")) <= set(extras)


def test_python_version_agrees_everywhere():
    settings = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]
    version = re.search(r'python_requires=">=([\d.]+)"', (REPO / "setup.py").read_text())[1]
    assert settings["ruff"]["target-version"] == "py" + version.replace(".", "")
    assert settings["mypy"]["python_version"] == version
    assert set(re.findall(r"FROM python:([\d.]+)", (REPO / "Dockerfile").read_text())) == {version}


def test_pyproject_holds_only_tool_settings():
    assert set(tomllib.loads((REPO / "pyproject.toml").read_text())) == {"tool", "build-system"}


def test_one_ngc_image_is_named_everywhere():
    tags = {tag: path.name for path in TEXTS for tag in re.findall(r"pytorch:(\d\d\.\d\d-py3)", path.read_text())}
    assert len(tags) == 1, tags


@pytest.mark.parametrize("name", ["megatron-core", "megatron-energon", "transformer-engine"])
def test_versions_in_documents_are_those_of_setup(name):
    """`megatron-core 0.19.2` in a document must satisfy setup.py's `megatron-core~=0.19.2`."""
    pinned = re.search(r"~=([\d.]+)", all_requirements()[name])[1]
    pattern = name.replace("-", "[- ]") + r"(?:\[[\w,]+\])?\s*(?:[~=]=)?\s*v?(\d+\.\d+(?:\.\d+)?)"
    for path in TEXTS:
        for version in re.findall(pattern, path.read_text(), re.I):
            assert version.startswith(pinned) or pinned.startswith(version), f"{path.name} says {name} {version}"


def test_installed_versions_satisfy_setup():
    from packaging.requirements import Requirement

    for item in setup_lists()[0]:
        wanted = Requirement(item)
        version = importlib.metadata.version(wanted.name)
        assert wanted.specifier.contains(version, prereleases=True), f"{item}, installed: {version}"


def test_apex_is_never_required():
    assert "apex" not in all_requirements()


def test_every_import_is_a_declared_dependency():
    declared = set(all_requirements())
    providers = importlib.metadata.packages_distributions()
    offenders = set()
    for source in read_sources(REPO, "megatron_moellava/**/*.py", "tools/*.py", "examples/**/*.py"):
        ours = {"megatron_moellava", "tools", *(other.stem for other in (REPO / source.path).parent.glob("*.py"))}
        if source.path.startswith("examples/"):  # the ablations share the quickstart's data
            ours |= {other.stem for other in (REPO / "examples/quickstart").glob("*.py")}
        for top in {item.name.split(".")[0] for item in source.imports} - sys.stdlib_module_names - ours:
            if not {name_of(item) for item in providers.get(top, [top])} & declared:
                offenders.add(f"{source.path} imports {top}, which setup.py does not list")
    assert not offenders, "\n".join(sorted(offenders))


def test_every_proof_in_the_documents_exists():
    """A test with its file, and a test or a file alone (`test_name`), as docs/reference/reliability.md has them."""
    files = {path: path.read_text() for path in REPO.glob("tests/**/test_*.py")}
    defined = {path.name for path in files} | {
        name for text in files.values() for name in re.findall(r"^def (test_\w+)", text, re.M)
    }
    documents = {path.name: path.read_text() for path in TEXTS}
    pairs = [pair for text in documents.values() for pair in re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", text)]
    assert pairs
    elsewhere = [f"{file}::{name}" for file, name in pairs if f"def {name}(" not in files.get(REPO / file, "")]
    named = {name for text in documents.values() for name in re.findall(r"`(test_[\w.]+)`", text)}
    unknown = sorted(named - defined)
    assert not elsewhere and not unknown, [*elsewhere, *unknown]


def test_hadolint_finds_nothing():
    result = subprocess.run([tool("hadolint"), str(REPO / "Dockerfile")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_shellcheck_finds_nothing():
    result = subprocess.run([tool("shellcheck"), "-x", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=REPO)
    assert result.returncode == 0, result.stdout


def make(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], capture_output=True, text=True, cwd=REPO)


def test_make_lists_its_targets():
    makefile = (REPO / "Makefile").read_text().replace("\\\n", "")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    listed = re.findall(r"^  make ([\w-]+)", make().stdout, re.M)
    assert sorted(phony) == sorted(listed)


def test_files_named_in_the_makefile_exist():
    commands = re.findall(r"^\t.*$", (REPO / "Makefile").read_text(), re.M)
    for path in re.findall(r"(?:examples|tests|tools)/[\w/.-]+", "\n".join(commands)):
        assert (REPO / path).exists(), path


def test_a_given_environment_is_used_as_it_is():
    commands = make("--dry-run", "test", f"VENV={sys.prefix}").stdout
    assert f"{sys.prefix}/bin/python -m pytest" in commands
    assert "pip install" not in commands


def find_python(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    """.ci/find_python where PATH has only the basic tools and a python3.12 that fails, as pyenv's shim does."""
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("ls", "cat", "sh"):
        (shims / name).symlink_to(shutil.which(name))
    for name in ("python3.12", "python3.13", "python3", "python"):
        (shims / name).write_text("#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n")
        (shims / name).chmod(0o755)
    environment = {"PATH": str(shims), "HOME": str(tmp_path), **variables}
    return subprocess.run([str(REPO / ".ci/find_python")], env=environment, capture_output=True, text=True)


def system_python() -> bool:
    return any(Path(path).exists() for path in ("/usr/bin/python3.12", "/usr/local/bin/python3.12", "/opt/conda/bin"))


def test_a_python_that_does_not_run_is_passed_over(tmp_path):
    folder = tmp_path / ".pyenv/versions/3.12.9/bin"
    folder.mkdir(parents=True)
    (folder / "python3.12").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python3.12").chmod(0o755)
    assert find_python(tmp_path).stdout.strip() == str(folder / "python3.12")


@pytest.mark.skipif(system_python(), reason="this machine has a Python 3.12 where the search cannot miss it")
def test_no_python_at_all_says_what_to_install(tmp_path):
    result = find_python(tmp_path)
    assert result.returncode == 1
    assert "PYTHON=/path/to/python3.12" in result.stderr


def test_a_named_python_that_does_not_run_is_an_error(tmp_path):
    result = find_python(tmp_path, PYTHON="python3.12")
    assert result.returncode == 1
    assert "does not run" in result.stderr


def test_the_workflow_calls_what_a_developer_runs():
    workflow = yaml.safe_load((REPO / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["check-and-test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    versions = [step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")]
    assert versions == re.findall(r'python_requires=">=([\d.]+)"', (REPO / "setup.py").read_text())


@pytest.mark.parametrize("name", ["bug", "feature", "gpu_report"])
def test_issue_forms_have_what_github_asks_for(name):
    form = yaml.safe_load((REPO / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["name"] and form["description"]
    fields = [item["id"] for item in form["body"]]
    assert len(set(fields)) == len(fields) and all(item["attributes"]["label"] for item in form["body"])


def test_the_citation_is_of_this_release():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    setup = (REPO / "setup.py").read_text()
    for field, pattern in (("version", r'version="([^"]+)"'), ("license", r'license="([^"]+)"')):
        assert citation[field] == re.search(pattern, setup)[1]


def test_make_targets_in_documents_exist():
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M))
    for path in [*REPO.glob("*.md"), *REPO.glob("docs/**/*.md")]:
        named = re.findall(r"(?:^|`|&& )make ([a-z][\w-]*)", path.read_text(), re.M)
        assert set(named) <= targets, f"{path.name}: {set(named) - targets}"
