"""LTX-2 and LTX-2.3 video from GGUF weights: a ComfyUI node pack.

The host imports this folder from ``custom_nodes/`` and calls ``comfy_entrypoint``. Nothing heavy is imported before that.
"""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """Return the pack's extension object (called once by the host)."""
    from .nodes import extension

    return extension()
