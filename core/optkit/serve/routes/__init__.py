"""The endpoints: they speak HTTP and nothing else."""
