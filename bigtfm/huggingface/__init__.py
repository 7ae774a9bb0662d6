"""To and from Hugging Face: architectures, their tensors and tokenizers, and the two commands."""
