"""The LTX-2 video model without a host. Read ``pipeline.py`` first.

Imports ``quant``, never the host. Nothing is imported here, because parts of it (``convert/plan.py``, ``files/structure.py``, ``cli``) must run
with the standard library alone. From the bottom up, each folder importing only what stands before it:

files/         bytes and names                        transformer/   the network
vae/           pixels and latents                     audio/         audio VAE and vocoder
text/          prompts                                sampling/      from noise to a latent
lora/          LoRA files and their application       offload/       weights within a memory budget
loading/       any file -> the part it holds          convert/       checkpoints -> GGUF
media.py       pictures and video files               pipeline.py    prompt -> frames
cli/           the command line
"""

__version__ = "0.1.0"
