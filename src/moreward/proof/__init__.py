"""Does a mixture help on my data? An experiment file, the runs it names, what they show, and the report."""
