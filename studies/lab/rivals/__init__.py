"""Other ways to hold many experts in few bytes, each from its paper: our implementations."""
