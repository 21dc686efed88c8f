"""README.md of an export: what the model is, what it was trained on, how good it is, and how to ask it.

Its head are the hub's metadata. Nothing is claimed that is not known: a licence, scores and data are there when they are
given or when the checkpoint says them. Of data only names are written, never the places where they lay.
"""

import json
import re
from pathlib import Path

from megatron_moellava.checkpoint.description import RunDescription
from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.inspection import model_lines
from megatron_moellava.costs.shapes import Model

HUB = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)")
NO_LICENCE = "unknown"
STAGE = re.compile(r"training of stage (\d)")
AUTO = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("FOLDER"TRUST, backend="pil")
model = AutoModelForImageTextToText.from_pretrained("FOLDER"TRUST)
messages = [{"role": "user", "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What is it?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

The chat template writes the beginning-of-text token; the tokenizer adds none of its own. `backend="pil"` gives the pixels of
the training; the default of transformers rounds some of them to the next of 256 levels. `sha256sum -c SHA256SUMS` checks the
files."""
USES = {
    "transformers": AUTO.replace("TRUST", ""),
    "modelling file": AUTO.replace("TRUST", ", trust_remote_code=True"),
    "native": "`Lfm2VlForConditionalGeneration` of transformers loads the folder, and `Siglip2ImageProcessor` makes the "
    "patches of a picture: LFM2-VL's own processor resizes by another rule. `<image>` stands once for each visual token.",
    "no tokenizer": "transformers loads the weights (with `trust_remote_code=True` if a modelling file lies beside them). The "
    "folder was exported without a tokenizer, so it has no chat template; `moellava convert export --tokenizer` writes both.",
    "language model": "`AutoModelForCausalLM` and `AutoTokenizer` of transformers load the folder; its chat template writes "
    "the beginning-of-text token.",
    "original": "The code that this layout comes from loads the folder; `moellava convert import` makes a checkpoint of it.",
}
TAUGHT = {
    1: "the projector",
    2: "projector and language model",
    3: "experts and router (or what takes their place)",
}


def model_card(
    name: str, model: Model, run: RunDescription, *, title: str, use: str, licence: str = "", scores: Path | None = None
) -> str:
    """`use`: one of USES, how to load the folder; `scores`: a scores.json of `moellava evaluate`.

    ConfigError for a file of scores that is none.
    """
    parts = [
        _head(model, licence),
        f"# {name}\n\n{_what(model)} Trained with megatron-moellava in the stages of MoE-LLaVA (arXiv 2401.15947). "
        f"Layout: {title}.",
        "## Model\n\n" + "\n".join(f"- {line.strip().replace('  ', ': ', 1)}" for line in _lines(model)),
        "## Training\n\n" + "\n".join(f"- {line}" for line in _history(run)),
        "## Scores\n\n" + _scores(scores),
        "## Use\n\n" + USES[use],
        "## Licence\n\n" + _licence(licence),
    ]
    return "\n\n".join(parts) + "\n"


def _head(model: Model, licence: str) -> str:
    sources = (model.backbone.source, model.tower.source if model.tower else "")
    bases = [found[1] for source in sources if (found := HUB.match(source))]
    lines = [
        f"license: {licence or NO_LICENCE}",
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if model.tower else 'text-generation'}",
        *(["base_model:", *(f"- {base}" for base in bases)] if bases else []),
        "tags:",
        "- megatron-moellava",
        *(["- llava"] if model.tower else []),
        *(["- moe"] if model.moe else []),
    ]
    return "\n".join(("---", *lines, "---"))


def _what(model: Model) -> str:
    language = "a language model with experts" if model.moe else "a language model"
    return (
        f"A vision-language model: a vision tower, a projector and {language}."
        if model.tower
        else f"{language}.".capitalize()
    )


def _lines(model: Model) -> list[str]:
    lines = [re.sub(r"\s{2,}", "  ", line.strip()) for line in model_lines(model)]
    if model.moe:
        lines.append(
            f"routing  the top {model.moe.moe_router_topk} of {model.moe.num_moe_experts} experts per token, deterministic and "
            "without a capacity limit"
        )
    return lines


def _history(run: RunDescription) -> list[str]:
    """The latest step first."""
    sources = ((run.config or {}).get("data") or {}).get("sources") or ()
    steps: list[dict] = []
    step: dict | None = dict(run.provenance)
    if run.config:  # `provenance` says where the stage began; the run itself says the rest
        assert step is not None
        step |= {"data": [Path(source["path"]).name for source in sources]}
        step |= {"iteration": run.iteration, "consumed_samples": run.consumed_samples}
    while step:
        steps.append(step)
        step = step.get("parent")
    said = [_step(step) for step in steps if step.get("operation")]
    return said or [f"stage {run.stage}, iteration {run.iteration}; the checkpoint says no more"]


def _step(step: dict) -> str:
    operation = str(step["operation"])
    words = [operation]
    if found := STAGE.match(operation):
        words.append(f"trains {TAUGHT[int(found[1])]}")
    elif step.get("source"):
        words.append(f"of {Path(str(step['source'])).name}")
    if step.get("data"):
        words.append(f"data: {', '.join(step['data'])}")
    if step.get("iteration"):
        words.append(f"{step['iteration']:,} steps, {step.get('consumed_samples', 0):,} samples")
    return "; ".join(words)


def _scores(file: Path | None) -> str:
    if file is None:
        return "None were given to the export."
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        records = found if isinstance(found, list) else [found]
        rows = [_row(record) for record in records if record.get("value") is not None]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--scores {file} is not a scores.json of `moellava evaluate` ({type(error).__name__}: {error}); give that file"
        ) from None
    if not rows:
        raise ConfigError(f"--scores {file} holds no score; give the scores.json that `moellava evaluate` wrote")
    return "\n".join(("| benchmark | metric | value | asked |", "|---|---|---|---|", *rows))


def _row(record: dict) -> str:
    error = record.get("standard_error")
    value = f"{record['value']:.2f}" + (f" +- {error:.2f}" if error is not None else "")
    return f"| {record['title']} | {record['metric']} | {value} | {record['count']:,} |"


def _licence(licence: str) -> str:
    if licence:
        return f"`{licence}`, as given to the export. The licences of the base models and of the data apply beside it."
    return (
        "Not stated: whoever publishes this folder chooses one (`moellava convert export --license`), within the licences of "
        "the base models and of the data."
    )
