"""Does growth earn its keep? One experiment, trained in every way that could explain it away."""
