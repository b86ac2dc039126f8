"""Export of a finished run to files that other software loads."""
