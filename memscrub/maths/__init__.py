"""Small pure functions: intervals, odds, alignment, candidates."""
