"""What tasks and calls of a store are bounded by."""
