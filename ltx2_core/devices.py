"""Where to compute: the device that is meant, or the best there is."""

import torch


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """``name`` as a device that exists here; None: the first accelerator, else the CPU. Raises ValueError."""
    found = available()
    if name is None:
        return torch.device(found[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"Unknown device {str(name)!r}; use one of {', '.join(found)}.") from None
    count = _count(device.type)
    if not count:
        raise ValueError(f"The device {device.type!r} is not available here; use one of {', '.join(found)}.")
    if device.index is not None and device.index >= count:
        raise ValueError(f"There is no {device}; this machine has {device.type}:0 to {device.type}:{count - 1}.")
    return device


def available() -> list[str]:
    """Kinds of devices that can compute here, best first."""
    return [kind for kind in ("cuda", "xpu", "mps", "cpu") if _count(kind)]


def _count(kind: str) -> int:
    """How many devices of this kind there are."""
    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    if not hasattr(module, "is_available") or not module.is_available():
        return 0
    return module.device_count() if hasattr(module, "device_count") else 1
