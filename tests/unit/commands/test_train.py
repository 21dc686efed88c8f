"""What `moellava train` makes of its words."""

from megatron_moellava.commands.train import flags, parse_arguments


def test_settings_after_the_data_files_are_settings():
    args = parse_arguments(
        ["--stage", "2", "--data", "a.json", "b.json", "optimizer.lr=1e-4", "--image-folder", "images"]
    )
    assert args.overrides == ["optimizer.lr=1e-4"]
    assert flags(args)["data.sources"] == [
        {"path": "a.json", "image_folder": "images"},
        {"path": "b.json", "image_folder": "images"},
    ]


def test_a_file_with_an_equals_sign_is_a_file():
    assert parse_arguments(["--data", "run=1.json"]).data == ["run=1.json"]
