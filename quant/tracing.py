"""Telling ordinary calls from traced ones."""

import torch


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all tensors are ordinary ones, so that a kernel may work on their memory.

    While a graph is traced (torch.compile, make_fx) tensors are fakes or wrappers; registered operators stand in for kernels then.
    """
    return not torch.compiler.is_compiling() and all(t is None or type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
