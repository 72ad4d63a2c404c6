"""The server: sockets, connections and HTTP/1.1, each held to bounds and deadlines."""
