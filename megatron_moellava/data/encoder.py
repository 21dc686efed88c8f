"""From a sample to its tokens and labels, for one run: the label mode, the limits, and what is done to long samples."""

from dataclasses import dataclass, replace

from megatron_moellava.data.encode import IGNORE_INDEX, EncodedSample, encode, expand
from megatron_moellava.data.original import encode_original
from megatron_moellava.data.sample import BadSample, Sample
from megatron_moellava.data.templates import CONTROL, Template
from megatron_moellava.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """Everything between a Sample and its tokens, for one run."""

    template: Template
    tokenizer: Tokenizer
    num_features: int  # of one image (one tile)
    max_length: int  # tokens of a sample, images included
    label_mode: str = "spans"
    long_samples: str = "cut"

    def __call__(self, sample: Sample, features: tuple[int, ...] | None = None) -> EncodedSample:
        """`features`: tokens of each image, where they differ (tiling)."""
        features = (self.num_features,) * len(sample.images) if features is None else features
        notes = list(sample.notes)
        template = with_system(self.template, sample)
        if self.label_mode == "original":
            ids, labels, mismatch = encode_original(sample, template, self.tokenizer, self.max_length)
            notes += ["tokenization mismatch, sample masked"] if mismatch else []
        else:
            ids, labels = encode(sample, template, self.tokenizer)
        tokens_S, labels_S, images, length = expand(ids, labels, sample.images, features, self.max_length)
        useless = self.label_mode != "original" and not (labels_S != IGNORE_INDEX).any()
        if useless or (length > self.max_length and self.long_samples == "skip"):
            raise BadSample(
                "too long",
                f"{sample.origin}: {length} tokens with its images, more than the {self.max_length} of a sample"
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
            notes=(*notes, *(["truncated"] if length > self.max_length else [])),
            length=length,
        )


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
