"""Run one prefill worker: `python -m prefill_worker --settings settings.yaml`."""

from pdserve.worker.starting import run_worker
from prefill_worker.app import RANK_SERVICES, serve

if __name__ == "__main__":
    run_worker(serve, RANK_SERVICES, __doc__)
