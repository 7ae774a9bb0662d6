"""Answers from a trained model: sampling, beam search, filled masks, and the text around them."""
