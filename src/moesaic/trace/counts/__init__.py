"""Integer counts of routing logs: collected in one pass and bounded memory, added, kept as files; metrics read them."""
