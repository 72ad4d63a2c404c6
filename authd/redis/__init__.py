"""The room of Redis, which decides: sessions, rotation, lockout, and the user cache. The only home of redis-py."""
