"""Networks: encoders, heads, layers, and the registry that builds them by name."""
