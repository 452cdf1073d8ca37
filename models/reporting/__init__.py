"""A report: the table of all runs, tests of claims, figures, and the templates of its pages."""
