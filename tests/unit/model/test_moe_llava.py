"""The model: where images go, what padding and labels do to the loss, positions of packed rows."""

from dataclasses import replace

import pytest
import torch

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import MoEConfig
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.model.attention import packed_seq_params
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.moe_llava import PositionedRotary, causal_padding_mask
from tests.distributed.rows import micro_batches
from tests.helpers.batches import X, padded, words
from tests.helpers.inference_models import tiny_run
from tests.helpers.modalities import DEPTH

from megatron.core.models.common.embeddings import YarnRotaryEmbedding


@pytest.fixture
def model(world):
    return build_model(tiny_run())[0].eval()


@torch.no_grad()
def test_rows_of_image_tokens_are_overwritten_by_visual_tokens_in_order(model):
    features_NFD = torch.randn(1, 2, model.backbone.hidden_size)
    tokens_BS = torch.tensor([[5, IMAGE_TOKEN, IMAGE_TOKEN, 7]])
    embedded_SBD = model.embed(tokens_BS, None, features_NFD)
    words_SBD = model.embed(torch.tensor([[5, 7]]), None)
    assert torch.equal(embedded_SBD[1:3, 0], features_NFD[0])
    assert torch.equal(embedded_SBD[[0, 3], 0], words_SBD[:, 0])


@torch.no_grad()
def test_too_few_visual_tokens_are_an_error_with_both_numbers(model):
    with pytest.raises(ValueError, match="3 placeholder rows for 2 visual tokens of 1 images"):
        model.embed(torch.tensor([[IMAGE_TOKEN] * 3]), None, torch.randn(1, 2, model.backbone.hidden_size))


@torch.no_grad()
def test_losses_are_zero_where_there_is_no_label_and_the_cross_entropy_elsewhere(model):
    batch = words()
    arguments = model_inputs(batch)
    losses_BS = model(**arguments)
    logits_BSV = model(**arguments | {"labels_BS": None})
    assert logits_BSV.shape[-1] == model.backbone.vocab_size
    expected = torch.nn.functional.cross_entropy(logits_BSV.float().transpose(1, 2), batch.labels_BS, reduction="none")
    assert torch.allclose(losses_BS, expected, atol=1e-4)
    assert not losses_BS[batch.labels_BS == X].any() and losses_BS.any()


@torch.no_grad()
def test_what_padding_holds_does_not_change_the_losses(model):
    rows = [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]
    labels = [[6, 7, X, X, X], [9, 10, 11, 12, X]]
    losses_BS = model(**model_inputs(padded(rows, labels, ["", ""])))
    other = padded([[5, 6, 7, 99, 77], rows[1]], labels, ["", ""])
    other.padding_mask_BS = padded(rows, labels, ["", ""]).padding_mask_BS
    assert torch.equal(model(**model_inputs(other)), losses_BS)


def test_positions_restart_where_a_packed_row_says_so(model):
    rotary = PositionedRotary(model.backbone)
    plain = rotary(4)
    with rotary.at(torch.tensor([[0, 1, 0, 1]])):
        assert torch.equal(rotary(4), plain[[0, 1, 0, 1]])
    assert torch.equal(rotary(4), plain), "the positions are forgotten"


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3", "deepseek-v3-tiny"])
def test_scaled_frequencies_are_megatron_cores(world, name):
    backbone = get_backbone(name)
    yarn, channels = backbone.yarn, backbone.rotary_channels
    theirs = YarnRotaryEmbedding(
        kv_channels=channels,
        rotary_base=backbone.rotary_base,
        scaling_factor=yarn.factor,
        original_max_position_embeddings=yarn.original_max_position_embeddings,
        mscale=yarn.mscale,
        mscale_all_dim=yarn.mscale_all_dim,
    )
    angles, factor = theirs.get_emb(2)
    torch.testing.assert_close(PositionedRotary(backbone).inv_freq, angles[1, 0, 0, : channels // 2])
    assert yarn.attention_factor == pytest.approx(factor)


def test_only_packed_rows_have_a_description():
    assert packed_seq_params(None, None) is None
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    described = packed_seq_params(cu_seqlens, 3)
    assert described.cu_seqlens_q.tolist() == [0, 3, 5] and described.max_seqlen_kv == 3


def test_causal_padding_mask_hides_later_positions_and_padding():
    mask = causal_padding_mask(torch.tensor([[True, True, False]]))
    assert mask.shape == (1, 1, 3, 3)
    assert (~mask[0, 0]).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0]]


def test_a_batch_without_images_still_gives_the_projector_a_gradient(model):
    model.vision_tower.requires_grad_(False)
    model(**model_inputs(words())).sum().backward()
    assert not model.projector.linear_fc1.weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_columns_that_only_align_rows_do_not_count_in_the_originals_gate(world, recipe):
    """FP8 fills rows up to 16 or 32; places at the experts and losses are those of the rows as they came."""
    moe = MoEConfig(router="original", moe_expert_capacity_factor=0.5, second_choice="deterministic")
    plain = tiny_run(moe)
    aligned = replace(plain, training=replace(plain.training, fp8_recipe=recipe))
    (narrow,), (wide,) = build_model(plain), build_model(aligned)
    wide.load_state_dict(narrow.state_dict(), strict=False)
    batch = words()
    length, multiple = batch.tokens_BS.shape[1], aligned.row_multiple
    fill = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, -length % multiple), value=value)
        for name, value in (("tokens_BS", 0), ("labels_BS", X), ("padding_mask_BS", False))
    }
    filled = replace(batch, position_ids_BS=torch.arange(multiple).expand(2, -1), max_seqlen=multiple, **fill)
    expected_BS, losses_BS = narrow(**model_inputs(batch)), wide(**model_inputs(filled))
    assert torch.allclose(losses_BS[:, :length], expected_BS, atol=1e-5) and not losses_BS[:, length:].any()


OWN = {
    "tower": {"tower": "clip-tiny"},
    "projector": {"projector": "own"},
    "both": {"tower": "clip-tiny", "projector": "own"},
}


@pytest.mark.parametrize("own", OWN)
def test_copies_of_tower_and_projector_compute_and_learn_what_the_shared_ones_do(world, own):
    """Losses of every row, and of each shared parameter the sum of both gradients. Micro-batches have plain pictures, depth,
    both in either order, or none: all trained parameters get gradients from each."""
    record = replace(DEPTH, **OWN[own])
    shared, apart = (build_model(with_modality(item))[0].eval() for item in (DEPTH, record))
    weights = shared.state_dict()
    for part, prefix in (("tower", "vision_tower."), ("projector", "projector.")):
        copies = {
            f"modality_depth.{part}.{name.removeprefix(prefix)}": value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        weights |= {name: value for name, value in copies.items() if name in apart.state_dict()}
    apart.load_state_dict(weights)
    kinds = set()
    for step in range(2):
        batches = [micro_batches("modalities", 512, shared.tower, item, step) for item in (DEPTH, record)]
        for one, other in zip(*batches, strict=True):
            kinds.add(tuple(kind for kind, _ in one.pictures) or len(one.pixel_values_NCHW))
            assert sum(map(len, other.apart.values())) == sum(kind == "depth" for kind, _ in one.pictures)
            gradients = []
            for model, batch in ((shared, one), (apart, other)):
                model.zero_grad()
                losses_BS = model(**model_inputs(batch))
                losses_BS.sum().backward()
                gradients.append((losses_BS, {name: item.grad for name, item in model.named_parameters()}))
            (expected_BS, whole), (losses_BS, parts) = gradients
            torch.testing.assert_close(losses_BS, expected_BS, rtol=1e-5, atol=1e-5)
            assert all(gradient is not None for gradient in parts.values())
            for name, gradient in whole.items():
                twin = (
                    name.replace("vision_tower.", "modality_depth.tower.")
                    if name.startswith("vision")
                    else f"modality_depth.{name}"
                )
                found = parts[name] + parts.get(twin, 0)
                torch.testing.assert_close(
                    found, gradient, rtol=1e-3, atol=1e-5 * max(1.0, float(gradient.abs().max()))
                )
    assert kinds == {0, 1, ("image", "depth"), ("depth", "image"), ("depth",)}


def with_modality(record):
    run = tiny_run()
    return replace(run, data=replace(run.data, modalities=(record,), packing=True, seq_length=128))
