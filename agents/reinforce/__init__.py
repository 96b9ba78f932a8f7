"""REINFORCE with a value baseline over a stack of R runs: collect, label, loss, step.

Axes: R runs, T steps of a window, N worlds per run, B = T * N samples. Episodes run on across
windows. Losses and their gradients are per run, so a stack learns what its runs would alone.
"""
