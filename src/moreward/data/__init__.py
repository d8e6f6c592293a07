"""Preference data: files, shapes, checks, splits, batches."""
