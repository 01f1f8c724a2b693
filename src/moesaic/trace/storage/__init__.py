"""Traces on disk: folders of Parquet parts, written while a model runs and read lazily."""
