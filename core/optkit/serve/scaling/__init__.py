"""More than one server process: copies of the application under an engine that starts, finds and replaces them."""
