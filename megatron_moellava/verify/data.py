"""What the original's data path made, without a model: how a prompt with images is tokenised, batches of its data set
and collator, the order of its sampler, and how its scorers read answers.

Recordings in data/: `conversations.json` (key `tokenizer_image_token`: tokenizer -> prompt -> ids), `dataset.pt` (case ->
`version`, `rows`, `max_length` and the batch), `sampler_schedule.json` (case -> arguments and `indices`), `scoring.json`
(function -> answer -> what it makes of it).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_moellava.config import ConfigError
from megatron_moellava.data.batch import Batch, pad
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.modality import epoch_order
from megatron_moellava.data.original import tokenise_with_images
from megatron_moellava.data.tokenizer import Tokenizer
from megatron_moellava.evaluation import normalise
from megatron_moellava.evaluation.metrics import answers_yes
from megatron_moellava.evaluation.scorers.text import soft_accuracies
from megatron_moellava.hf_config import read_json
from megatron_moellava.verify.conversations import WHOLE, find_tokenizers, parse, template_of
from megatron_moellava.verify.folder import Folder, sample_of
from megatron_moellava.verify.table import Table

ANY_FEATURES = 3  # tokens of an image: where images grow, what stands around them moves, whatever the tower gives
SCORES = 1e-12  # both are fp64


def verify_data(folder: Folder, table: Table) -> None:
    """Every recording of the data path that lies in data/; one of another form is said, not passed over."""
    cases: dict[str, Callable[[Path, Table], None]] = {
        "conversations.json": _image_tokens,
        "dataset.pt": _batches,
        "sampler_schedule.json": _orders,
        "scoring.json": _scores,
    }
    for name, case in cases.items():
        file = folder.beside(f"data/{name}")
        if file is None:
            continue
        try:
            case(file, table)
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            table.left_out.append(
                f"{file}: not of the form that verify/data.py describes ({error!r}); no case reads it"
            )


def _assets(file: Path) -> Path:
    return file.parents[1] / "assets"


def _image_tokens(file: Path, table: Table) -> None:
    for tokenizer_name, prompts in read_json(file).get("tokenizer_image_token", {}).items():
        (tokenizer,) = find_tokenizers(_assets(file), tokenizer_name)
        wrong = [text for text, ids in prompts.items() if tokenise_with_images(text, tokenizer) != ids]
        table.add(
            "conversations",
            f"{len(prompts)} prompts with images, {tokenizer_name}",
            len(wrong),
            0,
            f"{wrong[0][-60:]!r}" if wrong else "",
        )


def _batches(file: Path, table: Table) -> None:
    recorded = Folder(file.parent).load(file.name)
    known = read_json(file.parent / "conversations.json")
    records = known["samples"] | known["plain"]
    tokenizers = find_tokenizers(_assets(file))
    for case, expected in recorded.items():
        rows = [
            (str(number), row) if isinstance(row, dict) else (row, records[row])
            for number, row in enumerate(expected["rows"])
        ]
        theirs = _grown(expected)
        made = [_collated(expected["version"], rows, expected.get("max_length", WHOLE), one) for one in tokenizers]
        errors = [_differing(ours, theirs) for ours in made]
        best = min(errors, key=lambda found: sum(found.values()))
        for quantity, count in best.items():
            table.add(f"dataset {case}", quantity, count, 0)


def _collated(version: str, rows: list[tuple[str, dict]], max_length: int, tokenizer: Tokenizer) -> Batch:
    """The rows as training makes them by the original's labels and limit."""
    encoder = Encoder(
        template=template_of(version),
        tokenizer=tokenizer,
        num_features=ANY_FEATURES,
        max_length=1 << 30,
        text_length=max_length,
        label_mode="original",
    )
    samples = [encoder(parse(record, name)) for name, record in rows]
    return pad(samples, [], 1, tokenizer.pad_id, (3, 1, 1))


def _grown(expected: dict) -> Batch:
    """A recorded batch with its images grown, as the original's model does after the collator."""
    samples = []
    for row, real in enumerate(expected["attention_mask"].bool()):
        ids, labels = expected["input_ids"][row][real].tolist(), expected["labels"][row][real].tolist()
        samples.append(sample_of(ids, labels, ANY_FEATURES, str(row)))
    return pad(samples, [], 1, 0, (3, 1, 1))


def _differing(ours: Batch, theirs: Batch) -> dict[str, float]:
    """Elements that differ, by quantity; of batches of another width all do. What padding holds is nobody's business."""
    if ours.tokens_BS.shape != theirs.tokens_BS.shape:
        return dict.fromkeys(("ids", "labels", "padding"), float("inf"))
    real_BS = theirs.padding_mask_BS
    return {
        "ids": float(((ours.tokens_BS != theirs.tokens_BS) & real_BS).sum()),
        "labels": float((ours.labels_BS != theirs.labels_BS).sum()),
        "padding": float((ours.padding_mask_BS != real_BS).sum()),
    }


def _orders(file: Path, table: Table) -> None:
    for case, recorded in read_json(file).items():
        generator = torch.Generator().manual_seed(recorded["seed"])
        lengths = np.array(recorded["lengths"])
        ours = epoch_order(lengths, recorded["batch_size"], recorded["world_size"], generator)
        wrong = [place for place, pair in enumerate(zip(ours, recorded["indices"], strict=True)) if pair[0] != pair[1]]
        where = f"from place {wrong[0]}" if wrong else ""
        table.add(f"sampler {case}", f"order of {len(lengths)} samples", len(wrong), 0, where)


READINGS: dict[str, Callable[[str], object]] = {
    "evalai": normalise.evalai,
    "science_qa": normalise.option_letter,
    "pope": lambda text: "yes" if answers_yes(text) else "no",
    "textvqa_question": normalise.textvqa_question,
}


def _scores(file: Path, table: Table) -> None:
    recorded = read_json(file)
    if unknown := sorted(recorded.keys() - {*READINGS, "textvqa"}):
        table.left_out.append(f"{file}: {', '.join(unknown)}: no case reads it")
    for name, read in READINGS.items():
        answers = recorded.get(name, {})
        wrong = [text for text, expected in answers.items() if read(text) != expected]
        if answers:
            table.add(f"scorers {name}", f"{len(answers)} answers", len(wrong), 0, f"{wrong[0]!r}" if wrong else "")
    rows = recorded.get("textvqa", [])
    if rows:
        ours = [_textvqa(row["pred_answer"], row["gt_answers"]) for row in rows]
        table.close("scorers textvqa", f"soft accuracy of {len(rows)}", ours, [row["score"] for row in rows], SCORES)


def _textvqa(answer: str, references: list[str]) -> float:
    return soft_accuracies([normalise.evalai(text) for text in references]).get(normalise.evalai(answer), 0.0)
