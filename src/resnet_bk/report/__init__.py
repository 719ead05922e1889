"""Tables, plots, one-file HTML reports."""
