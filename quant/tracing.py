"""Telling ordinary calls from traced ones."""

import torch

_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all tensors are ordinary ones, so that a kernel may work on their memory.

    While a graph is traced (torch.compile, make_fx) tensors are fakes or wrappers; registered operators stand in for kernels then.
    """
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t is not None and type(t) not in _ORDINARY:
            return False
    return True
