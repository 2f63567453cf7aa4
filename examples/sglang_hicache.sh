#!/usr/bin/env bash
# Starts an SGLang server over kvstore. Needs SGLang and the kvstore package in one environment, and a running daemon (`kvstore serve`).
#
#     examples/sglang_hicache.sh MODEL [more arguments of sglang.launch_server]
#
# Send a long prompt, restart the server, and send the prompt again. The second time, the prefix comes from the store.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
model=$1
shift
exec python3 -m sglang.launch_server --model-path "$model" \
  --enable-hierarchical-cache --enable-metrics \
  --hicache-storage-backend dynamic \
  --hicache-storage-backend-extra-config \
  '{"backend_name": "kvstore", "module_path": "kvstore.sglang", "class_name": "KvStoreHiCache", "interface_v1": 1}' \
  "$@"
