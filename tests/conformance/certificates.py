"""Certificates for the tests of TLS, made for each run."""

from __future__ import annotations

import ssl

import trustme

from tests.conformance.networks import CLIENT, SERVER

NAMES = ("127.0.0.1", SERVER, f"{CLIENT}.shm")


class Contexts:
    """`server` and `client` trust each other; `wrong_name` and `stranger` are servers that nobody should."""

    def __init__(self) -> None:
        ca, other = trustme.CA(), trustme.CA()
        self.server, self.wrong_name, self.stranger, self.asking = (
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(4)
        )
        ca.issue_cert(*NAMES).configure_cert(self.server)
        ca.issue_cert("somebody.else").configure_cert(self.wrong_name)
        other.issue_cert(*NAMES).configure_cert(self.stranger)
        ca.issue_cert(*NAMES).configure_cert(self.asking)
        ca.configure_trust(self.asking)
        self.asking.verify_mode = ssl.CERT_REQUIRED
        self.client, self.known_client = (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) for _ in range(2))
        for context in (self.client, self.known_client):
            ca.configure_trust(context)
        ca.issue_cert("client@example.org").configure_cert(self.known_client)
