"""What a run costs: floating-point operations and bytes."""
