"""The room of Postgres, which remembers: users, revocations, keys and the outbox. The only home of asyncpg."""
