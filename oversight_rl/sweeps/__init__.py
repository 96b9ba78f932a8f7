"""Sweeps: a run for every combination of settings, packed into stacks, on this machine or on Ray.

A sweep is a list of ordinary run folders. Those that are finished are skipped, those that have a
checkpoint go on from it, and the others start: that is all there is to resuming.
"""
