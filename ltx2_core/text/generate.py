"""Writing text with a Gemma: the prompt runs once, then one token after the other on the keys and values that are kept.

A sliding layer keeps its window alone, as a ring: a key carries its position in its rotation, so the order in memory does not matter.
Nothing waits for the GPU per token: logits, sampling and the next token stay there, and stop tokens are looked for in groups. On NVIDIA GPUs
a token is one CUDA graph where every weight is resident, because launching seven hundred kernels takes longer than running them.

Letters: n tokens of the prompt, D width, V vocabulary.

Sources: ComfyUI ``comfy/text_encoders/llama.py`` (order and meaning of the sampling options); transformers
``models/gemma3/modeling_gemma3.py`` (image tokens see each other).
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...quant import matmul
from ...quant import tensor as packed
from ..transformer.fused import untouched
from .config import AttentionKind, GemmaConfig
from .gemma import GemmaModel, LayerScope
from .projection import WeightAccess, own_weight

logger = logging.getLogger(__name__)

TOKENS_PER_CHECK = 8
"""Tokens a GPU writes before the stop tokens are looked for: looking waits until it is there."""

DECODED_BYTES = 4 << 30
"""On the CPU a model whose matrices take at most this much as float32 is decoded once for a text, not once per token: four times the speed."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits. Options apply in the order in which they stand here, the penalties first.

    do_sample: False takes the likeliest token and ignores everything else. repetition_penalty: divides positive logits of tokens
    that were written, multiplies negative ones; presence_penalty is subtracted from them. top_k 0, top_p 1, min_p 0: off.
    """

    do_sample: bool = True
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    top_p: float = 0.95
    seed: int | None = None


class Sampler:
    """Draws tokens [1] from logits [V] float32, all on one device and without waiting for it. Equal seeds give equal texts on a device."""

    def __init__(self, options: Sampling, vocab_size: int, device: torch.device):
        self.options = options
        penalised = options.repetition_penalty != 1.0 or options.presence_penalty != 0.0
        self.written = (
            torch.zeros(vocab_size, dtype=torch.bool, device=device) if options.do_sample and penalised else None
        )
        self.generator = torch.Generator(device=device)
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        o = self.options
        if not o.do_sample or o.temperature == 0.0:
            return logits.argmax(-1, keepdim=True)
        if self.written is not None:
            repeated = torch.where(logits < 0, logits * o.repetition_penalty, logits / o.repetition_penalty)
            logits = torch.where(self.written, repeated - o.presence_penalty, logits)
        if o.temperature != 1.0:
            logits = logits / o.temperature
        ids = None
        if o.top_k > 0:
            logits, ids = torch.topk(logits, min(o.top_k, logits.shape[-1]))
        if o.min_p > 0.0:
            probabilities = logits.softmax(-1)
            logits = logits.masked_fill(probabilities < o.min_p * probabilities.max(), torch.finfo(logits.dtype).min)
        if o.top_p < 1.0:
            ordered, order = torch.sort(logits, descending=True)
            removed = ordered.softmax(-1).cumsum(-1) > o.top_p
            removed[0] = False
            logits = logits.masked_fill(
                torch.zeros_like(removed).scatter_(0, order, removed), torch.finfo(logits.dtype).min
            )
        probabilities = logits.softmax(-1)
        # torch.multinomial does this too, but first waits for the GPU to check its input.
        noise = torch.empty_like(probabilities).exponential_(1, generator=self.generator)
        drawn = (probabilities / noise).argmax(-1, keepdim=True)
        token = drawn if ids is None else ids[drawn]
        if self.written is not None:
            self.written[token] = True
        return token


class _LayerCache:
    """Keys and values [1, nkv, slots, hd] of one layer; the token at position p has slot p % slots."""

    def __init__(self, kind: AttentionKind, slots: int, position: torch.Tensor, dtype: torch.dtype):
        shape = (1, kind.num_kv_heads, slots, kind.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=position.device) for _ in range(2))
        self.position = position

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``gemma.LayerCache``. Several tokens are the prompt, which looks at itself; one token looks at every slot."""
        n, slots = k.shape[2], self.keys.shape[2]
        kept = min(n, slots)
        at = self.position if n == 1 else torch.arange(n - kept, n, device=k.device)
        self.keys.index_copy_(2, at % slots, k[:, :, n - kept :])
        self.values.index_copy_(2, at % slots, v[:, :, n - kept :])
        return (self.keys, self.values) if n == 1 else (k, v)


class KeyValueCache:
    """The caches of all layers for texts of at most ``capacity`` tokens. ``position`` [1]: of the next token, on the device."""

    def __init__(self, config: GemmaConfig, capacity: int, dtype: torch.dtype, device: torch.device):
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        kinds = {sliding: config.attention(sliding) for sliding in set(config.sliding_layers)}
        self.slots = {sliding: min(capacity, kind.window or capacity) for sliding, kind in kinds.items()}
        self.layers = [_LayerCache(kinds[s], self.slots[s], self.position, dtype) for s in config.sliding_layers]

    def masks(self) -> dict[bool, torch.Tensor]:
        """Which slots hold something once the token at ``position`` is stored: [1, slots] bool for each kind of layer."""
        return {s: (torch.arange(n, device=self.position.device) <= self.position)[None] for s, n in self.slots.items()}


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and what stands for some of them: (first position, features [m, D]) of every image."""

    ids: Sequence[int]
    images: Sequence[tuple[int, torch.Tensor]] = ()


@torch.inference_mode()
def generate(
    model: GemmaModel,
    prompt: Prompt,
    max_length: int,
    stop_tokens: Collection[int],
    sampling: Sampling = Sampling(),
    device=None,
    weight_access: WeightAccess = own_weight,
    layer_scope: LayerScope | None = None,
    on_token: Callable[[], None] | None = None,
) -> list[int]:
    """Ids of the text that follows the prompt, at most ``max_length``; the stop token that ended it is the last one.

    ``device`` and ``layer_scope`` as in ``GemmaModel.hidden_states``; ``weight_access`` gives the embedding table, which is the last
    matrix too, for the time of writing. ``on_token`` is called once per token and may raise to cancel.
    """
    device = torch.device(device) if device is not None else model.model.norm.weight.device
    config, table = model.config, model.model.embed_tokens
    ids = torch.tensor([list(prompt.ids)], device=device)
    sampler = Sampler(sampling, config.vocab_size, device)
    cache = KeyValueCache(config, ids.shape[1] + max_length, model.dtype, device)
    written = torch.zeros(max_length, dtype=torch.int64, device=device)
    every = 1 if device.type == "cpu" else TOKENS_PER_CHECK
    with weight_access(table, device) as (weight, _), _decoded(model, weight, device) as (embeddings, head):

        def logits(x: torch.Tensor, masks: dict) -> torch.Tensor:
            positions = torch.arange(x.shape[1], device=device) if x.shape[1] > 1 else cache.position
            for state in model.run_layers(x, positions, masks, cache.layers, layer_scope):
                pass
            y = matmul.linear(state[0, -1:].to(model.dtype), head, None)[0].float()  # (1, D) -> (V,)
            return y if config.logit_softcap is None else config.logit_softcap * torch.tanh(y / config.logit_softcap)

        def embed(tokens: torch.Tensor) -> torch.Tensor:
            return matmul.embedding(tokens, embeddings, torch.float32) * config.width**0.5

        x, masks = prompt_input(prompt, ids, embed, model.causal_masks(ids.shape[1], device))
        current = logits(x, masks if ids.shape[1] > 1 else cache.masks())
        cache.position.fill_(ids.shape[1])
        token = torch.zeros(1, dtype=torch.int64, device=device)

        def step() -> torch.Tensor:
            return logits(embed(token[None]), cache.masks())

        graph, done, found = None, 0, []
        for i in range(max_length):
            token.copy_(sampler(current))
            written[i : i + 1] = token
            if on_token:
                on_token()
            if (i + 1) % every == 0 or i + 1 == max_length:
                found += written[done : i + 1].tolist()
                end = next((k + 1 for k in range(done, len(found)) if found[k] in stop_tokens), None)
                if end is not None:
                    return found[:end]
                done = i + 1
            if i + 1 == max_length:
                break
            if i == 0 and layer_scope is None:
                graph = _captured(model, step)
            current = graph() if graph else step()
            cache.position.add_(1)
    return found


def prompt_input(prompt: Prompt, ids: torch.Tensor, embed, masks: dict) -> tuple[torch.Tensor, dict]:
    """(embeddings [1, n, D], masks) of a prompt. The tokens of an image see each other whatever their order or distance."""
    n = ids.shape[1]
    if not prompt.images:
        return embed(ids), masks
    spans = [(start, start + len(features), features) for start, features in prompt.images]
    for start, end, _ in spans:
        ids[:, start:end] = 0  # the table may end before the image token's id
    x = embed(ids)
    causal = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
    masks = {sliding: causal.clone() if mask is None else mask for sliding, mask in masks.items()}
    for start, end, features in spans:
        x[0, start:end] = features.to(x)
        for mask in masks.values():
            mask[start:end, start:end] = True
    return x, masks


@contextlib.contextmanager
def _decoded(model: GemmaModel, table: torch.Tensor, device: torch.device):
    """Gives (embedding table, last matrix), both ``table`` in the form to use, with packed matrices of a small model decoded on the CPU."""
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear) and packed.is_packed(m.weight)]
    count = table.numel() + sum(m.weight.numel() for m in matrices)
    if device.type != "cpu" or 4 * count > DECODED_BYTES:
        yield table, packed.with_compute_dtype(table, model.dtype) if packed.is_packed(table) else table.to(model.dtype)
        return
    stored = [m.weight for m in matrices]
    table = packed.unpack(table, model.dtype)
    try:
        for m in matrices:
            m.weight = nn.Parameter(packed.unpack(m.weight, model.dtype), requires_grad=False)
        yield table, table
    finally:
        for m, weight in zip(matrices, stored):
            m.weight = weight


def _captured(model: GemmaModel, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor] | None:
    """``step`` as a CUDA graph, or None where it cannot be one. What ``step`` writes, it writes again when it is replayed."""
    cuda = model.model.norm.weight.is_cuda and torch.version.cuda is not None
    if (
        not cuda
        or not all(p.is_cuda for p in model.model.layers.parameters())
        or not all(map(untouched, model.model.layers.modules()))
    ):
        return None
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
    except RuntimeError as error:
        logger.info("text is written without a CUDA graph: %s", error)
        return None

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay
