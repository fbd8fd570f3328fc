"""NaN and infinity: refused as settings, found in a latent, traced to the layer they come from.

A damaged weight, an overflow or a faulty GPU turns a latent into NaNs, which decode to a black video. One reduction over a latent
finds them; only when there are some does :func:`explain` run the network again, layer by layer, to say where they begin.
"""

import math

import torch

from ...quant import tensor as packed


class NotFiniteError(RuntimeError):
    """A latent has values that are NaN or infinite."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


def check_numbers(**settings):
    """Raise ValueError for the first setting that is NaN or infinite; None is a setting left out."""
    for name, value in settings.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; give a finite number.")


def check_frame_rate(fps):
    """Raise ValueError for a frame rate (frames per second) that no video can have."""
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"The frame rate is {fps}; give a number of frames per second above 0.")


def is_finite(x):
    """Whether every value of ``x`` (a tensor of any shape) is finite; one reduction and one read from the device."""
    return bool(torch.isfinite(x).all())


def check_latent(x, when, network=None, again=None):
    """Raise NotFiniteError when the latent ``x`` has a value that is not finite.

    when: "after the first step", for the sentence; network and again(): see :func:`explain`.
    """
    check("The latent", x, network, again, " " + when)


def check(what, x, network=None, again=None, when=""):
    """Raise NotFiniteError when ``x``, which the sentence calls ``what``, has a value that is not finite. Otherwise as ``check_latent``."""
    if not is_finite(x):
        where = explain(network, again) if network is not None else "no layer could be named"
        raise NotFiniteError(f"{what} has values that are not numbers{when}: {where}.")


class _Found(Exception):
    pass


def explain(network, again=None):
    """Where values that are not finite begin, as the end of a sentence.

    All weights are looked at first, decoded one by one; then ``again()``, a call that runs a forward pass of ``network``, is repeated
    and stopped at the first layer whose output is not finite. Slow: only for an error's sentence.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            values = packed.unpack(parameter) if packed.is_packed(parameter) else parameter
            if not values.is_meta and not is_finite(values):
                return f"the weight '{name}' in the model's file is not finite, so the file is damaged or was converted wrongly; get it again"
    layer = _first_output(network, again) if again is not None else None
    if layer is None:
        return (
            "every weight is finite and no single layer could be named; run again, without LoRAs and other model nodes"
        )
    return (
        f"they begin in the output of '{layer}', whose weights are finite; "
        "remove LoRAs and other model nodes, use 'exact' compute, and look at the settings for extreme values"
    )


def _first_output(network, again):
    """Name of the first module whose output is not finite when ``again()`` runs, None when all are finite. Outermost modules report last."""

    def hook(name):
        def look(module, inputs, output):
            for value in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(value, torch.Tensor) and value.is_floating_point() and not is_finite(value):
                    raise _Found(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name]
    try:
        again()
    except _Found as found:
        return str(found)
    finally:
        for handle in handles:
            handle.remove()
    return None
