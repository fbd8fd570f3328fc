"""Guide (keyframe) tokens: how strongly they and the video see each other.

A guide is an image or clip whose latent frames are appended to the video's tokens at coordinates of their own. Each guide may
carry a strength and a mask over its area; a weight w other than 1 adds log(w) to the attention logits between that guide token
and every video token, in both directions. w <= 0 cuts the connection, w > 1 amplifies it. Guides see each other unweakened.

The entries come in the host's form (LTXVAddGuide), one per guide in the order appended:
``{"pre_filter_count": tokens, "strength": float, "pixel_mask": [B, 1, F, H, W] or None, "latent_shape": (F, H, W)}``.

Source: Comfy-Org/ComfyUI ``comfy/ldm/lightricks/model.py`` (behaviour; the official pipelines also isolate guide groups from
each other, which is not done here so that results inside the host agree with the host).
"""

import torch
import torch.nn.functional as F


class GuideAttentionMask:
    """Attention bias for queries in three groups: video tokens, weighted guide tokens, the rest.

    Only one row for all video queries and one row per weighted guide token are stored, never [T, T]. Constructor and attributes
    are those of the host's class of this name, which takes its place under the host (``LTX2Model.guide_mask_class``): community
    nodes test for that class.
    """

    __slots__ = ("guide_start", "noisy_mask", "tracked_count", "tracked_mask")

    def __init__(self, total_tokens, guide_start, tracked_count, tracked_weights):
        """tracked_weights [1, K]: attention weights of the tokens guide_start … guide_start+K-1 out of total_tokens."""
        weights = tracked_weights.flatten()
        bias = torch.full_like(weights, torch.finfo(weights.dtype).min)
        bias = torch.where(weights > 0, weights.clamp(min=torch.finfo(weights.dtype).tiny).log(), bias)
        self.guide_start, self.tracked_count = guide_start, tracked_count
        self.noisy_mask = weights.new_zeros(1, 1, 1, total_tokens)
        self.noisy_mask[..., guide_start : guide_start + tracked_count] = bias
        self.tracked_mask = weights.new_zeros(1, 1, tracked_count, total_tokens)
        self.tracked_mask[..., :guide_start] = bias[:, None]


def query_groups(mask, tokens):
    """(slice of queries, bias or None) for each non-empty group of a GuideAttentionMask, in token order."""
    end = mask.guide_start + mask.tracked_count
    groups = (
        (slice(0, mask.guide_start), mask.noisy_mask),
        (slice(mask.guide_start, end), mask.tracked_mask),
        (slice(end, tokens), None),
    )
    return [(rows, bias) for rows, bias in groups if rows.stop > rows.start]


def grouped_attention(attention, q, k, v, heads, mask, transformer_options=None):
    """``attention`` (see ``layers.sdpa``) with a mask that may be a GuideAttentionMask: one call per group of queries. q, k, v [B, T, nh*hd]."""
    if mask is None or isinstance(mask, torch.Tensor):
        return attention(q, k, v, heads, mask=mask, transformer_options=transformer_options)
    groups = query_groups(mask, q.shape[1])
    return torch.cat(
        [
            attention(q[:, rows], k, v, heads, mask=bias, transformer_options=transformer_options)
            for rows, bias in groups
        ],
        dim=1,
    )


def mask_to_latent(mask, frames, height, width):
    """Pixel mask [1, 1, Fp, Hp, Wp] in [0, 1] -> weight per latent [F*H*W], by area in space and causal groups in time.

    The first pixel frame is the first latent frame's; the others are averaged in equal groups, repeated when there are fewer
    of them than latent frames.
    """
    small = F.interpolate(mask[:, 0].transpose(0, 1), size=(height, width), mode="area")[
        :, 0
    ]  # (1, 1, Fp, Hp, Wp) -> (Fp, H, W)
    first, rest = small[:1], small[1:]
    if frames == 1:
        return first.flatten()
    if rest.shape[0] == 0:
        return first.expand(frames, -1, -1).flatten()
    group = rest.shape[0] // (frames - 1)
    if group:
        rest = rest[: group * (frames - 1)].unflatten(0, (frames - 1, group)).mean(dim=1)  # (Fp-1, H, W) -> (F-1, H, W)
    else:
        rest = (
            F.interpolate(rest.flatten(1).transpose(0, 1)[None], size=frames - 1, mode="nearest")[0]
            .transpose(0, 1)
            .unflatten(1, (height, width))
        )
    return torch.cat((first, rest)).flatten()


def guide_mask(entries, guide_tokens, kept, total_tokens, device, dtype, make=GuideAttentionMask):
    """A mask of the class ``make`` for these guide entries, None when every weight is 1.

    guide_tokens: K, how many tokens the guides had when they were appended; kept [K] bool on the CPU: which of them survived
    (dilated references have holes), None when all did; total_tokens counts the surviving ones of the whole sequence.
    Raises ValueError when the entries do not add up to K.
    """
    if not entries:
        return None
    counts = [entry["pre_filter_count"] for entry in entries]
    if sum(counts) != guide_tokens:
        raise ValueError(
            f"The guides' attention entries cover {sum(counts)} tokens, but keyframe_idxs lists {guide_tokens}; "
            "crop or add guides with the LTXV guide nodes so that both change together."
        )
    if all(entry["strength"] == 1.0 and entry.get("pixel_mask") is None for entry in entries):
        return None
    if kept is not None:
        counts = [int(part.sum()) for part in kept.split(counts)]
    weights = []
    for entry, count in zip(entries, counts):
        mask, shape = entry.get("pixel_mask"), entry.get("latent_shape")
        if mask is None or shape is None:
            weights.append(torch.full((count,), float(entry["strength"]), device=device, dtype=dtype))
        else:
            weights.append(mask_to_latent(mask[:1].to(device, dtype), *shape)[:count] * entry["strength"])
    weights = torch.cat(weights)
    if weights.numel() == 0 or bool((weights == 1.0).all()):
        return None
    return make(total_tokens, total_tokens - sum(counts), weights.shape[0], weights[None])
