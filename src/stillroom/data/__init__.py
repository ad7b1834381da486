"""Rows, from their sources to padded batches."""
