from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from inference_pio.deployments.local_ports import (
    free_port_near,
    free_ports,
    is_answering,
    require_free_port,
)


def test_free_ports_differ_and_can_be_listened_on() -> None:
    ports = free_ports(8)
    assert len(set(ports)) == 8
    for port in ports:
        require_free_port("127.0.0.1", port)


def test_a_taken_port_is_refused_with_a_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} .*--port"):
            require_free_port("127.0.0.1", port)
        assert free_port_near(port) != port
    assert free_port_near(port) == port


def test_only_a_200_counts_as_an_answer() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert is_answering(f"{url}/health")
            assert not is_answering(f"{url}/starting")
        finally:
            server.shutdown()
            thread.join()
    assert not is_answering(f"http://127.0.0.1:{free_ports(1)[0]}/health")
