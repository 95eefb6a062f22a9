"""The use cases scan, fix and gate, from their inputs to a report; everything below serves them."""
