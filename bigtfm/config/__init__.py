"""What a run is made of: the run config (TOML), the DeepSpeed JSON, and how a mistake in either is reported."""
