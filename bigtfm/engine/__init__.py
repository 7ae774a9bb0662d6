"""The only place that imports deepspeed: process group, engine, checkpoints."""
