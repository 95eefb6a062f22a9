"""The edit in memory: demands, prices, solvers, and the model that carries it; writes nothing."""
