"""From a sample to its tokens and labels, for one run: the label mode, the limits, and what is done to long samples."""

from dataclasses import dataclass, replace

from megatron_moellava.config import ConfigError
from megatron_moellava.data.encode import IGNORE_INDEX, EncodedSample, encode, expand
from megatron_moellava.data.original import encode_original, original_length
from megatron_moellava.data.sample import BadSample, Sample
from megatron_moellava.data.templates import CONTROL, Template
from megatron_moellava.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """Everything between a Sample and its tokens, for one run."""

    template: Template
    tokenizer: Tokenizer
    num_features: int  # of one image (one tile)
    max_length: int  # positions of a sample, images included
    text_length: int | None = None  # ids of a sample, an image being one: the original's model_max_length
    label_mode: str = "spans"
    long_samples: str = "cut"

    def __post_init__(self) -> None:
        if self.label_mode == "original" and not self.template.labels:
            raise ConfigError(
                f"data.label_mode=original: the original has no template {self.template.version!r}, so there is no rule to "
                "follow; use data.label_mode=spans"
            )

    def __call__(self, sample: Sample, features: tuple[int, ...] | None = None) -> EncodedSample:
        """`features`: tokens of each image, where they differ (tiling)."""
        features = (self.num_features,) * len(sample.images) if features is None else features
        kept = self.template.style == "single" and sample.leading
        notes = [note for note in sample.notes if not (kept and note == "leading answer dropped")]
        template = with_system(self.template, sample)
        if self.label_mode == "original":
            longest = self.text_length or self.max_length
            ids, labels, mismatch = encode_original(sample, template, self.tokenizer, longest)
            notes += ["tokenization mismatch, sample masked"] if mismatch else []
        else:
            ids, labels = encode(sample, template, self.tokenizer)
        tokens_S, labels_S, images, length = expand(
            ids, labels, sample.images, features, self.max_length, self.text_length
        )
        if self.label_mode == "original":  # a text without images is cut before its labels are counted
            length += original_length(sample, template, self.tokenizer, len(ids)) - len(ids)
        is_cut = len(tokens_S) < length
        useless = self.label_mode != "original" and not (labels_S != IGNORE_INDEX).any()
        if useless or (is_cut and self.long_samples == "skip"):
            raise BadSample(
                "too long",
                f"{sample.origin}: {length} tokens with its images, more than the {self._limit} of a sample"
                f"{', and nothing to learn before the cut' if useless else ''}; shorten the row, or raise "
                "data.seq_length and data.max_sample_length as far as the backbone allows",
            )
        return EncodedSample(
            id=sample.id,
            tag=sample.tag,
            tokens_S=tokens_S,
            labels_S=labels_S,
            images=images,
            features=features[: len(images)],
            notes=(*notes, *(["truncated"] if is_cut else [])),
            length=length,
        )

    @property
    def _limit(self) -> str:
        if self.text_length is None:
            return str(self.max_length)
        return f"{self.text_length} ids (an image counts as one) or {self.max_length} positions"


def with_system(template: Template, sample: Sample) -> Template:
    """The template with the sample's own system prompt, if it has one. Raises BadSample where there is no place for it."""
    if not sample.system:
        return template
    if template.style == "plain":
        raise BadSample(
            "no place for a system prompt",
            f"{sample.origin}: data.template={template.version!r} has no system prompt; remove `system` from the row",
        )
    if found := CONTROL.search(sample.system):
        raise BadSample(
            "control token in a system prompt",
            f"{sample.origin}: the system prompt holds {found.group()!r}, which would be read as the token; remove it",
        )
    # Where control tokens mark the roles, the first lines of the template's text do so for the system prompt.
    mark = template.system[: template.system.rindex("\n") + 1] if template.style == "mpt" else ""
    return replace(template, system=mark + sample.system)
