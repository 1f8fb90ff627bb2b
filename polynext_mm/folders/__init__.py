"""Folders of images and annotations: what is in them, and in the form that mm reads.

Nothing here needs mm: ``polynext-mm new`` and ``convert-dataset`` answer in a second.
"""


class FolderError(ValueError):
    """A folder that cannot be made a data set of; the message says what is there."""
