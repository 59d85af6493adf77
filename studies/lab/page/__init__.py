"""Tables, plots and the report page, from records alone."""
