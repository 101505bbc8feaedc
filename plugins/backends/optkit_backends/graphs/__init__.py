"""Models as functions of tensors alone: what compilers of graphs take, and sessions over what they make of it."""
