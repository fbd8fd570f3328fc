"""The pack's menu: every node in one list, handed to the host as one extension."""


def nodes():
    """The node classes, in menu order."""
    from .conditioning import LTX2GGUFImageCondition
    from .decode import LTX2GGUFDecode
    from .loaders import LTX2GGUFAudioVAE, LTX2GGUFLoader, LTX2GGUFTextEncoder, LTX2GGUFVideoVAE
    from .lora_loader import LTX2GGUFLoraLoader
    from .sampling import LTX2GGUFSampler

    return [
        LTX2GGUFLoader, LTX2GGUFTextEncoder, LTX2GGUFVideoVAE, LTX2GGUFAudioVAE, LTX2GGUFLoraLoader, LTX2GGUFImageCondition, LTX2GGUFSampler,
        LTX2GGUFDecode,
    ]  # fmt: skip


def extension():
    """The host's extension object. Raises HostError with one sentence when the host is too old or too new."""
    from comfy_api.latest import ComfyExtension

    from . import folders
    from .host import internals

    internals.require()
    folders.register()
    listed = nodes()

    class LTX2GGUF(ComfyExtension):
        async def get_node_list(self):
            return listed

    return LTX2GGUF()
