"""What a run is made of: run config (TOML) and DeepSpeed JSON, and how a mistake in either is reported."""
