"""Where the file of a name is, and which names are allowed."""

import os
import re
import unicodedata

from megatron_moellava.data.bad_sample import BadSample


def locate(folder: str, name: str, where: str, trusted: bool = False, key: str = "image") -> str:
    """The file of an image name: below the folder, also after following symlinks, unless paths are `trusted`.

    A name may be absolute. `key`: of the row, for messages. Raises BadSample.
    """
    if "\0" in name:
        raise BadSample("missing image", f"{where}: {key} name {name!r} holds a zero byte; correct it")
    if name.startswith(("http://", "https://")):
        raise BadSample(
            "missing image", f"{where}: {key} {name[:80]!r} is a web address; download it and name the file"
        )
    root = os.path.realpath(os.path.expanduser(folder or "."))
    path = _existing(os.path.realpath(os.path.join(root, name.removeprefix("file://"))))
    if not trusted and not path.startswith(root.rstrip(os.sep) + os.sep):
        raise BadSample(
            "outside image folder",
            f"{where}: {key} {name!r} leads outside image_folder={folder!r}, to {path}; if you trust the data, set "
            "data.trust_paths=true (--trust-paths of prepare-data)",
        )
    return path


def _existing(path: str) -> str:
    """The path, or its other spelling in Unicode: archives from a Mac have `é` as two characters."""
    forms = [path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))]
    return next((os.path.realpath(form) for form in forms if os.path.exists(form)), path)


def natural(name: str) -> list:
    """Sorts `frame_2` before `frame_10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
