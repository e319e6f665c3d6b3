#!/usr/bin/env bash
# Runs the scenarios on real vLLM servers on the CPU: one that prefills and two that decode, with the two load failure
# policies. make demo-vllm installs vLLM and the tiny model in .cache/vllm. Arguments go to the program, for example:
#   bench/scenarios/vllm.sh -deadly -record bench/scenarios/testdata/vllm-0.32.json
# PORT_BASE is the first of nine ports (41100); each server takes 3 GB of memory.
set -euo pipefail

# A server and all that it started.
tree() {
  echo "$1"
  for child in $(pgrep -P "$1"); do tree "$child"; done
}

# Kills the server whose pid stands in a file and waits until nothing of it is left.
end() {
  local pids pid
  pids=$(tree "$(cat "$1")")
  # shellcheck disable=SC2086
  kill -KILL $pids 2>/dev/null || true
  for pid in $pids; do
    while [[ -e /proc/$pid && "$(awk '{print $3}' "/proc/$pid/stat" 2>/dev/null)" != Z ]]; do sleep 0.05; done
  done
}

if [[ "${1:-}" == end ]]; then
  end "$2"
  exit
fi

self=$(readlink -f "${BASH_SOURCE[0]}")
cd "$(dirname "$self")/../.."
readonly lab="$PWD/.cache/vllm" base=${PORT_BASE:-41100} lease=6
[[ -f "$lab/venv/.ok" && -f "$lab/model/model.safetensors" ]] || {
  echo "scenarios: run make demo-vllm once: it installs vLLM." >&2
  exit 1
}
run=$(mktemp -d)

# serve NAME ROLE PORT POLICY
serve() {
  local transfer calm=
  transfer=$(printf '{"kv_connector":"NixlConnector","kv_role":"%s","kv_buffer_device":"cpu","kv_load_failure_policy":"%s","kv_connector_extra_config":{"num_threads":0,"kv_lease_duration":%d}}' "$2" "$4" "$lease")
  [[ -f "$lab/calm.so" ]] && calm="$lab/calm.so"
  # All in one session: the kernel shares the cores among sessions, and spinning threads in two of them starve each other.
  env PATH="$lab/venv/bin:$PATH" LD_PRELOAD="$calm" HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 \
    VLLM_TARGET_DEVICE=cpu VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 \
    VLLM_NIXL_SIDE_CHANNEL_HOST=127.0.0.1 VLLM_NIXL_SIDE_CHANNEL_PORT=$(($3 + 1)) \
    nice -n 5 "$lab/venv/bin/vllm" serve "$lab/model" --served-model-name tiny --host 127.0.0.1 --port "$3" \
    --dtype float32 --max-model-len 8192 --block-size 32 --num-gpu-blocks-override 1200 --enable-prefix-caching --enforce-eager \
    --max-num-seqs 8 --max-num-batched-tokens 512 --enable-prompt-tokens-details --kv-transfer-config "$transfer" >>"$run/$1.log" 2>&1 &
  echo $! >"$run/$1.pid"
}

finish() {
  touch "$run/over"
  exec 2>/dev/null # where bash would say of each server that it was killed
  for pid in "$run"/*.pid; do end "$pid"; done
  wait 2>/dev/null || true
  rm -rf "$run"
}
trap finish EXIT
trap 'exit 130' INT TERM

serve decode kv_consumer $((base + 100)) fail
serve recompute kv_consumer $((base + 200)) recompute
# The prefill server is started again whenever it ends.
while [[ ! -e "$run/over" ]]; do
  serve prefill kv_producer "$base" fail
  wait $! 2>/dev/null || true
done &
url=http://127.0.0.1
echo "Waiting for vLLM (half a minute or more) ..."
for port in "$base" $((base + 100)) $((base + 200)); do
  for ((i = 0; ; i++)); do
    curl -sfo /dev/null -m 2 "$url:$port/health" && break
    ((i < 600)) || {
      tail -n 20 "$run"/*.log >&2
      exit 1
    }
    sleep 0.5
  done
done
go run ./bench/scenarios -prefill "$url:$base" -decode "$url:$((base + 100))" -recompute "$url:$((base + 200))" \
  -restart-prefill "$self end $run/prefill.pid" -lease "${lease}s" "$@"
