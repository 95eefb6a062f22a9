"""Finding memorized texts that nobody listed, in a corpus."""
