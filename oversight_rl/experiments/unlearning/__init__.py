"""Unlearning: a topic of stories goes into a part of a language model that can be removed."""
