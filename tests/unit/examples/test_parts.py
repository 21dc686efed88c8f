"""Markers of finished parts: what is done stays done, what has changed is done anew with all that comes of it."""

import json

import pytest


class Quickstart:
    """Three parts in a row, as plain files: data, model (goes on from what it finds), answer."""

    def __init__(self, folder, dies_in: str = ""):
        from parts import Parts

        self.out, self.dies_in, self.did, self.said = folder, dies_in, [], []
        self.parts = Parts(folder, lambda: None, True, self.said.append)

    def part(self, name: str):
        def act() -> dict:
            self.did.append(name)
            (self.out / name).mkdir(exist_ok=True)
            found = sorted(file.name for file in (self.out / name).iterdir())
            (self.out / name / "begun").write_text("")
            if name == self.dies_in:
                raise KeyboardInterrupt
            return {"found": found}

        return act

    def plan(self, data: int = 0, model: int = 0, answer: int = 0) -> list:
        from parts import Part

        return [
            Part(name="data", settings=data, action=self.part("data")),
            Part(name="model", settings=model, action=self.part("model"), needs=["data"], goes_on=True),
            Part(name="answer", settings=answer, action=self.part("answer"), needs=["data", "model"]),
        ]

    def run(self, **settings: int) -> dict:
        return [self.parts.run(part) for part in self.plan(**settings)][-1]


def test_what_is_done_is_not_done_again_and_gives_its_result(tmp_path):
    first, again = Quickstart(tmp_path), Quickstart(tmp_path)
    assert first.run() == again.run() == {"found": []}
    assert (first.did, again.did) == (["data", "model", "answer"], [])
    assert again.said == [f"--- {name}: done before" for name in first.did]
    assert again.parts.seconds == first.parts.seconds


@pytest.mark.parametrize(
    ("changed", "done"),
    [
        ({"data": 1}, ["data", "model", "answer"]),
        ({"model": 1}, ["model", "answer"]),
        ({"answer": 1}, ["answer"]),
        ({}, []),
    ],
)
def test_a_changed_part_does_anew_what_comes_of_it_and_nothing_else(tmp_path, changed, done):
    Quickstart(tmp_path).run()
    again = Quickstart(tmp_path)
    assert [part.name for part in again.parts.left(again.plan(**changed))] == done
    assert again.run(**changed) == {"found": []}  # in empty folders
    assert again.did == done


@pytest.mark.parametrize(("dies_in", "found"), [("data", []), ("model", ["begun"]), ("answer", [])])
def test_a_part_that_was_cut_short_begins_anew_or_goes_on(tmp_path, dies_in, found):
    killed = Quickstart(tmp_path, dies_in)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    again = Quickstart(tmp_path)
    assert again.run() == {"found": []}
    assert again.did[0] == dies_in and again.did[-1] == "answer"
    assert json.loads((tmp_path / "parts" / f"{dies_in}.json").read_text())["result"] == {"found": found}


def test_a_part_that_was_cut_short_does_not_go_on_with_other_settings(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Quickstart(tmp_path, "model").run()
    Quickstart(tmp_path).run(model=1)
    assert json.loads((tmp_path / "parts" / "model.json").read_text())["result"] == {"found": []}


@pytest.mark.parametrize("damage", ["torn", "gone", "folder gone", "forgotten"])
def test_without_a_whole_marker_or_its_folder_a_part_is_not_done(tmp_path, damage):
    import shutil

    Quickstart(tmp_path).run()
    marker, again = tmp_path / "parts" / "model.json", Quickstart(tmp_path)
    if damage == "torn":
        marker.write_text(marker.read_text()[:20])
    elif damage == "gone":
        marker.unlink()
    elif damage == "folder gone":
        shutil.rmtree(tmp_path / "model")
    else:
        again.parts.forget()
    again.run()
    assert again.did == (["data", "model", "answer"] if damage == "forgotten" else ["model"])


def test_another_quickstart_program_is_another_quickstart(tmp_path):
    from parts import digest_of_sources

    (tmp_path / "run.py").write_text("steps = 1\n")
    before = digest_of_sources(tmp_path)
    assert digest_of_sources(tmp_path) == before
    (tmp_path / "run.py").write_text("steps = 2\n")
    assert digest_of_sources(tmp_path) != before
