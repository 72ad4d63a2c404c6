"""The commands: serve, dev, migrate, check, and those that look at a deployment or change it."""
