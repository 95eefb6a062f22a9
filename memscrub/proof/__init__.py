"""Signatures and statements about a directory, and whether they hold."""
