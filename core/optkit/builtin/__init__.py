"""Sources, datasets and metrics that come with optkit, through the same door as any plugin."""
