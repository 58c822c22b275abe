"""The command line: one thin file per verb; importing them loads click and nothing heavy."""
