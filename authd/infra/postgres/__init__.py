"""The only home of asyncpg: the pool, the migrations, the loader of statements."""
