"""Neural parts that the recipes are built from."""
