"""Monitoring of a run: metrics, progress display, host and device times, stragglers, hangs, profiles."""
