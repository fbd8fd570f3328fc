"""Which layers of the DiT may be multiplied in 8 bits, and switching a model between exact and fast.

Two kinds of 8-bit products differ in speed and error (see ``quant/eight_bit.py``): float8, and int8, which errs a third as much and takes a tenth to a
fifth longer. :data:`INT8_LAYERS` take int8, the other fast layers whatever is fastest on the device. What each layer's rounding in float8 adds to
the squared error of a velocity (random weights, 24 blocks of width 512, 256 tokens): ff.net.0.proj 41 %, ff.net.2 38 %, attn1.to_out.0 9 %,
attn2.to_out.0 6 %, attn1.to_v 5 %, attn2.to_q 1.5 %, attn1.to_q and to_k together 0.5 %; with more tokens attn1.to_out.0 gains and
attn2.to_out.0 loses weight. q, k and v are of one kind, so that their common input is quantised once.

Fast products round the activations to 8 bits with one scale per token (see ``quant/eight_bit.py``), which is harmless where the input
is normed and the output is one of many contributions to the residual stream:

    attn1.to_q, to_k, to_v   input is RMS-normed and modulated; q and k are normed again after the product
    attn1.to_out.0           averages of values, gated per head; added to the residual stream
    attn2.to_q, to_out.0     as above
    ff.net.0.proj, ff.net.2  two thirds of all arithmetic; normed input, GELU output, added to the residual stream

and is not used for the rest:

    patchify_proj, proj_out          the latent's way in and out: an error here is an error of the picture
    adaln_single, prompt_adaln_single   few rows, so nothing to gain, and their output scales every block
    attn2.to_k, to_v                 input is the text context, not normed: text features have strong outliers; 1024 rows only
    to_gate_logits                   32 columns
    video_embeddings_connector       runs once per prompt on unnormed text features
    caption_projection               likewise
"""

import re

import torch

from ...quant import tensor as packed

FAST_LAYERS = re.compile(
    r"(^|\.)transformer_blocks\.\d+\.(attn1\.to_[qkv]|attn[12]\.to_out\.0|attn2\.to_q|ff\.net\.0\.proj|ff\.net\.2)$"
)

#: Of these, the layers that take int8 where the device has float8 as well; with them a velocity keeps a cosine of 0.999 with the exact one.
INT8_LAYERS = re.compile(r"(^|\.)(attn1\.to_[qkv]|attn1\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2)$")

MODES = ("exact", "fast")


def set_compute(model, mode):
    """Switch the packed weights of the safe layers (:data:`FAST_LAYERS`) to "exact" or "fast" products. Returns how many layers were set.

    Weights keep their bytes. On a device without 8-bit tensor cores fast weights compute exactly. Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"Compute mode {mode!r} is not known; expected one of {', '.join(MODES)}.")
    count = 0
    with torch.inference_mode():
        for name, module in model.named_modules():
            if FAST_LAYERS.search(name) and packed.is_packed(getattr(module, "weight", None)):
                compute = "fast int8" if mode == "fast" and INT8_LAYERS.search(name) else mode
                module.weight = torch.nn.Parameter(packed.with_compute(module.weight, compute), requires_grad=False)
                count += 1
    return count
