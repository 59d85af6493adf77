"""Reading an input and saying how much of each expert it needs."""
