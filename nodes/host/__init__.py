"""Everything that touches ComfyUI's own code.

internals.py  names of the host that are needed
model.py, clip.py, vae.py  the MODEL, CLIP and VAE objects
ops.py, patcher.py, files.py, move.py  packed weights under the host's memory management
lora.py, lora_file.py, lora_memory.py  LoRA patches on packed weights
stream.py, lane.py, prefetch.py  weights and LoRAs on their way to the device
sampling.py, mask.py, guides.py, retry.py  sampling under the host
"""
