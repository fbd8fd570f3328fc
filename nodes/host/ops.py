"""``operations`` for the host: layers that keep GGUF weights packed under the host's memory management.

``GGUFOps`` is the host's ``manual_cast`` with its own ``Linear`` and ``Embedding``. A packed weight is a comfy-kitchen
``QuantizedTensor``; the host sizes, moves, pins, prefetches and casts it like any weight. Two things are done here:

* **LoRA after dequantisation.** The host would drop a LoRA on a packed weight or encode the patched weight again. Here the patch
  (``weight_lowvram_function``, set by the host's dynamic patcher or by ``host.patcher``) is applied to the dequantised weight of the
  call, so the stored bytes never change and the result is exact in every memory mode.
* **Embedding by rows.** Only the rows of the tokens are dequantised, never the table (262 208 rows for Gemma 3).

Sources: ComfyUI 0.30.0 ``comfy/ops.py`` (``manual_cast``, ``cast_bias_weight``), ``comfy/model_patcher.py`` (``LowVramPatch``).
"""

import torch

import comfy.float
import comfy.ops
from comfy.quant_ops import QuantizedTensor

from ...quant import matmul
from . import lora, move, stream as host_stream


def is_packed(weight):
    """Whether ``weight`` holds packed bytes (a comfy-kitchen tensor of any layout)."""
    return isinstance(weight, QuantizedTensor)


def dense(weight, dtype):
    """``weight`` dequantised to ``dtype``; dense weights are only cast."""
    weight = weight.to(dtype=dtype)
    return weight.dequantize() if is_packed(weight) else weight


class PackedWeight:
    """What ``Linear`` and ``Embedding`` share: assignment instead of copying, and a safe answer to patches the host wants to bake in."""

    def _apply(self, fn, recurse=True):
        done = {}
        for name, parameter in self._parameters.items():
            moved = None if parameter is None else move.moved(self, name, parameter, fn)
            if moved is not None:
                done[name] = moved
        rest = {name: parameter for name, parameter in self._parameters.items() if name not in done}
        order, self._parameters = list(self._parameters), rest
        try:
            comfy.ops._quantized_apply(self, fn, recurse)
        finally:
            self._parameters = {name: done.get(name, self._parameters.get(name)) for name in order}
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is not None:
                setattr(self, name, torch.nn.Parameter(value, requires_grad=False))  # assigned: a memory-mapped tensor stays mapped
            elif getattr(self, name) is not None:
                missing_keys.append(prefix + name)
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in ("weight", "bias")]

    def convert_weight(self, weight, inplace=False, **kwargs):
        """The dense weight the host computes a patch on."""
        return weight.dequantize() if is_packed(weight) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Take back a weight the host has patched. A packed weight is replaced by a dense one (never encoded again); the host keeps its backup.

        Raises RuntimeError for an in-place update of a packed weight, which only LoRA hooks ask for.
        """
        if return_weight:
            return weight
        packed = is_packed(self.weight)
        if packed and inplace_update:
            raise RuntimeError("LoRA hooks cannot change a GGUF weight in place; load the LoRA with 'Load LoRA' on the MODEL instead.")
        if not packed:
            weight = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
        else:
            weight = weight.to(self.weight.dtype)
        if inplace_update:
            self.weight.data.copy_(weight)
        else:
            self.weight = torch.nn.Parameter(weight, requires_grad=False)


def _resident(state, x):
    """(weight, bias) of a packed layer that are on x's device in x's type and no dynamic memory's: what the host's cast would hand over unchanged.

    state: the layer's ``__dict__``.
    """
    weight, bias = state["_parameters"]["weight"], state["_parameters"].get("bias")
    if "_v" in state or torch.compiler.is_compiling() or weight._qdata.device != x.device or weight._params.orig_dtype != x.dtype:
        return None
    return (weight, bias) if bias is None or (bias.device == x.device and bias.dtype == x.dtype) else None


class _hidden:
    """Hides a layer's patches from the cast, which would copy the LoRA for this call, or encode the patched weight again and keep it.

    Where ``torch.nn.Module`` would put them, without its look at what they are: that takes longer than the rest.
    """

    __slots__ = ("state", "patch", "functions")

    def __init__(self, layer, functions):
        self.state, self.functions = layer.__dict__, functions

    def __enter__(self):
        self.patch = self.state.get("weight_lowvram_function")
        self.state["weight_lowvram_function"] = None
        if self.functions:
            self.state["weight_function"] = []

    def __exit__(self, *error):
        self.state["weight_lowvram_function"] = self.patch
        if self.functions:
            self.state["weight_function"] = self.functions


class GGUFOps(comfy.ops.manual_cast):
    """The host's casting layers, with packed weights in ``Linear`` and ``Embedding``."""

    class Linear(PackedWeight, comfy.ops.manual_cast.Linear):
        """``y = x W^T + b`` with ``W`` packed or dense: x [..., in] -> [..., out]."""

        plain_product = True  # resident and unpatched, the core multiplies without this module's call

        takes_staged_weights = True  # see host_stream

        takes_gelu = True  # its forward does

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)  # the host's own __init__ would allocate the dense weight (44 GB for the 22B model in bf16)
            self.in_features = in_features
            self.out_features = out_features
            self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device="meta"), requires_grad=False)
            self.bias = torch.nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta"), requires_grad=False) if bias else None
            self.weight_comfy_model_dtype = dtype
            self.bias_comfy_model_dtype = dtype

        def forward_comfy_cast_weights(self, input, gelu=False):
            state = self.__dict__
            weight, patch, functions = state["_parameters"].get("weight"), state.get("weight_lowvram_function"), self.weight_function
            packed, there = is_packed(weight), None
            patched = packed and (patch is not None or any(map(lora.is_patch, functions)))
            patches = functions if patch is None else [patch, *functions]
            if not self.bias_function:
                there = host_stream.staged(self, input) if host_stream.WEIGHT in state else _resident(state, input) if packed else None
            if there is not None and (patched or not functions):
                return lora.linear(input, *there, patches, gelu) if patched else matmul.linear(input, *there, gelu)
            if not patched:
                if not packed or functions or self.bias_function:
                    y = super().forward_comfy_cast_weights(input)
                    return torch.nn.functional.gelu(y, approximate="tanh") if gelu else y
                weight, bias, stream = comfy.ops.cast_bias_weight(self, input, offloadable=True)
                output = matmul.linear(input, weight, bias, gelu)
            else:
                with _hidden(self, functions):
                    weight, bias, stream = comfy.ops.cast_bias_weight(self, input, offloadable=True)
                output = lora.linear(input, weight, bias, patches, gelu)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return output

    class Embedding(PackedWeight, comfy.ops.manual_cast.Embedding):
        """Token ids [...] -> rows [..., width]; the table stays where it is and only the rows travel."""

        def __init__(self, num_embeddings, embedding_dim, padding_idx=None, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.num_embeddings = num_embeddings
            self.embedding_dim = embedding_dim
            self.padding_idx = padding_idx
            self.max_norm = None
            self.norm_type = 2.0
            self.scale_grad_by_freq = False
            self.sparse = False
            self.weight = torch.nn.Parameter(torch.empty(num_embeddings, embedding_dim, dtype=dtype, device="meta"), requires_grad=False)
            self.bias = None
            self.weight_comfy_model_dtype = dtype

        def forward_comfy_cast_weights(self, input, out_dtype=None):
            patched = len(self.weight_function) > 0 or self.__dict__.get("weight_lowvram_function") is not None
            if patched:
                return self._patched_rows(input, out_dtype)
            ids = input.to(self.weight.device)
            rows = matmul.embedding(ids, self.weight, (out_dtype or self.weight.dtype) if is_packed(self.weight) else None)
            return rows.to(device=input.device, dtype=out_dtype or rows.dtype)

        def _patched_rows(self, input, out_dtype):
            """A LoRA on the table itself: the host's own path, on a dense copy of the table."""
            dtype = out_dtype or self.weight.dtype
            patch = self.__dict__.get("weight_lowvram_function")
            table = dense(self.weight.to(input.device), dtype)
            for function in ([patch] if patch is not None else []) + list(self.weight_function):
                table = function(table)
            return torch.nn.functional.embedding(input, table)
