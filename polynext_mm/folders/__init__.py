"""Inspect folders of images and annotations, and convert them to what mm reads.

Nothing here needs mm, so ``polynext-mm new`` and ``convert-dataset`` start within a second.
"""


class FolderError(ValueError):
    """A folder that cannot be turned into a data set; the message says what is there."""
