"""Errors about one training sample.

They all derive from `SampleError`, so that the loader can tell "this sample is broken" (skip it and write it down) from
"the run is set up wrongly" (a plain `ValueError`: stop).
"""

from __future__ import annotations


class SampleError(ValueError):
    """One sample cannot be used. The message says which, where and why, on one line."""


class RecordError(SampleError):
    """A record of the data set does not have the LLaVA form."""


class ConversationError(SampleError):
    """A conversation does not fit its template (roles out of turn, placeholders and images that do not match)."""


class ImageError(SampleError):
    """An image is missing, broken, too large, or outside the image root."""
