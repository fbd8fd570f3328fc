"""``operations`` for the host: layers that keep GGUF weights packed under the host's memory management.

``GGUFOps`` is the host's ``manual_cast`` with its own ``Linear`` and ``Embedding``. A packed weight is a comfy-kitchen
``QuantizedTensor``; the host sizes, moves, pins, prefetches and casts it like any weight. Two things are done here:

* **LoRA after dequantisation.** The host would drop a LoRA on a packed weight or encode the patched weight again. Here
the patch
  (``weight_lowvram_function``, set by the host's dynamic patcher or by ``host.patcher``) is applied to the dequantised
  weight of the call, so the stored bytes never change and the result is exact in every memory mode.
* **Embedding by rows.** Only the rows of the tokens are dequantised, never the table (262 208 rows for Gemma 3).

Sources: ComfyUI 0.30.0 ``comfy/ops.py`` (``manual_cast``, ``cast_bias_weight``), ``comfy/model_patcher.py``
(``LowVramPatch``).
"""

import comfy.float
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...quant import matmul
from . import lora, move


def is_packed(weight):
    """Whether ``weight`` holds packed bytes (a comfy-kitchen tensor of any layout)."""
    return isinstance(weight, QuantizedTensor)


def dense(weight, dtype):
    """``weight`` dequantised to ``dtype``; dense weights are only cast."""
    weight = weight.to(dtype=dtype)
    return weight.dequantize() if is_packed(weight) else weight


class PackedWeight:
    """What ``Linear`` and ``Embedding`` share: assignment instead of copying, and a safe answer to patches the host
    wants to bake in.

    ``lora``: the ``lora.Lora`` on a packed weight, or None. ``at_home``: see ``host.move``.
    """

    lora = None
    at_home = None

    @property
    def weight_lowvram_function(self):
        """The LoRA that the host's cast has to apply: that of a dense weight. With one on a packed weight in its sight,
        the host would copy the matrices at every call, or encode the patched weight again and keep it."""
        return None if is_packed(self._parameters.get("weight")) else self.__dict__.get("weight_lowvram_function")

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch):
        self.__dict__["weight_lowvram_function"] = patch  # read by whoever asks whether the layer is patched
        self.lora = lora.Lora(patch) if patch is not None and is_packed(self._parameters.get("weight")) else None

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

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is not None:
                setattr(
                    self, name, torch.nn.Parameter(value, requires_grad=False)
                )  # assigned: a memory-mapped tensor stays mapped
            elif getattr(self, name) is not None:
                missing_keys.append(prefix + name)
        unexpected_keys += [
            key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in ("weight", "bias")
        ]

    def convert_weight(self, weight, inplace=False, **kwargs):
        """The dense weight the host computes a patch on."""
        return weight.dequantize() if is_packed(weight) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Take back a weight the host has patched. A packed weight is replaced by a dense one (never encoded again);
        the host keeps its backup.

        Raises RuntimeError for an in-place update of a packed weight, which only LoRA hooks ask for.
        """
        if return_weight:
            return weight
        packed = is_packed(self.weight)
        if packed and inplace_update:
            raise RuntimeError(
                "LoRA hooks cannot change a GGUF weight in place; load the LoRA with 'Load LoRA' on the MODEL instead."
            )
        if not packed:
            weight = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
        else:
            weight = weight.to(self.weight.dtype)
        if inplace_update:
            self.weight.data.copy_(weight)
        else:
            self.weight = torch.nn.Parameter(weight, requires_grad=False)


def _resident(state, x):
    """(weight, bias) of a packed layer that are on x's device in x's type and no dynamic memory's: what the host's cast
    would hand over.

    state: the layer's ``__dict__``.
    """
    weight, bias = state["_parameters"]["weight"], state["_parameters"].get("bias")
    if (
        "_v" in state
        or torch.compiler.is_compiling()
        or weight._qdata.device != x.device
        or weight._params.orig_dtype != x.dtype
    ):
        return None
    return (weight, bias) if bias is None or (bias.device == x.device and bias.dtype == x.dtype) else None


class GGUFOps(comfy.ops.manual_cast):
    """The host's casting layers, with packed weights in ``Linear`` and ``Embedding``."""

    class Linear(PackedWeight, comfy.ops.manual_cast.Linear):
        """``y = x W^T + b`` with ``W`` packed or dense: x [..., in] -> [..., out]."""

        plain_product = True  # resident and unpatched, the core multiplies without this module's call

        takes_gelu = True  # its forward does

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(
                self
            )  # the host's own __init__ would allocate the dense weight (44 GB for the 22B model in bf16)
            self.in_features = in_features
            self.out_features = out_features
            self.weight = torch.nn.Parameter(
                torch.empty(out_features, in_features, dtype=dtype, device="meta"), requires_grad=False
            )
            self.bias = (
                torch.nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta"), requires_grad=False)
                if bias
                else None
            )
            self.weight_comfy_model_dtype = dtype
            self.bias_comfy_model_dtype = dtype

        def forward_comfy_cast_weights(self, input, gelu=False):
            state, patch, functions = self.__dict__, self.lora, self.weight_function
            if not is_packed(state["_parameters"].get("weight")) or (functions and patch is None):
                y = super().forward_comfy_cast_weights(input)
                return torch.nn.functional.gelu(y, approximate="tanh") if gelu else y
            there = None if functions or self.bias_function else _resident(state, input)
            if there is not None:
                return lora.linear(input, *there, patch, gelu=gelu)
            weight, bias, stream = self._cast(input, functions)
            output = lora.linear(input, weight, bias, patch, functions, gelu)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return output

        def _cast(self, input, functions):
            """The host's cast of the layer's weight, without other nodes' ``functions`` on it: they come behind the
            LoRA."""
            if not functions:
                return comfy.ops.cast_bias_weight(self, input, offloadable=True)
            self.weight_function = []
            try:
                return comfy.ops.cast_bias_weight(self, input, offloadable=True)
            finally:
                self.weight_function = functions

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
            self.weight = torch.nn.Parameter(
                torch.empty(num_embeddings, embedding_dim, dtype=dtype, device="meta"), requires_grad=False
            )
            self.bias = None
            self.weight_comfy_model_dtype = dtype

        def forward_comfy_cast_weights(self, input, out_dtype=None):
            if self.weight_function or self.__dict__.get("weight_lowvram_function") is not None:
                return self._patched_rows(input, out_dtype)
            ids = input.to(self.weight.device)
            rows = matmul.embedding(
                ids, self.weight, (out_dtype or self.weight.dtype) if is_packed(self.weight) else None
            )
            return rows.to(device=input.device, dtype=out_dtype or rows.dtype)

        def _patched_rows(self, input, out_dtype):
            """A LoRA on the table itself: the host's own path, on a dense copy of the table."""
            table, patch = (
                dense(self.weight.to(input.device), out_dtype or self.weight.dtype),
                self.__dict__.get("weight_lowvram_function"),
            )
            for function in ([] if patch is None else [patch]) + list(self.weight_function):
                table = function(table)
            return torch.nn.functional.embedding(input, table)
