"""Run folders, and the loop that fills them, whatever is trained."""
