"""The loaded model: families, sites, activations and gradients, texts as tokens."""
