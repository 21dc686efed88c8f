"""An export to the Hugging Face hub, by `huggingface_hub`; a dry run says what would go there and asks nobody."""

import importlib.util
from pathlib import Path

from megatron_moellava.checkpoint.integrity import files_below
from megatron_moellava.config import ConfigError

PACKAGE = "huggingface_hub"


def check_repo(repo: str) -> None:
    """ConfigError for a name that the hub would refuse, or without its package: before hours go into an export."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            f"--push {repo}: needs the package {PACKAGE}; pip install {PACKAGE}, or push the folder by hand"
        )
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo}: is not a name of the hub ({error}); give USER/NAME") from None


def planned(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of every file that `push` uploads."""
    return [(name, (folder / name).stat().st_size) for name in files_below(folder)]


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder as it is, in one commit; the repository is made if there is none. Returns the commit's address.

    The token is the one of `hf auth login`, or of HF_TOKEN. ConfigError where the hub refuses or cannot be reached.
    """
    check_repo(repo)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Export {folder.name}")
    except (
        Exception
    ) as error:  # the hub's own, and those of the HTTP package that this release of its library is built on
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--push {repo}: the hub did not take it ({type(error).__name__}: {reason}); {folder} is whole: log in with "
            f"`hf auth login`, then `hf upload {repo} {folder}`"
        ) from None
    return commit.commit_url
