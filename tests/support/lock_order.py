"""Watches the order of row locks in a test's database: users before revocation_heads, in every transaction.

Postgres does the watching, so it sees whatever a statement, a trigger or another process locks. `pg_locks` names
tables, not rows: a transaction that locks one user, then a head, then another user is not noticed.
"""

import asyncpg

#: The first head that a transaction locks notes whether the transaction held a lock on users by then. Whatever it holds
#: when it commits without having held it before the head was locked in the wrong order, and the commit fails.
WATCH = """
CREATE SCHEMA watch;
CREATE TABLE watch.transactions (number bigint GENERATED ALWAYS AS IDENTITY, users_first boolean NOT NULL);

CREATE FUNCTION watch.locks_users() RETURNS boolean LANGUAGE sql AS $$
    SELECT EXISTS (
        SELECT FROM pg_locks
        WHERE pid = pg_backend_pid() AND locktype = 'relation' AND relation = 'public.users'::regclass
          AND mode IN ('RowShareLock', 'RowExclusiveLock')
    )
$$;

CREATE FUNCTION watch.note_head() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF coalesce(current_setting('watch.users_first', true), '') = '' THEN
        PERFORM set_config('watch.users_first', watch.locks_users()::text, true);
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER note_head BEFORE UPDATE ON public.revocation_heads FOR EACH ROW EXECUTE FUNCTION watch.note_head();

CREATE FUNCTION watch.check_order() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF watch.locks_users() AND NOT current_setting('watch.users_first')::boolean THEN
        RAISE EXCEPTION 'lock order: a row of revocation_heads was locked before one of users';
    END IF;
    INSERT INTO watch.transactions (users_first) VALUES (current_setting('watch.users_first')::boolean);
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER check_order AFTER UPDATE ON public.revocation_heads DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION watch.check_order();
"""


async def watch_lock_order(database_url: str) -> None:
    """Let a migrated database, and those it is the template of, refuse a commit after locks in the wrong order."""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(WATCH)
    finally:
        await connection.close()
