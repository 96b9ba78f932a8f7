"""Partition: what a network knows of each group of classes goes into a part of its code."""
