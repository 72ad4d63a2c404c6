"""The procedure of docs/operations.md for a Postgres that is restored from a backup."""

import re

from support.api import assert_problem
from support.services import Services

from authd.embedded import PostgresServer
from authd.embedded.processes import free_port

IDS_SKIPPED = 1_000_000


async def test_after_a_restore_devices_come_back_and_what_was_lost_opens_nothing(
    services: Services, postgres_server: PostgresServer
) -> None:
    async with services.running() as process:
        name = process.settings["AUTHD_DEPLOYMENT"]
        async with process.api() as api:
            ada = await api.new_account()
            of_ada = await api.new_session(ada)
        assert await process.stop() == 0
        await postgres_server.create_database(f"{name}-backup", name)
        try:
            await process.start()
            async with process.api() as api:
                bob = await api.new_account()
                of_bob = await api.new_session(bob)
            assert await process.stop() == 0
            [before] = await process.query("SELECT * FROM deployment_state")
            assert before["restored_at"] is None

            await postgres_server.drop_database(name)
            await postgres_server.create_database(name, f"{name}-backup")
            done = await process.run("restored")
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
            await process.wipe_redis()
            await process.start()
        finally:
            await postgres_server.drop_database(f"{name}-backup")

        [state] = await process.query("SELECT * FROM deployment_state")
        assert state["restored_at"] is not None
        assert state["log_id"] != before["log_id"]
        assert str(state["log_id"]) in done.stdout and f"authd:{name}:*" in done.stdout
        async with process.api() as api:
            carol = await api.new_account()
            assert carol.user_id == ada.user_id + IDS_SKIPPED + 1
            assert f"above {carol.user_id - 1}." in done.stdout
            assert_problem(await api.refresh(of_bob["refresh_token"]), 403, "user_disabled")
            assert_problem(await api.me(of_bob["access_token"]), 401, "token_invalid")
            assert_problem(await api.login(bob.username, bob.password), 401, "invalid_credentials")
            fresh = await api.refresh(of_ada["refresh_token"])
            assert (await api.me(fresh.json()["access_token"])).json() == ada.registered


async def test_ids_go_on_above_all_that_the_backup_can_tell_of_however_often_it_is_said(services: Services) -> None:
    async with services.prepared(empty=True) as process:
        first = await process.run("restored")  # of an older version, or of nothing: it is migrated
        assert (first.returncode, first.stderr) == (0, "")
        assert "applied 0001" in first.stdout
        # Users who were deleted had ids, too.
        await process.query("SELECT setval('users_id_seq', 5000000)")
        lasts, logs = [], set()
        for _ in range(2):
            done = await process.run("restored")
            assert (done.returncode, done.stderr) == (0, "")
            found = re.search(r"above (\d+)\..*\n.* ([0-9a-f-]{36}) now", done.stdout)
            assert found, done.stdout
            lasts.append(int(found[1]))
            logs.add(found[2])
        assert lasts == [5_000_000 + IDS_SKIPPED, 5_000_000 + 2 * IDS_SKIPPED]
        assert len(logs) == 2
        rows = await process.query("SELECT count(*) AS count FROM deployment_state")
        assert rows[0]["count"] == 1


async def test_without_postgres_it_says_so_and_fails(services: Services) -> None:
    async with services.prepared() as process:
        url = f"postgresql://authd@127.0.0.1:{free_port()}/authd"
        done = await process.run("restored", AUTHD_DATABASE_URL=url)
        assert done.returncode == 1
        assert done.stdout == "" and done.stderr.startswith("authd: ")
        assert "Traceback" not in done.stderr
