"""How much each input of each layer counts: mean squares over a few runs, for the encoders (``quant/encode.py``).

The error that a changed weight makes in a layer's output is the change times the input, so that the expected squared error of the output is
the sum of squared changes, each times the mean square of its column's input (for inputs that do not correlate). A file holds one float32
vector per matrix, ``[in_features]``, under the matrix's name in our GGUF files, and how many rows it was taken over in the metadata.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from ...quant.output import Output

KIND = "ltx2-gguf importance"


class ImportanceError(ValueError):
    """The file holds no importance, or another model's. The message says what was found and what to do."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


class Recorder:
    """Adds up what the linear layers of a model are fed. ``rows``: rows of inputs seen by the layer that saw most."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: dict[str, int] = {}

    @contextlib.contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Within the block, every call of a linear layer of ``model`` counts."""
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_pre_hook(self._hook(f"{name}.weight")) for name, module in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str):
        def add(module: nn.Module, args: tuple) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            sums = x.float().square().sum(dim=0)
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
            self._rows[name] = self._rows.get(name, 0) + x.shape[0]

        return add

    @property
    def rows(self) -> int:
        return max(self._rows.values(), default=0)

    def means(self) -> dict[str, torch.Tensor]:
        """Matrix name -> mean squares of its columns' inputs, float32 ``[in_features]`` on the CPU."""
        return {name: (sums / self._rows[name]).cpu() for name, sums in sorted(self._sums.items())}


def write_importance(path: str | Path, recorder: Recorder, source: str, *, overwrite: bool = False) -> int:
    """Write the file; returns how many matrices it holds. Raises OutputError or OSError."""
    from safetensors.torch import save_file

    means = recorder.means()
    with Output(path, overwrite) as written:
        save_file(means, str(written.partial), metadata={"kind": KIND, "rows": str(recorder.rows), "source": source})
    return len(means)


def read_importance(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Matrix name -> importance ``[in_features]``, of those in ``shapes``. Raises ImportanceError for another file or another model's."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("kind") != KIND:
                raise ImportanceError(
                    f"{path.name} holds no importance; give the file that 'ltx2-gguf calibrate' wrote."
                )
            found = {name: file.get_tensor(name) for name in file.keys() if name in shapes}
    except SafetensorError as error:
        raise ImportanceError(
            f"{path.name} is not a whole safetensors file ({error}); run 'ltx2-gguf calibrate' again."
        ) from None
    wrong = [name for name, values in found.items() if tuple(values.shape) != tuple(shapes[name][-1:])]
    if wrong or not found:
        what = (
            f"{wrong[0]} has {found[wrong[0]].shape[0]} inputs there and {shapes[wrong[0]][-1]} here"
            if wrong
            else "it names none of its matrices"
        )
        raise ImportanceError(
            f"{path.name} was measured on another model: {what}; run 'ltx2-gguf calibrate' on this one."
        )
    damaged = [
        name for name, values in found.items() if not bool(torch.isfinite(values).all()) or bool((values < 0).any())
    ]
    if damaged:
        raise ImportanceError(
            f"{path.name}: the importance of {damaged[0]} is no mean square; run 'ltx2-gguf calibrate' again."
        )
    return found
