"""Names of files, and where they may lead."""

import pytest

from megatron_moellava.data.paths import locate, natural
from megatron_moellava.data.sample import BadSample
from tests.helpers.data_files import write_images


def test_a_name_leads_to_a_file_below_the_folder_only(tmp_path):
    write_images(tmp_path / "images")
    assert locate(str(tmp_path / "images"), "a.png", "row 1") == str((tmp_path / "images/a.png").resolve())
    for name in ("../secret.png", "/etc/passwd", "sub/../../secret.png"):
        with pytest.raises(BadSample, match=r"row 1: image .* leads outside image_folder"):
            locate(str(tmp_path / "images"), name, "row 1")
    with pytest.raises(BadSample, match="zero byte"):
        locate(str(tmp_path), "a\0.png", "row 1")


def test_numbers_in_names_count():
    assert sorted(("f10.png", "f2.png", "e11.png"), key=natural) == ["e11.png", "f2.png", "f10.png"]
