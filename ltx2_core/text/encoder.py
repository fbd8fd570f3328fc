"""The text encoder: prompt -> tokens -> Gemma-3 -> projection -> one feature vector per token.

Only the tokens of the prompt run, without padding: attention is causal and rotary positions are relative, so the official left-padded
run gives the same states for them, and the padding's states are dropped in the end anyway. The connector, which is part of
the video model, makes the context from these features.

Sources: Lightricks ltx-core ``text_encoders/gemma``; ComfyUI ``comfy/text_encoders/lt.py`` (names of modules).
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..files.weights import WeightFile
from .gemma import GemmaModel
from .generate import Prompt, Sampling, generate
from .projection import TextProjection
from .tokenizer import GemmaTokenizer
from .vision import VisionEncoder


class TextEncoder(nn.Module):
    """Gemma-3 and the text projection.

    Parameters carry the host's names, so that LoRA files made for it fit: ``gemma3_12b.transformer.model.layers.…`` (whatever the size
    of Gemma) and ``text_embedding_projection.…``. ``tokenizer`` is a GemmaTokenizer; ``vision`` looks at the images of a chat. ``weight_sources`` maps the names of parameters
    that are a file's bytes unchanged to (WeightFile, name there).
    """

    def __init__(
        self,
        gemma: GemmaModel,
        projection: TextProjection,
        tokenizer: GemmaTokenizer,
        vision: VisionEncoder | None = None,
    ):
        super().__init__()
        self.gemma3_12b = nn.Module()
        self.gemma3_12b.transformer = gemma
        self.text_embedding_projection = projection
        self.tokenizer = tokenizer
        self._vision = [vision]  # in a list: its weights come to the device for an image alone
        self.weight_sources: dict[str, tuple[WeightFile, str]] = {}

    @property
    def gemma(self) -> GemmaModel:
        return self.gemma3_12b.transformer

    @property
    def vision(self) -> VisionEncoder | None:
        return self._vision[0]

    @property
    def version(self) -> str:
        """The LTX-2 version the features are for: "2.0", "2.3", or "2.5" with Gemma 4, whose projection has the form of 2.3's."""
        return "2.5" if self.gemma.config.generation == 4 else self.text_embedding_projection.version

    @torch.inference_mode()
    def encode_ids(self, ids: Sequence[int], device=None, layer_scope=None) -> torch.Tensor:
        """Token ids (BOS first) -> features [1, n, Dv], float32 on ``device``, where the work is done (default: where the weights are).

        ``layer_scope`` as in ``GemmaModel.hidden_states``. Hidden states are collected in main memory.
        """
        device = torch.device(device) if device is not None else self.gemma.model.norm.weight.device
        hidden = self.gemma(torch.tensor([list(ids)]), device, layer_scope)  # (L1, n, D)
        return self.text_embedding_projection(hidden, device)[None]  # (n, Dv) -> (1, n, Dv)

    def generate(
        self,
        tokens: Sequence[int | torch.Tensor],
        max_length: int = 256,
        sampling: Sampling = Sampling(),
        device=None,
        layer_scope=None,
        on_token: Callable[[], None] | None = None,
    ) -> list[int]:
        """Ids of the text that follows ``tokens`` of ``chat.chat_tokens``; arguments as in ``generate.generate``.

        Raises ValueError when there are images among the tokens and this encoder has no ``vision``.
        """
        prompt = self._with_images(tokens, device)
        access = self.text_embedding_projection.weight_access
        return generate(
            self.gemma, prompt, max_length, self.tokenizer.stop_tokens, sampling, device, access, layer_scope, on_token
        )

    def _with_images(self, tokens: Sequence[int | torch.Tensor], device) -> Prompt:
        ids, images = [], []
        for token in tokens:
            if not isinstance(token, torch.Tensor):
                ids.append(token)
                continue
            if self.vision is None:
                raise ValueError(
                    "This text encoder has no vision part, so it cannot look at an image; choose Gemma's vision file (mmproj-….gguf) beside it, "
                    "or disconnect the image."
                )
            device = torch.device(device) if device is not None else self.gemma.model.norm.weight.device
            weights = {name: weight.to(device) for name, weight in self.vision.named_parameters()}
            with torch.inference_mode():
                features = torch.func.functional_call(self.vision, weights, (token, device))
            images.append((len(ids), features))
            ids += [self.tokenizer.pad] * len(features)
        return Prompt(ids, images)

    def encode(self, prompt: str, device=None, layer_scope=None) -> torch.Tensor:
        """Prompt -> features [1, n, Dv], float32; n counts the prompt's tokens and BOS, at most 1024."""
        return self.encode_ids(self.tokenizer.encode(prompt), device, layer_scope)
