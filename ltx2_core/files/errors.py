"""Errors of weight files. Their sentences hold names and values from files, so each is made safe to show where it is created."""

from .text import MESSAGE_LENGTH, visible


class WeightFileError(ValueError):
    """A weight file is missing, truncated, foreign or holds weights in a form this pack does not read."""

    __module__ = "ltx2_gguf"  # shown before the name of the error

    def __init__(self, message=""):
        super().__init__(visible(message, MESSAGE_LENGTH))


class WeightsMismatch(WeightFileError):
    """A module and the tensors for it do not fit; ``missing``, ``unexpected`` and ``misshapen`` list the names."""

    __module__ = "ltx2_gguf"  # shown before the name of the error

    def __init__(self, message, missing=(), unexpected=(), misshapen=()):
        super().__init__(message)
        self.missing, self.unexpected, self.misshapen = tuple(missing), tuple(unexpected), tuple(misshapen)


class CheckpointError(WeightFileError):
    """The files given do not hold what is to be loaded; the message says what they are and what is needed."""

    __module__ = "ltx2_gguf"  # shown before the name of the error
