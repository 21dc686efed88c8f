"""The quickstart's starting weights: a tiny language model and a tiny CLIP tower, as Hugging Face folders.

A real run starts from published weights; these are made on the spot. The language model is random. The tower is
pretrained here on the train images in a minute or two, with CLIP's aim: the mean of an image's patch features, through a
linear layer, must be closest to its own caption among all captions, where a caption is the sum of a learned vector for
each of its words. Then it is frozen, as a real tower is.
"""

import json
import os
import re
import shutil
from pathlib import Path

STEPS = 1400
BATCH = 64
LEARNING_RATE = 3e-3
# Of the random language model: about 1 / sqrt(hidden size). With transformers' 0.02, attention hardly looks at anything
# for hundreds of steps, and comparing a colour in the question with the picture is not learned in time.
INITIALIZER_RANGE = 0.08
STOP_WORDS = {"a", "the", "image", "shows", "picture", "of", "this", "is", "and"}


def write_language_model(out: Path, backbone, tokenizer_model: Path, seed: int) -> None:
    """A random language model of the backbone's size, with the tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_moellava.backbones.from_config import hf_config_of

    torch.manual_seed(seed)
    config = hf_config_of(backbone) | {"initializer_range": INITIALIZER_RANGE}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model.save_pretrained(out)
    shutil.copyfile(tokenizer_model, out / "tokenizer.model")


def write_tower(out: Path, tower, captions: Path, image_folder: Path, seed: int) -> float:
    """A CLIP vision model pretrained on the captioned images. Returns the share matched to their captions at the end."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from megatron_moellava.towers.from_config import hf_config_of, processor_config_of

    torch.manual_seed(seed)
    config = hf_config_of(tower)
    config.pop("model_type", None)
    model = CLIPVisionModel(CLIPVisionConfig(**config))
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # the other processes wait
    share = _pretrain(model, tower, *_load(captions, image_folder, tower), seed)
    torch.set_num_threads(threads)
    model.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(processor_config_of(tower), indent=1))
    return share


def _load(captions: Path, image_folder: Path, tower):
    """Pixels [N, 3, H, W], which words of the captions each image has [N, words], and may it be mirrored [N]?"""
    import numpy as np
    import torch

    from megatron_moellava.data.images import open_image, preprocess

    rows = json.loads(captions.read_text())
    texts = [set(re.findall(r"[a-z]+", row["conversations"][1]["value"])) - STOP_WORDS for row in rows]
    words = sorted(set().union(*texts))
    pixels = np.stack(
        [preprocess(open_image(str(image_folder / row["image"]), "caption")[0], tower, "pad") for row in rows]
    )
    mirrored = torch.tensor([not row["image"].startswith("names/") for row in rows])
    return torch.from_numpy(pixels), torch.tensor([[float(w in text) for w in words] for text in texts]), mirrored


def _pretrain(model, tower, pixels_NCHW, words_NW, may_flip_N, seed: int) -> float:
    import torch
    from tqdm import trange

    captions_KW, caption_N = words_NW.unique(dim=0, return_inverse=True)
    head = torch.nn.Linear(tower.hidden_size, words_NW.shape[1])
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    random = torch.Generator().manual_seed(seed)
    matched = 0.0
    bar = trange(STEPS, desc="Pretraining the tower on captions", unit="step", mininterval=2)
    for step in bar:
        chosen = torch.randint(len(pixels_NCHW), (BATCH,), generator=random)
        pixels = pixels_NCHW[chosen]
        if step % 2:  # shapes mean the same the other way round; a flag or an arrow does not
            pixels = torch.where(may_flip_N[chosen, None, None, None], pixels.flip(3), pixels)
        hidden = model(pixels, output_hidden_states=True).hidden_states[tower.num_used_layers]
        logits_BK = head(hidden[:, int(tower.drop_first_feature) :].mean(dim=1)) @ captions_KW.T
        loss = torch.nn.functional.cross_entropy(logits_BK, caption_N[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        matched += 0.05 * ((logits_BK.argmax(dim=1) == caption_N[chosen]).float().mean().item() - matched)
        bar.set_postfix(loss=f"{loss.item():.3f}", matched=f"{matched:.0%}", refresh=False)
    return matched
