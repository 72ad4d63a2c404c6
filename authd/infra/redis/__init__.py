"""The only home of redis-py: the client and the loader of scripts."""
