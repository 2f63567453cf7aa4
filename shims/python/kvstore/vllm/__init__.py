"""kvstore under vLLM: prefixes outlive the engine process.

.. code-block:: sh

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvStoreConnector", "kv_connector_module_path": "kvstore.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'

See ``docs/engines.md`` of the project for what to tune and what is not supported.
"""

from .connector import KvStoreConnector
from .encoder import KvStoreEncoderConnector

__all__ = ["KvStoreConnector", "KvStoreEncoderConnector"]
