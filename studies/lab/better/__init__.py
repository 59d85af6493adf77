"""What might beat the paper's cut at equal bytes, each way alone and together."""
