"""Tables, figures, and HTML reports that each fit in one file."""
