"""Agents under partial oversight: in our grid, and in any environment."""
