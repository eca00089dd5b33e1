"""nginx as a plain proxy that buffers nothing. Uses what is installed; ``apt install nginx-light`` installs it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.bench.bench import Bench, Running
from tests.bench.processes import Unavailable, running, serves_chat, until_ready
from tests.bench.systems.base import run

CONFIG = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile 65536;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 30000; }}
http {{
    access_log off;
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    keepalive_requests 100000000;
    upstream mock {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://mock;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 300s;
        }}
    }}
}}
"""


class Nginx:
    name = "nginx"

    async def prepare(self, bench: Bench) -> str:
        return (await run(self._binary(), "-v")).partition("/")[2]

    @asynccontextmanager
    async def serve(self, bench: Bench) -> AsyncIterator[Running]:
        folder, port = bench.new_folder(self.name), bench.port()
        config, log = folder / "nginx.conf", folder / "log.txt"
        config.write_text(CONFIG.format(folder=folder, port=port, upstream=bench.upstream_port))
        # The worker gives up root's rights and must still get at its folders.
        bench.folder.chmod(0o755)
        command = [self._binary(), "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]
        async with running(command, core=bench.cores.server, log=log) as process:
            await until_ready(process, log, lambda: serves_chat(port, {}))
            yield Running(self.name, port, process.pid)

    def _binary(self) -> str:
        found = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
        if found is None:
            raise Unavailable("nginx is not installed (apt install nginx-light)")
        return found
