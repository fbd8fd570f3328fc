"""Bytes and names of model files; nothing here builds a network, and reading a header needs the standard library alone.

opened.py        one open file, its header read and its names sorted once
weights.py       one interface over GGUF, safetensors and sharded files (weight_file.py)
safetensors.py   the safetensors container
comfy_quant.py   safetensors files, FP8 and other weights as ComfyUI stores them
names.py         which part of a model a tensor belongs to
gemma.py         names of Gemma's tensors
structure.py     names and shapes of every tensor of a checkpoint (structure_audio.py: of its audio VAE and vocoder)
unsupported.py   models that this pack does not run, by name
text.py          text from files: shown safely, read as JSON within bounds
errors.py        errors, their sentences safe to show
"""
