"""The error of a checkpoint whose text files cannot be used."""

from __future__ import annotations


class TextFilesError(ValueError):
    """A tokenizer or chat template of a checkpoint is missing, broken or of another kind."""
