"""Run one decode worker: `python -m decode_worker --settings settings.yaml`."""

from decode_worker.app import RANK_SERVICES, serve
from pdserve.worker.starting import run_worker

if __name__ == "__main__":
    run_worker(serve, RANK_SERVICES, __doc__)
