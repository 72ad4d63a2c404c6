"""Random histories of one user against a model: what each token gets, who lives, and what the log holds."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import hypothesis
import pytest
from anyio import from_thread, to_thread
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.deployment import MakeWorld, World

from authd.errors import InvalidCredentials
from authd.sessions.sessions import TokenPair
from authd.tokens.access import RefreshToken
from authd.users.postgres import User

CAP = 3
#: No history takes as long; `wait` lets it pass.
GRACE_S = 100
GRACE_MS = GRACE_S * 1000

EXAMPLES = 45
STEPS = 25


@dataclass
class Device:
    """A session: every token it ever got, oldest first, and what Redis is to know of it."""

    id: bytes
    epoch: int
    created_ms: int
    pairs: list[tuple[TokenPair, RefreshToken]]
    counter: int
    #: When Redis last rotated it, as Redis has it.
    issued_ms: int
    in_redis: bool = True
    ended: str = ""

    @property
    def age(self) -> tuple[int, bytes]:
        return self.created_ms, self.id


class Histories(RuleBasedStateMachine):
    world: World

    def do(self, call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        return from_thread.run(partial(call, *arguments))

    @initialize()
    def register(self) -> None:
        self.do(self.world.wipe)
        self.user: User = self.do(self.world.register)
        self.devices: list[Device] = []
        self.epoch = 1
        self.over = ""  # why the sessions of earlier epochs ended
        self.disabled = False

    @rule()
    def log_in(self) -> None:
        if self.disabled:
            with pytest.raises(InvalidCredentials):
                self.do(self.world.login, self.user)
            return
        pair = self.do(self.world.login, self.user)
        token = self.world.token(pair)
        assert (token.epoch, token.counter) == (self.epoch, 1)
        self.make_room()
        device = Device(token.session_id, self.epoch, token.created_ms, [(pair, token)], 1, token.issued_ms)
        self.devices.append(device)

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), age=st.sampled_from([0, 0, 0, 1, 1, 2, 5]))
    def refresh(self, data: st.DataObject, age: int) -> None:
        device = data.draw(st.sampled_from(self.devices))
        pair, token = device.pairs[max(0, len(device.pairs) - 1 - age)]
        expected = self.predict(device, token)
        outcome = self.do(self.refresh_or_refusal, pair)
        if isinstance(outcome, str):
            assert outcome == expected
            return
        successor = self.world.token(outcome)
        assert expected in ("rotated", "repeated")
        assert (successor.session_id, successor.created_ms) == (device.id, device.created_ms)
        if expected == "repeated":
            assert outcome.refresh_token in [pair.refresh_token for pair, _ in device.pairs]
            assert successor.counter == device.counter == token.counter + 1
        else:
            assert successor.counter == device.counter
            device.issued_ms = successor.issued_ms
            device.pairs.append((outcome, successor))

    def predict(self, device: Device, token: RefreshToken) -> str:
        """What design.md says, and its effect on the device."""
        if device.epoch < self.epoch:
            return "user_disabled" if self.over == "user_disabled" else "session_ended"
        if device.ended:
            return device.ended
        if not device.in_redis:
            present = self.present()
            if len(present) >= CAP and device.created_ms < present[len(present) - CAP].created_ms:
                device.ended = "session_evicted"
                return device.ended
            self.make_room()
            device.in_redis, device.counter = True, token.counter + 1
            return "rotated"
        if token.counter < device.counter and self.is_recent(device):
            return "repeated" if token.counter == device.counter - 1 else "refresh_token_superseded"
        if token.counter >= device.counter and device.issued_ms <= token.issued_ms + GRACE_MS:
            device.counter = token.counter + 1
            return "rotated"
        device.ended, device.in_redis = "refresh_token_reused", False
        return device.ended

    async def refresh_or_refusal(self, pair: TokenPair) -> TokenPair | str:
        outcome = await self.world.outcome(pair.refresh_token)
        # Asked twice: a repeated request gets the same answer as its first.
        if outcome == "ok":
            return await self.world.refresh(pair.refresh_token)
        assert await self.world.outcome(pair.refresh_token) == outcome
        return outcome

    @rule(reason=st.sampled_from(["logout", "user_disabled", "user_enabled"]))
    def end_all(self, reason: str) -> None:
        if reason == "logout":
            self.do(self.world.end_all, self.user)
        elif self.disabled == (reason == "user_disabled"):
            return
        else:
            self.do(self.world.set_disabled, self.user, reason)
            self.disabled = not self.disabled
        self.epoch, self.over = self.epoch + 1, reason

    @precondition(lambda self: self.present())
    @rule(data=st.data())
    def log_out(self, data: st.DataObject) -> None:
        device = data.draw(st.sampled_from(self.present()))
        self.do(self.world.sessions.logout, device.pairs[-1][0].access_token, "current")
        device.ended = "session_ended"

    @rule()
    def wipe_redis(self) -> None:
        self.do(self.world.wipe)
        for device in self.devices:
            device.in_redis = False

    @precondition(lambda self: self.present())
    @rule()
    def wait(self) -> None:
        """The grace of every session passes: in Redis they were rotated long ago."""
        for device in self.present():
            device.issued_ms -= 2 * GRACE_MS
            self.do(partial(self.world.change, self.user.id, device.id, issued=device.issued_ms))

    @invariant()
    def the_living_are_those_of_the_model(self) -> None:
        if not hasattr(self, "user"):
            return
        live = self.do(self.world.store.list_live, self.user.subject, 0)
        present = self.present()
        assert [(s.id, s.counter, s.issued_ms) for s in live] == [(d.id, d.counter, d.issued_ms) for d in present]
        assert len(live) <= CAP
        living = {device.id for device in present}
        for device in self.devices:
            expected = "ok" if device.id in living else "token_invalid"
            assert self.do(self.world.bearer, device.pairs[0][0].access_token) == expected

    @invariant()
    def the_log_has_every_ending_once(self) -> None:
        if not hasattr(self, "user"):
            return
        rows = self.do(self.world.rows, self.user.id)
        sessions = sorted(session_id for session_id, _, _ in rows if session_id)
        assert sessions == sorted(device.id for device in self.devices if device.ended)
        assert [epoch for _, epoch, _ in rows if epoch] == list(range(2, self.epoch + 1))

    def present(self) -> list[Device]:
        """The live sessions that Redis knows, oldest first."""
        devices = [d for d in self.devices if d.in_redis and not d.ended and d.epoch == self.epoch]
        return sorted(devices, key=lambda device: device.age)

    def make_room(self) -> None:
        for device in self.present()[: max(0, len(self.present()) + 1 - CAP)]:
            device.ended, device.in_redis = "session_evicted", False

    def is_recent(self, device: Device) -> bool:
        return self.world.clock() * 1000 <= device.issued_ms + GRACE_MS


@pytest.mark.proof
async def test_sessions_do_what_the_model_says(make_world: MakeWorld) -> None:
    world = await make_world(max_active_sessions=CAP, refresh_grace_s=GRACE_S)
    settings = hypothesis.settings(
        max_examples=EXAMPLES // 3 if world.is_cluster else EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    machine = type("Histories", (Histories,), {"world": world})
    await to_thread.run_sync(partial(run_state_machine_as_test, machine, settings=settings))
