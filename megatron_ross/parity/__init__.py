"""Does this stack compute what the published code computes? Recorded cases through the real pipeline, compared."""
