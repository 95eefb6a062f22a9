"""The policy file: its sections, its mistakes explained, its reference; knows no torch."""
