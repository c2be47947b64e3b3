"""Checkpoints, their manifests, and a mirror of the run folder in a bucket."""
