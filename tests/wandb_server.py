"""A small W&B server, for real online runs on 127.0.0.1."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Answers the requests of `wandb.init`, `log`, `alert` and `finish`, and records what they send."""

    def __init__(self) -> None:
        self.run_ids: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.alerts: list[tuple[str, str, str]] = []  # run id, title, text
        self.broken = False  # answers 500 to everything
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, content: Any, code: int = 200) -> None:
                body = json.dumps(content).encode()
                self.send_response(500 if outer.broken else code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_PUT(self) -> None:
                self._body()
                self._answer({})

            do_GET = do_PUT

            def do_POST(self) -> None:
                body = self._body()
                if self.path.endswith("/graphql"):
                    request = json.loads(body)
                    data = outer.graphql(request["query"], request.get("variables") or {})
                    self._answer({"data": data})
                else:
                    if self.path.endswith("/file_stream") and not outer.broken:
                        outer.record(json.loads(body))
                    self._answer({})  # uploads and telemetry

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of the answer to a query."""
        if "UpsertBucket" in query:
            self.run_ids.append(variables["name"])
            project = {"name": "sgan_dist", "entity": {"name": "me"}}
            bucket = {
                "id": "x",
                "name": variables["name"],
                "displayName": "x",
                "project": project,
                "historyLineCount": 0,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": len(set(self.run_ids)) == 1}}
        if "RunResumeStatus" in query:
            return {"model": {"bucket": None}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/up"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if "NotifyScriptableRunAlert" in query:
            self.alerts.append((variables["runName"], variables["title"], variables["text"]))
            return {"notifyScriptableRunAlert": {"success": True}}
        if "Viewer" in query:
            return {"viewer": {"id": "me", "entity": "me", "username": "me", "flags": "{}"}}
        return {}

    def record(self, body: dict[str, Any]) -> None:
        """Adds the lines of history in a request to /file_stream."""
        lines = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.history += [json.loads(line) for line in lines]

    def close(self) -> None:
        """Stops the server."""
        self._http.shutdown()
        self._http.server_close()
