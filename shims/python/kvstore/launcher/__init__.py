"""The launcher: a process that has imported an engine and waits. A worker starts as its fork, and imports nothing again.

.. code-block:: sh

    python -m kvstore.launcher serve --import torch,transformers &
    python -m kvstore.launcher run -- serve_model.py --port 8000        # as `python serve_model.py --port 8000`, without the imports

It is off unless somebody starts it. ``serve`` owns the socket, and starts a *template*, which imports, listens, and forks. Before each
fork the template looks at itself: threads, devices, connections and child processes do not survive a fork, and are refused by name. If
the source of a module that it imported has changed, another template takes over; the old one stays until its workers have ended.

``run`` hands over its arguments, environment, folder and standard streams, passes signals on, and ends as the worker ends. If the client
ends first, its worker gets SIGHUP, and later SIGKILL. If the launcher ends, its workers get SIGTERM.

It knows nothing of snapshots, and nothing here runs as another user: whoever may connect may run code as this user.
"""

__all__: list[str] = []
