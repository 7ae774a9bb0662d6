"""Hyper-parameters: many short trainings, of which the promising go on; and the range of learning rates."""
