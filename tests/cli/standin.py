"""A service without a model: listens, answers /ready, leaves on SIGTERM. Stands in for `headrace serve`.

`--set mode=refuse` exits 2 at once, `mode=crash` exits 1 at once, `mode=deaf` ignores SIGTERM,
`mode=unready` answers /ready with 503.
"""

import argparse
import http.server
import signal
import socket
import sys
from pathlib import Path

import yaml


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    mode = dict(item.split("=", 1) for item in arguments.set).get("mode", "")
    if mode in ("refuse", "crash"):
        sys.stderr.write(f"standin will {mode}\n")
        sys.exit(2 if mode == "refuse" else 1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else lambda *_: sys.exit(0))
    (section,) = yaml.safe_load(arguments.config.read_text()).values()
    listener = socket.create_server((section["host"], section["grpc_port"]))
    if arguments.role == "router":
        serve_http(section["host"], section["http_port"], 503 if mode == "unready" else 200)
    while True:
        listener.accept()[0].close()


def serve_http(host: str, port: int, status: int) -> None:
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"standin says so")

    http.server.HTTPServer((host, port), Ready).serve_forever()


if __name__ == "__main__":
    main()
