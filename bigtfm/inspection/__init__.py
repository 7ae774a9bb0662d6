"""A look into a trained model while it reads a text: attention, losses, what its layers expect, norms."""
