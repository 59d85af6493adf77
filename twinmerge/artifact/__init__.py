"""The seam: the only thing that both halves know. See docs/format.md."""
