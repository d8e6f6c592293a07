"""A trained run in the forms of other libraries. One file a form; what they share is in `parts`."""
