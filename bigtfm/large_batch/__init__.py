"""Large batches: which size pays (the gradient noise scale), and what a recipe becomes at another one."""
