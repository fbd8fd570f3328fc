"""LTX-2 and LTX-2.3 video from GGUF weights: a ComfyUI node pack, a command line and a Python package.

The host imports this folder from ``custom_nodes/`` and calls ``comfy_entrypoint``. Nothing heavy is imported before that, nor before
``LTX2Pipeline`` is first asked for.

    from ltx2_gguf import LTX2Pipeline
"""

from .ltx2_core import __version__

WEB_DIRECTORY = "./nodes/web"

_PIPELINE = ("LTX2Pipeline", "ImageInput")


def __getattr__(name):
    if name in _PIPELINE:
        from .ltx2_core import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


async def comfy_entrypoint():
    """Return the pack's extension object (called once by the host)."""
    from .nodes import extension

    return extension()
