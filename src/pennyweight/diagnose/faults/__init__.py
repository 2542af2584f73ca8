"""What can go wrong, one file a family; each registers functions from a `Case` to findings."""
