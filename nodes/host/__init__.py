"""Everything that touches ComfyUI's own code.

internals.py  what of the host is needed, and what is used only where it is as tested
model.py, clip.py, vae.py  the MODEL, CLIP and VAE objects
ops.py, patcher.py, files.py, move.py  packed weights under the host's memory management
lora.py, lora_file.py, stream.py  LoRA patches on packed weights; their matrices on the way to the device
prefetch.py, graphs.py  the host's own prefetching of weights and its recorded blocks
sampling.py, mask.py, guides.py, retry.py  sampling under the host
watch.py, preview.py  what is checked and shown while any sampler runs
"""
