"""What a user runs on a trained model, on this device: `evaluate`, `analyze`, the server's engine in its thread, and the
quickstart's closed questions after a stage."""

import asyncio
import json
from pathlib import Path


def programs(folder: Path, changes: dict) -> dict:
    """Answers of all, and how often each expert was chosen."""
    from tests.helpers.data_files import make_set
    from tests.helpers.inference_models import tiny_checkpoint

    checkpoint = folder.parent.parent / "asked"
    if not checkpoint.exists():
        tiny_checkpoint(checkpoint)
    rows = folder / "rows"
    make_set(rows, 6)
    return {
        "answers": evaluated(checkpoint, rows),
        "routing": analysed(checkpoint, rows),
        "served": served(),
        "closed": closed(rows),
    }


def closed(rows: Path) -> list[list[str]]:
    """Train two steps, then ask with pictures and without."""
    from megatron_moellava import parallel
    from megatron_moellava.experiments.stage import ask_closed, train_stage
    from megatron_moellava.validation.run import load_run
    from tests.helpers.inference_models import TOKENIZER

    parallel.shutdown()
    settings = {
        "model.backbone": "llama-tiny",
        "model.tower": "clip-tiny",
        "moe.num_moe_experts": 4,
        "training.stage": 3,
        "training.precision": "fp32",
        "training.train_steps": 2,
        "training.global_batch_size": 2,
        "data.sources": [{"path": str(rows / "rows.json"), "image_folder": str(rows)}],
        "data.tokenizer": str(TOKENIZER),
        "data.template": "v1",
        "data.num_workers": 0,
        "data.seq_length": 512,
        "logging.directory": str(rows / "log"),
        "logging.tensorboard": False,
    }
    run = load_run(config=None, flags=settings, overrides=[])
    trainer = train_stage(run)
    questions = [
        {"image": name, "question": "what is it?", "answer": answer, "type": "color"}
        for name, answer in (("a.png", "red"), ("b.png", "blue"), ("a.png", "no"))
    ]
    said = ask_closed(trainer, run, questions, rows, blank=True)
    return [[item["prediction"] for item in part] for part in (said.answered, said.blanked or [])]


def evaluated(checkpoint: Path, rows: Path) -> list[str]:
    from megatron_moellava.commands.evaluate import main

    questions, answers = rows / "questions.jsonl", rows / "answers.jsonl"
    asked = [{"question_id": n, "image": name, "text": f"What is {n}?"} for n, name in enumerate(("a.png", "b.png"))]
    questions.write_text("".join(json.dumps(item) + "\n" for item in asked))
    arguments = ["--load", str(checkpoint), "--questions", str(questions), "--answers", str(answers)]
    assert main([*arguments, "--max-new-tokens", "4", "--out", str(rows / "eval"), "--batch-size", "2"]) == 0
    return [json.loads(line)["text"] for line in answers.read_text().splitlines()]


def analysed(checkpoint: Path, rows: Path) -> dict:
    from megatron_moellava.commands.analyze import main

    out = rows / "routing"
    arguments = ["--load", str(checkpoint), "--data", str(rows / "rows.json"), "--out", str(out), "--pca"]
    assert main([*arguments, "--overlays", "1"]) == 0
    found = json.loads((out / "routing.json").read_text())
    return {name: found[name] for name in ("layers", "similarity")}


def served() -> list[list[int]]:
    """Two callers at the same time; the engine works in a thread of its own."""
    from megatron_moellava.serving.service import Service
    from tests.helpers.inference_models import ask, tiny_engine

    async def answer(request) -> list[int]:
        request, prompt = service.engine.fit(request)
        tokens: list[int] = []
        async for event in service.events(request, prompt):
            tokens = list(event.completion.tokens) if event.completion is not None else tokens
        return tokens

    async def both():
        return await asyncio.gather(answer(ask(0)), answer(ask(1, images=0, max_new_tokens=3)))

    service = Service(tiny_engine(max_batch_size=2))
    service.start()
    try:
        return list(asyncio.run(both()))
    finally:
        service.stop()
