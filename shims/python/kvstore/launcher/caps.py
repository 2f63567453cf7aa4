"""Bounds of the launcher, each with its reason."""

# Bytes of a message: an environment and arguments may have 2 MiB, by Linux' own bound, and JSON escapes some of them.
MESSAGE_BYTES_MAX = 8 << 20
# Workers at once, unless `--workers` says otherwise: each has an engine's memory.
WORKERS_MAX = 16
# Connections that have not asked for anything yet: each is a client that sends its request at once.
NEWCOMERS_MAX = 64
# Seconds until a newcomer has sent its request.
REQUEST_SECONDS = 10.0
# Seconds between the signal that asks a worker to end and the one that ends it.
GRACE_SECONDS = 10.0
# Seconds before a template that could not import is started again, at first and at most.
RETRY_SECONDS, RETRY_SECONDS_MAX = 1.0, 60.0
# Seconds that a client waits for its worker: an engine's imports may have to be made again first.
START_SECONDS = 600.0
# Bytes of a Unix socket's path, by Linux' own bound.
PATH_BYTES_MAX = 107
