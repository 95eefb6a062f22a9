"""Comparing methods on one model: rows, baselines, fine-tuning, the table and its picture."""
