"""Chunks of a sequence, run forwards against recorded keys and values and walked back in reverse."""
