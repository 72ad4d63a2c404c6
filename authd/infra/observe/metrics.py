"""Every metric of authd, so that a dashboard can be written from one page. Units stand last in the name."""

from prometheus_client import Counter, Gauge, Histogram

_REQUEST_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

requests = Counter("authd_http_requests_total", "Answers by route and status.", ["route", "method", "status"])
request_seconds = Histogram(
    "authd_http_request_seconds", "Time to answer, by route.", ["route"], buckets=_REQUEST_BUCKETS
)
refusals = Counter("authd_refusals_total", "Problems answered, by stable code.", ["code"])
forwarded_unusable = Counter(
    "authd_forwarded_unusable_total", "Requests of a trusted proxy whose X-Forwarded-For holds no usable hop."
)
connections = Gauge("authd_http_connections", "Connections that are open.", multiprocess_mode="livesum")
connections_ended = Counter(
    "authd_http_connections_ended_total", "Connections that the limit turned away or closed, by how.", ["how"]
)

sessions = Counter("authd_session_outcomes_total", "What the session scripts decided.", ["outcome"])
revocations_applied = Counter("authd_revocations_applied_total", "Rows of the revocation log applied to Redis.")

hash_seconds = Histogram("authd_hash_seconds", "Time on a hashing thread.", buckets=_REQUEST_BUCKETS)
hash_wait_seconds = Histogram(
    "authd_hash_wait_seconds", "Time in a hashing queue.", ["queue"], buckets=_REQUEST_BUCKETS
)
hash_waiting = Gauge("authd_hash_waiting", "Jobs in a hashing queue.", ["queue"], multiprocess_mode="livesum")
hash_refused = Counter("authd_hash_refused_total", "Jobs never hashed, by reason and queue.", ["reason", "queue"])
login_locks = Counter("authd_login_locks_total", "Lockouts set, by what was counted.", ["counter"])

outbox_events = Gauge("authd_outbox_events", "Events that wait for the broker.", multiprocess_mode="mostrecent")
outbox_oldest_seconds = Gauge(
    "authd_outbox_oldest_seconds", "Age of the oldest event that waits.", multiprocess_mode="mostrecent"
)
outbox_parked = Gauge(
    "authd_outbox_parked", "Events that the broker refused and that are parked.", multiprocess_mode="mostrecent"
)
events_published = Counter("authd_events_published_total", "Events the broker acknowledged, by type.", ["type"])
events_dropped = Counter("authd_events_dropped_total", "Events a full stream did not take, by type.", ["type"])
events_relayed = Counter("authd_events_relayed_total", "Events moved from Redis to the outbox, by type.", ["type"])
relay_waiting = Gauge("authd_relay_waiting", "Events in Redis's streams.", multiprocess_mode="mostrecent")
publish_failures = Counter("authd_publish_failures_total", "Lanes given up for now, by reason.", ["reason"])
kafka_connected = Gauge("authd_kafka_connected", "1 while the producer is started.", multiprocess_mode="min")

topic_unusable = Gauge(
    "authd_kafka_topic_unusable",
    "1 while the broker lacks the topic or forbids to write to it.",
    ["topic"],
    multiprocess_mode="max",
)

unavailable = Counter("authd_unavailable_total", "Calls a part did not answer in time, by part.", ["part"])
clock_skew = Gauge(
    "authd_clock_skew_seconds",
    "How far this machine's clock is ahead of a store's.",
    ["part"],
    multiprocess_mode="mostrecent",
)
