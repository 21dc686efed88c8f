"""Megatron-style three-stage MoE-tuning of vision-language models (MoE-LLaVA, arXiv 2401.15947).

Names of tensors and arrays end in their axes, one letter each: `hidden_SBH` is [S, B, H], `weights_TK` [T, K]; a 1 is an
axis of that length. What a letter means in the whole package, and after the semicolon where it means something else; a
module docstring repeats it where that helps, and says what is special to its file.

    B  rows of a batch: packed, one that holds many samples; padded, one for each sample
    S  positions of a row, or the share that this rank holds
    T  tokens: of a step of generation, of a packed row, of all samples of an analysis
    N  tokens as a router sees them, S * B in Megatron-Core's order (sequence first); images, before C, F or P
    H  hidden: width of the residual stream; heads, in attention; pixels high, before W
    D  width of embeddings and features, of model or tower; channels of a head, in attention
    E  experts
    K  choices of a token (top-k); beams, before V; sums that a metric is made of; kinds of tensors, in FP8 histories
    I  input features of a linear layer, in the weights of experts its inner width
    O  output features of a linear layer
    F  visual tokens of an image; inner width of an MLP, on this rank
    P  patches of an image; frequent pathways, in analysis/; tokens of a prompt, in the cache
    C  channels of an image; columns of routing statistics or of any matrix; rotated channels of a head
    W  pixels wide
    V  vocabulary, on this rank where it is divided; visual tokens, in model/vision.py
    L  layers, of the decoder or only those with experts; with V, the tokens whose logits are wanted; positions of this rank
    G  groups of tokens in routing statistics (text, image, ...); query groups, in attention
    M  modalities: text, image
    R  rows of the key-value cache; rows of a tower's sequence; rows of any matrix, before C
    Q  queries, in attention; questions, in evaluation/
    U  units that a bootstrap draws, in evaluation/
    A, X  whatever axes lie between, e.g. heads or groups

Batches are [B, S]; Megatron-Core's order [S, B, H] begins after the embedding and ends at the logits.
"""

__version__ = "0.1.0"
