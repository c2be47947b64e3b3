"""Checkpoints, the manifest that vouches for each, a mirror of the run folder in a bucket."""
