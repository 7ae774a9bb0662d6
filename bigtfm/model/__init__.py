"""Transformers as plain torch modules that know of no rank, no ZeRO stage and no training dtype."""
