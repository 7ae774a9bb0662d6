"""A run as Slurm's jobs: submitted, started again, watched. The scripts stand in slurm/."""
