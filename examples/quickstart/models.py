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

TOWER_STEPS = {"fast": 1000, "names": 1400, "full": 1400}  # of its pretraining, by preset
BATCH = 64
SAVE_INTERVAL = 200  # steps
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


def write_tower(out: Path, tower, captions: Path, image_folder: Path, seed: int, steps: int) -> float:
    """A CLIP vision model pretrained on the captioned images. Returns the share matched to their captions at the end.

    Only the layers whose output is used are trained; what the tower has beyond them stays random. Goes on from what an
    interrupted call has left in `out`.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from megatron_moellava.towers.from_config import hf_config_of, processor_config_of

    torch.manual_seed(seed)
    config = hf_config_of(tower)
    config.pop("model_type", None)
    model = CLIPVisionModel(CLIPVisionConfig(**config))
    used = CLIPVisionModel(CLIPVisionConfig(**config | {"num_hidden_layers": tower.num_used_layers}))
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # the other processes wait
    pixels_NCHW, words_NW = load_captions(captions, image_folder, tower)
    mirrored_N = may_be_mirrored(captions)
    matched = Pretraining(used, tower, words_NW, seed, steps, mirrored_N).run(pixels_NCHW, out / "pretraining.pt")
    torch.set_num_threads(threads)
    model.load_state_dict(used.state_dict(), strict=False)
    model.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(processor_config_of(tower), indent=1))
    (out / "pretraining.pt").unlink(missing_ok=True)
    return matched


def load_captions(captions: Path, image_folder: Path, tower, limit: int | None = None):
    """Pixels [N, 3, H, W], and which words of the captions each image has [N, words]; of all images or the first `limit`."""
    import numpy as np
    import torch

    from megatron_moellava.data.images import open_image, preprocess

    rows = json.loads(captions.read_text())[:limit]
    texts = [set(re.findall(r"[a-z]+", row["conversations"][1]["value"])) - STOP_WORDS for row in rows]
    words = sorted(set().union(*texts))
    pixels = np.stack(
        [preprocess(open_image(str(image_folder / row["image"]), "caption")[0], tower, "pad") for row in rows]
    )
    return torch.from_numpy(pixels), torch.tensor([[float(word in text) for word in words] for text in texts])


def may_be_mirrored(captions: Path):
    """Which images mean the same the other way round [N]: shapes do, an arrow or a flag does not."""
    import torch

    return torch.tensor([not row["image"].startswith("names/") for row in json.loads(captions.read_text())])


class Pretraining:
    """CLIP's aim on captions that are sets of words; its state is saved every SAVE_INTERVAL steps."""

    def __init__(self, model, tower, words_NW, seed: int, steps: int, mirrored_N=None):
        import torch

        if mirrored_N is None:
            mirrored_N = torch.ones(len(words_NW), dtype=torch.bool)
        self.mirrored_N = mirrored_N

        self.model, self.skip, self.steps = model, int(tower.drop_first_feature), steps
        self.captions_KW, self.caption_N = words_NW.unique(dim=0, return_inverse=True)
        self.head = torch.nn.Linear(tower.hidden_size, words_NW.shape[1])
        self.parameters = [*model.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
        rising = max(0.1, 1.5 / steps)  # it divides by the steps of the rise less one, and by those of the fall
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps, pct_start=rising
        )
        self.random = torch.Generator().manual_seed(seed)
        self.step, self.matched = 0, 0.0

    def run(self, pixels_NCHW, file: Path) -> float:
        """All steps that are left; the running share of images matched to their captions."""
        from tqdm import trange

        if file.exists():
            self._load(file)
        bar = trange(self.step, self.steps, desc="Pretraining the tower on captions", unit="step", mininterval=2)
        for _ in bar:
            loss = self.train(pixels_NCHW)
            bar.set_postfix(loss=f"{loss:.3f}", matched=f"{self.matched:.0%}", refresh=False)
            if self.step % SAVE_INTERVAL == 0:
                self._save(file)
        return self.matched

    def train(self, pixels_NCHW) -> float:
        """One step; its loss."""
        import torch

        chosen = torch.randint(len(pixels_NCHW), (BATCH,), generator=self.random)
        pixels = pixels_NCHW[chosen]
        if self.step % 2:
            pixels = torch.where(self.mirrored_N[chosen, None, None, None], pixels.flip(3), pixels)
        hidden = self.model(pixels).last_hidden_state
        logits_BK = self.head(hidden[:, self.skip :].mean(dim=1)) @ self.captions_KW.T
        loss = torch.nn.functional.cross_entropy(logits_BK, self.caption_N[chosen])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.matched += 0.05 * (
            (logits_BK.argmax(dim=1) == self.caption_N[chosen]).float().mean().item() - self.matched
        )
        return loss.item()

    def _stateful(self) -> dict:
        return {"model": self.model, "head": self.head, "optimizer": self.optimizer, "schedule": self.schedule}

    def _save(self, file: Path) -> None:
        import torch

        state = {name: part.state_dict() for name, part in self._stateful().items()}
        state |= {"random": self.random.get_state(), "step": self.step, "matched": self.matched}
        unfinished = file.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.rename(file)

    def _load(self, file: Path) -> None:
        import torch

        state = torch.load(file, weights_only=True)
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.random.set_state(state["random"])
        self.step, self.matched = state["step"], state["matched"]
