"""Faults from outside while everybody draws: `make chaos`."""
