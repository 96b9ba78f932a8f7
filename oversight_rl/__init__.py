"""Experiments on scalable oversight: configs, training runs, steering, evaluation."""
