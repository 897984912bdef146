# Servers of a model as steps of a job, for stage.sbatch: start_servers NODE ... fills `servers` with their URLs,
# `keepers` with the processes that start them.

server_port=$((10000 + SLURM_JOB_ID % 10000))

# One server on a node, started again when it ends, for as long as the job's script lives.
keep_server() {
  local node="$1" command="${SERVER//\{port\}/$2}"
  while kill -0 $$ 2>/dev/null; do
    srun --overlap "${cpus[@]}" --nodes 1 --ntasks 1 --nodelist "$node" --output "logs/server-$SLURM_JOB_ID-%N.log" \
      --open-mode append bash -c "$command" || true
    echo "$(date --iso-8601=seconds) the server on $node ended, see logs/server-$SLURM_JOB_ID-$node.log; starting it again" >&2
    sleep 5
  done
}

wait_for_server() {
  local url="$1" end=$((SECONDS + ${SERVER_PATIENCE:-1800}))
  until curl --noproxy '*' --silent --fail --max-time 5 --output /dev/null "$url${SERVER_HEALTH:-/health}"; do
    if ((SECONDS > end)); then
      echo "stage.sbatch: $url${SERVER_HEALTH:-/health} did not answer 200 within ${SERVER_PATIENCE:-1800} s;" \
        "see logs/server-$SLURM_JOB_ID-*.log" >&2
      exit 1
    fi
    if ((told)); then return; fi
    sleep 1
  done
}

start_servers() {
  local node address port="$server_port"
  mkdir -p logs
  for node in "$@"; do
    address="$(scontrol --oneliner show node "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
    keep_server "$node" "$port" &
    keepers+=("$!")
    servers+=("http://$address:$port/v1")
    export no_proxy="${no_proxy:+$no_proxy,}$address"
    port=$((port + 1))
  done
  local url
  for url in "${servers[@]}"; do wait_for_server "${url%/v1}"; done
  echo "$(date --iso-8601=seconds) ready: ${servers[*]}"
}
