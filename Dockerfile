# A gateway with the local engine. The models and the embedded store live in /data: mount a volume there.
# Without API keys llmstream listens on loopback only: give it some and let it listen on all addresses,
# docker run -e API_KEYS=… -e SERVER__HOST=0.0.0.0 -p 8000:8000 …, or run the container with --network host.
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY llmstream ./llmstream
RUN python -m venv /opt/llmstream && /opt/llmstream/bin/pip install --no-cache-dir '.[local]'

FROM python:3.13-slim
RUN useradd --uid 10001 --create-home --home-dir /data llmstream
COPY --from=build /opt/llmstream /opt/llmstream
USER llmstream
ENV PATH=/opt/llmstream/bin:$PATH DATA_DIR=/data/llmstream PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "llmstream"]
CMD ["serve"]
