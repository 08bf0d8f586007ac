#!/usr/bin/env bash
# Ends the SLURM that start.sh started in FOLDER, its jobs first; the folder stays, with the logs.
set -uo pipefail

folder=$1
export SLURM_CONF=$folder/slurm.conf

jobs_left() { timeout 5 squeue --noheader --format=%A; }
jobs_left | sort -u | xargs --no-run-if-empty timeout 5 scancel
for _ in $(seq 60); do
  [[ -n $(jobs_left) ]] || break
  sleep 0.2
done

for name in slurmd slurmctld munged; do
  [[ -e $folder/$name.process ]] || continue
  number=$(< "$folder/$name.process")
  [[ $(< "/proc/$number/comm") == "$name" ]] 2> /dev/null || continue   # gone, and its number perhaps another's
  kill -TERM "$number"
  for _ in $(seq 50); do
    [[ $(ps -o stat= -p "$number") == [!Z]* ]] || break
    sleep 0.1
  done
  [[ $(ps -o stat= -p "$number") != [!Z]* ]] || kill -KILL "$number"
  rm "$folder/$name.process"
done
