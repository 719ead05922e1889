"""Tables, figures, and HTML pages that each fit in one file."""
