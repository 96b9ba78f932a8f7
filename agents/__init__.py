"""Policies and how they learn."""
