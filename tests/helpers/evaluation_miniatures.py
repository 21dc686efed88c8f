"""A data folder in the layout of LLaVA's eval.zip with a few questions of every benchmark, written by the test itself.

What each question's right answer is stands beside it, so that the tests can count by hand.
"""

import base64
import io
import json

from PIL import Image

from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.tasks import get_task

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_image(path, color=(200, 30, 30), size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def base64_image(color=(10, 20, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def pope(root):
    """Two pictures, one question per category and picture; truths yes, no in each category."""
    folder = root / "pope"
    rows, number = [], 0
    for category in ("adversarial", "popular", "random"):
        labels = []
        for image, label in (("1.jpg", "yes"), ("2.jpg", "no")):
            text = f"Is there a {category} dog in the image?"
            rows.append({"question_id": number, "image": image, "text": text + SHORT, "category": category})
            labels.append({"question_id": number + 1, "image": image, "text": text, "label": label})
            number += 1
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", labels)
    write_jsonl(folder / "llava_pope_test.jsonl", rows)
    for image in ("1.jpg", "2.jpg"):
        write_image(folder / "val2014" / image)
    return folder


def gqa(root):
    """Truths: a1 "yes" (binary), a2 "red" (open), both on picture n1; a3 "left" (open) on n2."""
    folder = root / "gqa"
    truths = {"a1": ("yes", "verify", "n1"), "a2": ("red", "query", "n1"), "a3": ("left", "query", "n2")}
    rows = [
        {"question_id": key, "image": f"{image}.jpg", "text": f"{key}?{SHORT}", "category": "default"}
        for key, (_, _, image) in truths.items()
    ]
    write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    annotations = {
        key: {"answer": answer, "types": {"structural": structure}, "imageId": image}
        for key, (answer, structure, image) in truths.items()
    }
    write_json(folder / "data/questions1.2/testdev_balanced_questions.json", annotations)
    for image in ("n1", "n2"):
        write_image(folder / f"data/images/{image}.jpg")
    return folder


def textvqa(root):
    """Picture i1, "What is written?": 3 of 10 say "two dogs" (credit 0.9), 7 say "dogs" (1.0). Also i1, "Which brand?":
    one says "acme" (0.3), nine "ACME Inc." (1.0). i2, "What is written?": ten say "exit".
    """
    folder = root / "textvqa"
    data = [
        {"image_id": "i1", "question": "What is written?", "answers": ["Two dogs"] * 3 + ["dogs."] * 7},
        {"image_id": "i1", "question": "Which brand?", "answers": ["acme"] + ["ACME Inc."] * 9},
        {"image_id": "i2", "question": "What is written?", "answers": ["exit"] * 10},
    ]
    rows = [
        {
            "question_id": row["image_id"],  # the picture's, in LLaVA's file
            "image": f"{row['image_id']}.jpg",
            "text": f"{row['question']}\nReference OCR token: DOGS, 2{SHORT}",
        }
        for row in data
    ]
    write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": data})
    for key in ("i1", "i2"):
        write_image(folder / f"train_images/{key}.jpg")
    return folder


def science_qa(root):
    """Truths: 1 -> B (picture), 2 -> A (picture, three choices), 3 -> A (no picture)."""
    folder = root / "scienceqa"
    problems = {
        "1": {"choices": ["x", "y"], "answer": 1},
        "2": {"choices": ["x", "y", "z"], "answer": 0},
        "3": {"choices": ["x", "y"], "answer": 0},
    }
    rows = []
    for key, problem in problems.items():
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABC", problem["choices"], strict=False))
        row = {"id": key, "conversations": [{"from": "human", "value": f"Question {key}?\n{options}"}, {"value": ""}]}
        if key != "3":
            row["image"] = f"{key}/image.png"
            row["conversations"][0]["value"] = "<image>\n" + row["conversations"][0]["value"]
            write_image(folder / f"images/test/{key}/image.png")
        rows.append(row)
    write_json(folder / "llava_test_CQM-A.json", rows)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": list(problems)})
    return folder


def mme(root):
    """existence: two pictures with truths Yes, No each; code_reasoning (files in a subfolder): one with Yes, No."""
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    rows = []
    for category, stem, image, texts in (
        ("existence", "01", "existence/01.jpg", "existence"),
        ("existence", "02", "existence/02.jpg", "existence"),
        ("code_reasoning", "0020", "code_reasoning/images/0020.png", "code_reasoning/questions_answers_YN"),
    ):
        asked = ["Is it there?", "Is it not there? "]  # one lost a blank: the release has two before "Please"
        lines = [f"{asked[0]} Please answer yes or no.\tYes", f"{asked[1].strip()}  Please answer yes or no.\tNo"]
        (release / texts).mkdir(parents=True, exist_ok=True)
        (release / texts / f"{stem}.txt").write_text("\n".join(lines) + "\n")
        write_image(release / image)
        extension = image.rpartition(".")[2]
        key = f"{category}/{stem}.{extension}"  # the two questions of a picture share it
        for text in asked:
            rows.append({"question_id": key, "image": image, "text": text.strip() + SHORT, "category": category})
    write_jsonl(folder / "llava_mme.jsonl", rows)
    return folder


def seed(root):
    """Truths: 1 -> A, 2 -> B (pictures, of two types), v3 -> C (a video's frame)."""
    folder = root / "seed_bench"
    truths = [(1, "A", "image", 1), (2, "B", "image", 2), ("v3", "C", "video", 2)]
    names = {"Scene": 1, "Instance": 2}
    write_jsonl(
        folder / "llava-seed-bench.jsonl",
        [{"question_id": key, "image": f"SEED-Bench-image/{key}", "text": f"{key}?{LETTER}"} for key, *_ in truths],
    )
    questions = [
        {"question_id": str(key), "answer": answer, "data_type": kind, "question_type_id": number}
        for key, answer, kind, number in truths
    ]
    write_json(folder / "SEED-Bench.json", {"questions": questions, "question_type": names})
    for key, *_ in truths:
        write_image((folder / f"SEED-Bench-image/{key}").with_suffix(".png"))
    return folder


def mmbench(root, table="mmbench_dev_20230712.tsv", answers=("B", "A")):
    """Two questions: 5 (three options, hint, B) and 7 (two options, the second one's text holds a quote, A)."""
    folder = root / "mmbench"
    folder.mkdir(parents=True, exist_ok=True)
    columns = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    ]
    rows = [
        [5, "Which one?", "Look left.", "cat", "dog", "cow", "", answers[0], "c", base64_image(), "s", "l", "", "dev"],
        [
            7,
            "Line one\nLine two?",
            "",
            "sodium Na",
            'say "no"',
            "",
            "",
            answers[1],
            "c",
            base64_image(),
            "s",
            "l",
            "",
            "dev",
        ],
    ]
    lines = ["\t".join(columns)]
    lines += ["\t".join('"{}"'.format(str(cell).replace('"', '""')) for cell in row) for row in rows]
    (folder / table).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def vqav2(root):
    """Three questions in the full list, two of them in test-dev."""
    folder = root / "vqav2"
    rows = [{"question_id": number, "image": f"{number}.jpg", "text": f"{number}?{SHORT}"} for number in (11, 12, 13)]
    write_jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    write_jsonl(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[1:])
    for number in (12, 13):
        write_image(folder / f"test2015/{number}.jpg")
    return folder


def vizwiz(root):
    folder = root / "vizwiz"
    rows = [{"question_id": f"{name}.jpg", "image": f"{name}.jpg", "text": f"{name}?{SHORT}"} for name in ("v1", "v2")]
    write_jsonl(folder / "llava_test.jsonl", rows)
    for row in rows:
        write_image(folder / "test" / row["image"])
    return folder


def llava_bench(root):
    """Three questions in two categories on two pictures."""
    folder = root / "llava-bench-in-the-wild"
    rows = [
        {"question_id": 0, "image": "001.jpg", "text": "Where is this?", "category": "conv"},
        {"question_id": 1, "image": "001.jpg", "text": "Describe it.", "category": "detail"},
        {"question_id": 2, "image": "002.jpg", "text": "And this?", "category": "conv"},
    ]
    write_jsonl(folder / "questions.jsonl", rows)
    write_jsonl(
        folder / "context.jsonl",
        [{"image": "001.jpg", "caption": "A volcano."}, {"image": "002.jpg", "caption": ["A lake.", "A hut."]}],
    )
    write_jsonl(folder / "answers_gpt4.jsonl", [{"question_id": n, "text": f"reference {n}"} for n in range(3)])
    for image in ("001.jpg", "002.jpg"):
        write_image(folder / "images" / image)
    return folder


def mm_vet(root):
    """0: rec; 1: rec and ocr."""
    folder = root / "mm-vet"
    write_jsonl(
        folder / "llava-mm-vet.jsonl",
        [{"question_id": n, "image": f"v1_{n}.png", "text": f"Question {n}?"} for n in range(2)],
    )
    write_json(
        folder / "mm-vet.json",
        {
            "v1_0": {"question": "Question 0?", "answer": "a<AND>b", "capability": ["rec"]},
            "v1_1": {"question": "Question 1?", "answer": "c<OR>d", "capability": ["rec", "ocr"]},
        },
    )
    for n in range(2):
        write_image(folder / f"images/v1_{n}.png")
    return folder


def quickstart(root):
    """Two existence questions and a colour; the training conversations answer the colour question with red."""
    write_jsonl(
        root / "test.jsonl",
        [
            {
                "question_id": 0,
                "image": "a.png",
                "question": "is there a circle?",
                "answer": "yes",
                "type": "existence",
            },
            {"question_id": 1, "image": "a.png", "question": "is there a square?", "answer": "no", "type": "existence"},
            {"question_id": "d-2", "image": "b.png", "question": "what color is it?", "answer": "red", "type": "color"},
        ],
    )
    turns = [{"from": "human", "value": "<image>\nwhat color is it?"}, {"from": "gpt", "value": "red"}]
    write_json(root / "conversations.json", [{"image": "c.png", "tag": "color", "conversations": turns}])
    for image in ("a.png", "b.png"):
        write_image(root / "images" / image)
    return root


def names(root):
    """Two names of one picture; the training rows answer in German, with the other thing's name more often."""
    question = "what is this called in german?"
    rows = [
        {
            "question_id": "1F431-de",
            "image": "a.png",
            "question": question,
            "answer": "katzengesicht",
            "type": "name de",
        },
        {
            "question_id": "1F431-fr",
            "image": "a.png",
            "question": "what is this called in french?",
            "answer": "tête de chat",
            "type": "name fr",
        },
    ]
    write_jsonl(root / "names_test.jsonl", rows)
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "hund"}]
    write_json(root / "names.json", [{"image": "b.png", "tag": "name de", "conversations": turns}])
    write_image(root / "images/a.png")
    return root


def names_scenes(root):
    """One picture, asked for what is there, what is not, and where."""
    image = "scenes/a.png"
    asked = [
        ("is there a cat face?", "yes", "scene existence"),
        ("is there a fox?", "no", "scene existence"),
        ("where is the cat face?", "top left", "scene position"),
    ]
    rows = [
        {"question_id": n, "image": image, "question": q, "answer": a, "type": kind}
        for n, (q, a, kind) in enumerate(asked)
    ]
    write_jsonl(root / "scenes_test.jsonl", rows)
    write_image(root / "images" / image)
    return root


def referring(root, name="refcoco_val"):
    """Two expressions about the 40 x 30 picture a.jpg, in the layout of lmms-lab/RefCOCO; the second has two wordings."""
    folder = root / "refcoco"
    rows = [
        {"question_id": "1", "file_name": "a.jpg", "bbox": [0, 0, 20, 15], "answer": ["left cat"]},
        {"question_id": "2", "file_name": "a.jpg", "bbox": [20, 15, 20, 15], "answer": ["the cup", "cup on the right"]},
    ]
    write_json(folder / f"{name}.json", rows)
    write_image(folder / "train2014/a.jpg", size=(40, 30))
    return folder


def coco_boxes(root):
    """Two cats and a cup in one picture of 40 x 30."""
    folder = root / "coco"
    boxes = [(1, [0, 0, 10, 10]), (1, [20, 0, 10, 10]), (2, [0, 20, 10, 10])]
    coco = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 40, "height": 30}],
        "annotations": [{"image_id": 5, "category_id": kind, "bbox": box, "iscrowd": 0} for kind, box in boxes],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cup"}],
    }
    write_json(folder / "annotations/instances_val2017.json", coco)
    write_image(folder / "val2017/a.jpg", size=(40, 30))
    return folder


def boxes(root):
    """One picture of 40 x 40 with a box in its left top quarter."""
    write_jsonl(root / "boxes_test.jsonl", [{"image": "a.png", "text": "where?", "boxes": [[0, 0, 20, 20]]}])
    write_image(root / "images/a.png", size=(40, 40))
    return root


def choices(root):
    """One question about two pictures, one about an animation; B is right."""
    rows = [
        {
            "question": "Is <image> like <image>?",
            "options": ["left", "right"],
            "answer": "B",
            "images": ["a.png", "a.png"],
        },
        {"question": "What happens?", "options": ["left", "right"], "answer": "B", "video": "v.gif"},
    ]
    write_jsonl(root / "choices.jsonl", rows)
    write_image(root / "a.png")
    frames = [Image.new("RGB", (6, 4), (20 * number, 0, 0)) for number in range(9)]
    frames[0].save(root / "v.gif", save_all=True, append_images=frames[1:])
    return root


def lettered(root, folder, questions, images):
    """One question about a picture, in the file of a benchmark."""
    row = {"question": "Which?", "options": ["one", "two"], "answer": "A", "images": ["../a.png"]}
    write_json(root / folder / questions / "task.json" if questions == "json" else root / folder / questions, [row])
    (root / folder / images).mkdir(parents=True, exist_ok=True)
    write_image(root / folder / images / "../a.png")
    return root / folder


def score(name, data, texts, circular=False, limit=None):
    task = get_task(name)
    questions = task.read(data, circular=circular)[:limit]
    answered = Answered(folder=data / task.folder, work=data / "work", name="ours", questions=questions, texts=texts)
    return task.score(answered)
