"""The GGUF container.

metadata.py  typed values of the header
reader.py    a strict header reader (mapping.py: the memory map)
writer.py    a streaming writer
text.py      what may be shown of text from a file
"""
