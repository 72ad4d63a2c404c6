"""Load: people who register, log in, stay for a while and log out. Any answer but the expected one is a failure.

    locust -f load/locustfile.py --headless -u 10 -r 10 -t 20s --host http://127.0.0.1:8000

Every user has an e-mail address of its own. Registration and login hash a password each (AUTHD_BCRYPT_COST), so they
set the pace: what a machine bears is about its cores divided by the time of one hash.
"""

import uuid
from typing import Any

from locust import HttpUser, between, task

PASSWORD = "correct horse battery staple"


class Person(HttpUser):
    wait_time = between(0.1, 0.5)
    host = "http://127.0.0.1:8000"

    def on_start(self) -> None:
        self.username = f"load-{uuid.uuid4().hex}@example.com"
        self.access_token = self.refresh_token = ""
        body = {"username": self.username, "password": PASSWORD, "full_name": "Load"}
        self.expect(201, "POST", "/auth/register", json=body)
        self.log_in()

    @task(20)
    def read_me(self) -> None:
        answer = self.expect(200, "GET", "/auth/me", headers=self.bearer())
        if answer is not None and answer["username"] != self.username:
            raise AssertionError("somebody else's profile")

    @task(5)
    def refresh(self) -> None:
        self.keep(self.expect(200, "POST", "/auth/refresh_token", json={"refresh_token": self.refresh_token}))

    @task(1)
    def log_out_and_in(self) -> None:
        if self.expect(200, "POST", "/auth/logout", headers=self.bearer()) is not None:
            # Ended at once and everywhere: the tokens from before are refused.
            self.expect(401, "GET", "/auth/me", name="/auth/me after logout", headers=self.bearer())
            refused = {"refresh_token": self.refresh_token}
            self.expect(401, "POST", "/auth/refresh_token", name="/auth/refresh_token after logout", json=refused)
        self.log_in()

    def log_in(self) -> None:
        form = {"grant_type": "password", "username": self.username, "password": PASSWORD}
        self.keep(self.expect(200, "POST", "/auth/login", data=form))

    def keep(self, pair: dict[str, Any] | None) -> None:
        if pair is not None:
            self.access_token, self.refresh_token = pair["access_token"], pair["refresh_token"]

    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.access_token}"}

    def expect(self, status: int, method: str, path: str, **options: Any) -> dict[str, Any] | None:
        """The answer's JSON, or None where the status is another: then it is counted as a failure."""
        with self.client.request(method, path, catch_response=True, **options) as response:
            if response.status_code != status:
                response.failure(f"{response.status_code} instead of {status}: {response.text[:200]}")
                return None
            response.success()
            answer: dict[str, Any] = response.json()
            return answer
