"""LoRA files on a transformer.

keys.py   which layer a key means
file.py   one file: shapes, scales, rewriting
apply.py  computing with them outside the host
"""
