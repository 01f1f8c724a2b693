"""Experts on CPU in C: the sources, the library that they build, and the torch operations around it."""
