"""Watching a run: metrics, the progress display, times of the host and the devices, stragglers, hangs, profiles."""
