"""What the studies share: experts and rows opened once, records that grow, tables and plots."""
