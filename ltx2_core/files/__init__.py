"""Bytes and names of model files; nothing here builds a network.

weights.py       one interface over GGUF, safetensors and sharded files
safetensors.py   the safetensors container
comfy_quant.py   FP8 and other weights as ComfyUI stores them
names.py         which part of a model a tensor belongs to
structure.py     names and shapes of every tensor of a checkpoint
unsupported.py   models that this pack does not run, by name
"""
