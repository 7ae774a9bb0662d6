"""bigtfm trains Transformers under DeepSpeed, with the same loss whatever you change."""

__version__ = "0.1.0"
