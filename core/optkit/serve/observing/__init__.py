"""What operators see of a server: metrics, logs, traces, and whether it is healthy. Nothing leaves it unless asked."""
