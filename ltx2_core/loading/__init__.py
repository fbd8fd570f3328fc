"""From files to modules: what a file is, and one loader per part.

identify.py      what a file is, from its header
transformer.py   the transformer and its connectors
text_files.py    what a text-encoder file holds
"""
