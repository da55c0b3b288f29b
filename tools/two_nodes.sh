#!/bin/sh
# The embedded model on two "nodes", which are two processes of this machine that know each other by loopback alone: each
# has half of the experts of every layer. Asks a question, prints the answer and what each node holds, and stops both.
#
#   make .cache/vllm && tools/two_nodes.sh            # or: tools/two_nodes.sh FILE.gguf
#
# On two machines it is the same: --master-addr is the first one's address, and each command runs on its own machine.
set -eu
cd "$(dirname "$0")/.."
model=${1:-hybrimoe_kt/models/small-talk-q4_k.gguf}
vllm=.cache/vllm/bin/vllm
logs=$(mktemp -d)
port=${PORT:-8123}

common="--served-model-name tiny --max-model-len 512 --max-num-seqs 8 --gpu-memory-utilization 0.2
  --kv-cache-memory-bytes 100000000 --dtype float32 --enforce-eager
  --tensor-parallel-size 2 --enable-expert-parallel
  --nnodes 2 --master-addr 127.0.0.1 --master-port ${MASTER_PORT:-29571} --distributed-executor-backend mp"
options='{"hybrimoe": {"accelerator": "emulated", "cache_size": "25%"}}'
export VLLM_NO_USAGE_STATS=1

VLLM_CPU_OMP_THREADS_BIND=0 $vllm serve "$model" $common --additional-config "$options" \
  --node-rank 0 --port "$port" >"$logs/node0" 2>&1 &
first=$!
VLLM_CPU_OMP_THREADS_BIND=1 $vllm serve "$model" $common --additional-config "$options" \
  --node-rank 1 --headless >"$logs/node1" 2>&1 &
second=$!
trap 'kill $first $second 2>/dev/null; wait' EXIT INT TERM

echo "starting; logs are in $logs"
until curl -sf "http://127.0.0.1:$port/health" >"$logs/health" 2>&1; do
  for node in $first $second; do
    kill -0 "$node" 2>/dev/null || { tail -n 20 "$logs"/node*; exit 1; }
  done
  sleep 1
done
for node in 0 1; do
  echo "node $node: $(sed -n 's/.*hybrimoe: //p' "$logs/node$node" | head -n 1)"
done

question='Hello! How are you today?'
echo "you:  $question"
curl -s "http://127.0.0.1:$port/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "model": "tiny", "temperature": 0, "max_tokens": 40, "messages": [{"role": "user", "content": "'"$question"'"}]
}' | sed -n 's/.*"content":"\([^"]*\)".*/tiny: \1/p'
