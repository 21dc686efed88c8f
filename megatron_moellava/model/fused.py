"""RMSNorm and rotary embedding as one node each of autograd's graph, in few passes over their values.

Transformer Engine brings such kernels to a GPU. Without it torch and Megatron-Core spell them out, and what they spell costs a
small model on a CPU more time than its products: a dozen temporaries each, casts in between, broadcasts over a few channels at
a time. Shapes: S sequence, B batch, H heads or width of the norm, D channels of a head, R rows.
"""

import torch
from torch.utils.weak import WeakIdKeyDictionary

import megatron_moellava.platform as platform
from megatron_moellava.compiled import fusible

from megatron.core.models.common.embeddings import rope_utils

# --- RMSNorm --------------------------------------------------------------------------------------------------------------


class RMSNorm(torch.nn.RMSNorm):
    """torch's, which has a kernel for it on a GPU, and on a CPU `RootMeanSquare`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return super().forward(x) if platform.HAS_CUDA else RootMeanSquare.apply(x, self.weight, self.eps)


class RootMeanSquare(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 inside; kept are x and the root of each row."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        """[..., H] and [H] -> [..., H]."""
        output_RH, scale_R1 = scaled_to_one(rows(x), weight_H, eps)
        ctx.save_for_backward(x, weight_H, scale_R1)
        return output_RH.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        """Gradients of x and of the weight."""
        x, weight_H, scale_R1 = ctx.saved_tensors
        of_weight = ctx.needs_input_grad[1]
        grad_x_RH, grad_weight_H = scaled_to_one_gradients(rows(x), weight_H, scale_R1, rows(grad), of_weight)
        return grad_x_RH.view_as(x), grad_weight_H, None


def rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [R, H]: of few strides, whatever those of x, so that torch.compile makes few kernels."""
    return x.reshape(-1, x.shape[-1])


@fusible
def scaled_to_one(x_RH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and 1 / root of each row [R, 1]."""
    x_fp32_RH = x_RH.float()
    squares_R1 = torch.linalg.vector_norm(x_fp32_RH, dim=-1, keepdim=True).square_()
    scale_R1 = squares_R1.div_(x_RH.shape[-1]).add_(eps).rsqrt_()
    return (x_fp32_RH * scale_R1).mul_(weight_H).to(x_RH.dtype), scale_R1


@fusible
def scaled_to_one_gradients(
    x_RH: torch.Tensor, weight_H: torch.Tensor, scale_R1: torch.Tensor, grad_RH: torch.Tensor, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of x and, if wanted, of the weight."""
    normed_RH = x_RH.float() * scale_R1
    grad_fp32_RH, weight_fp32_H = grad_RH.float(), weight_H.float()
    product_RH = grad_fp32_RH * normed_RH
    along_R1 = product_RH.mv(weight_fp32_H).div_(x_RH.shape[-1]).unsqueeze_(1)
    grad_x_RH = (grad_fp32_RH * weight_fp32_H).addcmul_(normed_RH, along_R1, value=-1).mul_(scale_R1)
    grad_weight_H = product_RH.sum(dim=0).to(weight_H.dtype) if of_weight else None
    return grad_x_RH.to(x_RH.dtype), grad_weight_H


# --- rotary embedding -----------------------------------------------------------------------------------------------------

# angles -> (type, heads) -> cosines and sines of the last batch
_turns: WeakIdKeyDictionary = WeakIdKeyDictionary()


def rotated(heads_SBHD: torch.Tensor, angles: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Megatron-Core's `fused_apply_rotary_pos_emb`: [S, B, H, D], the first channels turned by `angles` [S, 1 | B, 1, <= D]."""
    assert not interleaved, "no backbone turns neighbouring channels"
    width = angles.shape[-1]
    if width == heads_SBHD.shape[-1]:
        return Rotation.apply(heads_SBHD, *turns(angles, heads_SBHD))
    own = heads_SBHD[..., :width]
    return torch.cat([Rotation.apply(own, *turns(angles, own)), heads_SBHD[..., width:]], dim=-1)


def turns(angles: torch.Tensor, heads_SBHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, those of the first half of the channels negative, as large as `heads_SBHD`.

    At full size, since a product that is broadcast over heads works on one head's few channels at a time. All layers share
    them where autograd keeps them anyway; not in a forward pass that is made again, which should keep little.
    """
    if not torch.is_grad_enabled():
        return new_turns(angles, heads_SBHD)
    made, key = _turns.setdefault(angles, {}), (heads_SBHD.dtype, heads_SBHD.shape[2])
    if key not in made or made[key][0].shape != heads_SBHD.shape:
        made[key] = new_turns(angles, heads_SBHD)
    return made[key]


def new_turns(angles: torch.Tensor, heads_SBHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `turns`."""
    cosines, sines = angles.cos(), angles.sin()
    sines[..., : angles.shape[-1] // 2].neg_()
    whole = [item.to(heads_SBHD.dtype).expand(heads_SBHD.shape).contiguous() for item in (cosines, sines)]
    return whole[0], whole[1]


class Rotation(torch.autograd.Function):
    """x cos + swapped(x) sin, where `swapped` exchanges the halves of the channels. The inverse turn is the gradient's."""

    @staticmethod
    def forward(ctx, heads_SBHD: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """All [S, B, H, D]."""
        ctx.save_for_backward(cosines, sines)
        return turned(heads_SBHD, cosines, sines, 1)

    @staticmethod
    def backward(ctx, grad_SBHD: torch.Tensor):
        """The gradient of the heads."""
        cosines, sines = ctx.saved_tensors
        return turned(grad_SBHD, cosines, sines, -1), None, None


@fusible
def turned(heads_SBHD: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, direction: int) -> torch.Tensor:
    """`direction`: 1, or -1 for the other way round."""
    first, second = heads_SBHD.chunk(2, dim=-1)
    return (heads_SBHD * cosines).addcmul_(torch.cat([second, first], dim=-1), sines, value=direction)


if not platform.HAS_TRANSFORMER_ENGINE:  # Megatron-Core takes Transformer Engine's, and has none of its own
    rope_utils.fused_apply_rotary_pos_emb = rotated
