"""How gradients are computed: one file a strategy."""
