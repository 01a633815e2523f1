"""Run one decode worker: `python -m decode_worker --settings settings.yaml`."""

from decode_worker.app import serve
from pdserve.config.processes import WorkerSettings
from pdserve.rpc.process import run_process

if __name__ == "__main__":
    run_process(WorkerSettings, serve, __doc__)
