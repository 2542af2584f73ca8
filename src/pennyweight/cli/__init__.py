"""The command `pennyweight`: one file per verb. Importing this package imports nothing else."""
