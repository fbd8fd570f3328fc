"""The GGUF container.

metadata.py  typed values of the header
reader.py    a strict header reader over a memory map
writer.py    a streaming writer
"""
