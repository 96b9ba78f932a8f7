"""The playground: one page with trained agents inside, to be steered by hand."""
