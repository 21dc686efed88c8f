"""`SHA256SUMS` beside exported or downloaded models: the format of coreutils, so `sha256sum -c SHA256SUMS` works too."""

import re
from collections.abc import Callable
from pathlib import Path

from megatron_moellava.checkpoint.folders import write_durably
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint, damaged_files, file_digests, files_below, listed
from megatron_moellava.checkpoint.verification import progress_bar, tell

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def write_sums(folder: Path, known: dict[str, str]) -> None:
    """List all files below `folder`; `known`: digests that were computed before."""
    names = [name for name in files_below(folder) if name != SUMS_FILE]
    digests = known | file_digests(folder, [name for name in names if name not in known])
    write_durably(folder / SUMS_FILE, "".join(f"{digests[name]}  {name}\n" for name in names).encode())


def verify_sums(path: Path, *, verify: bool = True, say: Callable[[str], None] = tell) -> None:
    """Raises DamagedCheckpoint that names what differs from the SHA256SUMS of `path`, a folder or one file in it.

    Nothing is verified, and nothing said, where there is no such list. Files that the list leaves out are named.
    """
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not (folder / SUMS_FILE).is_file():
        return
    if not verify:
        say(f"{folder / SUMS_FILE} was not looked at (--no-verify): a damaged file would not be noticed")
        return
    expected = _read(folder / SUMS_FILE)
    names = [name for name in files_below(folder) if name != SUMS_FILE] if path.is_dir() else [path.name]
    if not path.is_dir():
        expected = {name: digest for name, digest in expected.items() if name == path.name}
    with progress_bar("verifying", folder, expected) as progress:
        damaged = damaged_files(folder, expected, progress)
    if damaged:
        raise DamagedCheckpoint(
            f"{folder} differs from its {SUMS_FILE}: {listed(damaged)}; download these files again, "
            "or give --no-verify if you have changed them yourself"
        )
    unlisted = [name for name in names if name not in expected and not name.startswith(".")]
    if unlisted:
        more = f" and {len(unlisted) - 12} more" if len(unlisted) > 12 else ""
        say(f"{folder / SUMS_FILE} leaves out, so these were not verified: {', '.join(unlisted[:12])}{more}")


def _read(file: Path) -> dict[str, str]:
    lines = file.read_text(errors="replace").splitlines()
    matches = [_LINE.fullmatch(line) for line in lines]
    wrong = [str(number) for number, match in enumerate(matches, 1) if match is None]
    if wrong or not lines:
        raise DamagedCheckpoint(
            f"{file} is damaged: {f'line {wrong[0]} is not `DIGEST  FILE`' if wrong else 'it is empty'}; "
            "download it again, or give --no-verify"
        )
    return {match[2].removeprefix("./"): match[1].lower() for match in matches if match}
