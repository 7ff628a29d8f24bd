#!/usr/bin/env bash
# Every test that takes minutes, in one go: about two and a half hours on 2 cores that other work shares.
#
#     tests/slow.sh [--reduced]
#
# --reduced runs what CI runs after the default tests: strategies against one process over 50 steps, torchrun that goes
# on without a lost host, and the quickstart's floor. PYTHON names the interpreter; `python` by default.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export OMP_WAIT_POLICY=PASSIVE

if [ "${1-}" = --reduced ]; then
    exec "$python" -m pytest -n 1 -m slow --durations=0 \
        "tests/training/test_strategies.py::test_fifty_steps_under_every_strategy_give_the_losses_of_one_process" \
        "tests/training/callbacks/test_heartbeat.py::test_torchrun_goes_on_by_itself" \
        "tests/studies/test_quickstart_floor.py"
fi

failed=()
"$python" -m pytest -m slow --durations=0 || failed+=("pytest -m slow")
FUYU_FUZZ=${FUYU_FUZZ:-10000} "$python" -m pytest -n 0 -m slow tests/data/shards/test_fuzz.py || failed+=("fuzz")
OMP_NUM_THREADS=1 "$python" tests/training/kill_while_saving.py || failed+=("kill_while_saving.py")
OMP_NUM_THREADS=1 "$python" tests/training/stop_often.py || failed+=("stop_often.py")
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all slow tests passed"
