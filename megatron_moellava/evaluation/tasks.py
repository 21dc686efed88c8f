"""The benchmarks as data: where the questions lie, how they are asked, how the answers are scored.

The layout of a data folder is that of LLaVA's eval.zip (see docs/how-to/evaluation.md), so that a folder prepared for the
original works as it is. Prompts: the user's turn is "<image>\\n" + question; most suffixes ("Answer the question using
a single word or phrase.") are already in the question files, `suffix` is what the original's driver adds to them.
Decoding is greedy everywhere, as the original's scripts ask for it.
"""

import difflib
from functools import partial

from megatron_moellava.config import ConfigError
from megatron_moellava.evaluation import submission
from megatron_moellava.evaluation.choice_tasks import CHOICE_TASKS
from megatron_moellava.evaluation.place_tasks import PLACE_TASKS
from megatron_moellava.evaluation.scorers import choice, held_out, judged, text, yes_no
from megatron_moellava.evaluation.task import OPTION_SUFFIX, Task

_EVAL_ZIP = "LLaVA's eval.zip (github.com/haotian-liu/LLaVA, docs/Evaluation.md)"
_MMBENCH_URL = "download.openmmlab.com/mmclassification/datasets/mmbench"


def _mmbench(name: str, title: str, table: str, suffix: str) -> Task:
    return Task(
        name=name,
        title=title,
        folder="mmbench",
        questions=table,
        reader="mmbench",
        suffix=suffix,
        max_new_tokens=1024,
        score=choice.mmbench,
        submit=partial(submission.mmbench, table=table),
        server="https://mmbench.opencompass.org.cn/mmbench-submission",
        packages=("openpyxl",),
        origin=f"{_MMBENCH_URL}/{table}",
    )


_ALL = (
    Task(
        name="vqav2",
        title="VQAv2",
        folder="vqav2",
        questions="llava_vqav2_mscoco_test-dev2015.jsonl",
        reader="llava_jsonl",
        images="test2015",
        submit=submission.vqav2,
        server="https://eval.ai/web/challenges/challenge-page/830/my-submission",
        needs=("llava_vqav2_mscoco_test2015.jsonl",),
        origin=f"questions: {_EVAL_ZIP}; images: images.cocodataset.org/zips/test2015.zip",
    ),
    Task(
        name="gqa",
        title="GQA",
        folder="gqa",
        questions="llava_gqa_testdev_balanced.jsonl",
        reader="llava_jsonl",
        images="data/images",
        score=text.gqa,
        submit=submission.gqa,
        needs=("data/questions1.2/testdev_balanced_questions.json",),
        origin=f"questions: {_EVAL_ZIP}; images and truths: cs.stanford.edu/people/dorarad/gqa/download.html",
    ),
    Task(
        name="vizwiz",
        title="VisWiz",
        folder="vizwiz",
        questions="llava_test.jsonl",
        reader="llava_jsonl",
        images="test",
        submit=submission.vizwiz,
        server="https://eval.ai/web/challenges/challenge-page/1911/my-submission",
        origin=f"questions: {_EVAL_ZIP}; images: vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip",
    ),
    Task(
        name="scienceqa",
        title="SQA-I",
        folder="scienceqa",
        questions="llava_test_CQM-A.json",
        reader="science_qa",
        images="images/test",
        suffix=OPTION_SUFFIX,
        image_aspect_ratio="square",
        max_new_tokens=1024,
        logs_turn=True,
        score=choice.science_qa,
        needs=("problems.json", "pid_splits.json"),
        origin=f"questions: {_EVAL_ZIP}; the rest: github.com/lupantech/ScienceQA, folder data/scienceqa",
    ),
    Task(
        name="textvqa",
        title="TextVQA",
        folder="textvqa",
        questions="llava_textvqa_val_v051_ocr.jsonl",
        reader="llava_jsonl",
        images="train_images",
        score=text.textvqa,
        needs=("TextVQA_0.5.1_val.json",),
        origin=f"questions: {_EVAL_ZIP}; images and answers: dl.fbaipublicfiles.com/textvqa (0.5.1, train_val_images)",
    ),
    Task(
        name="pope",
        title="POPE",
        folder="pope",
        questions="llava_pope_test.jsonl",
        reader="llava_jsonl",
        images="val2014",
        score=yes_no.pope,
        needs=tuple(f"coco/coco_pope_{category}.json" for category in yes_no.POPE_CATEGORIES),
        origin=f"questions: {_EVAL_ZIP}; coco: github.com/AoiDragon/POPE, output/coco at e3e3926; val2014: COCO",
    ),
    Task(
        name="mme",
        title="MME",
        folder="MME",
        questions="llava_mme.jsonl",
        reader="llava_jsonl",
        images="MME_Benchmark_release_version",
        score=yes_no.mme,
        needs=("MME_Benchmark_release_version",),
        origin=f"questions: {_EVAL_ZIP}; the rest: github.com/BradyFU/Awesome-Multimodal-Large-Language-Models",
    ),
    _mmbench("mmbench", "MMB", "mmbench_dev_20230712.tsv", OPTION_SUFFIX),
    _mmbench("mmbench_cn", "MMB-CN", "mmbench_dev_cn_20231003.tsv", "\n请直接回答选项字母。"),
    Task(
        name="seed",
        title="SEED",
        folder="seed_bench",
        questions="llava-seed-bench.jsonl",
        reader="llava_jsonl",
        images=".",
        score=choice.seed,
        submit=submission.seed,
        server="https://huggingface.co/spaces/AILab-CVC/SEED-Bench_Leaderboard",
        needs=("SEED-Bench.json",),
        pictures=("SEED-Bench-image",),
        origin=f"{_EVAL_ZIP}; the rest: github.com/AILab-CVC/SEED-Bench, DATASET.md (of a video: the middle frame)",
    ),
    Task(
        name="llava_bench",
        title="LLaVAW",
        folder="llava-bench-in-the-wild",
        questions="questions.jsonl",
        reader="llava_jsonl",
        images="images",
        image_aspect_ratio="square",
        max_new_tokens=1024,
        score=judged.llava_bench,
        judge=judged.LLAVA_BENCH_JUDGE,
        needs=("context.jsonl", "answers_gpt4.jsonl"),
        origin="huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild; rule.json: LLaVA's llava/eval/table",
    ),
    Task(
        name="mm_vet",
        title="MM-Vet",
        folder="mm-vet",
        questions="llava-mm-vet.jsonl",
        reader="llava_jsonl",
        images="images",
        image_aspect_ratio="square",
        max_new_tokens=1024,
        score=judged.mm_vet,
        submit=submission.mm_vet,
        server="https://huggingface.co/spaces/whyu/MM-Vet_Evaluator",
        judge=judged.MM_VET_JUDGE,
        needs=("mm-vet.json",),
        origin=f"questions: {_EVAL_ZIP}; the rest: github.com/yuweihao/MM-Vet, releases/download/v1/mm-vet.zip",
    ),
    Task(
        name="quickstart",
        title="quickstart",
        folder=".",
        questions="test.jsonl",
        reader="quickstart",
        images="images",
        max_new_tokens=16,
        score=partial(held_out.held_out, train_file="conversations.json"),
        origin="examples/quickstart/make_data.py",
    ),
    Task(
        name="quickstart_pope",
        title="quickstart POPE",
        folder=".",
        questions="test.jsonl",
        reader="quickstart_pope",
        images="images",
        max_new_tokens=16,
        score=yes_no.quickstart_pope,
        origin="examples/quickstart/make_data.py",
    ),
    Task(
        name="names",
        title="names",
        folder=".",
        questions="names_test.jsonl",
        reader="quickstart",
        images="images",
        max_new_tokens=128,  # names in eight languages
        score=partial(held_out.held_out, train_file="names.json"),
        origin="examples/quickstart/names.py",
    ),
    Task(
        name="names_scenes",
        title="names, scenes",
        folder=".",
        questions="scenes_test.jsonl",
        reader="quickstart",
        images="images",
        max_new_tokens=48,
        score=partial(held_out.held_out, train_file="scenes.json"),
        origin="examples/quickstart/names.py --scenes",
    ),
    Task(
        name="names_pope",
        title="names POPE",
        folder=".",
        questions="scenes_test.jsonl",
        reader="quickstart_pope",
        images="images",
        max_new_tokens=16,
        score=yes_no.quickstart_pope,
        origin="examples/quickstart/names.py --scenes",
    ),
    *PLACE_TASKS,
    *CHOICE_TASKS,
)
TASKS = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """A benchmark by name; ConfigError with the nearest names otherwise."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3) or sorted(TASKS)
        raise ConfigError(f"benchmark={name!r} is unknown; use {', '.join(near)}")
    return TASKS[name]
