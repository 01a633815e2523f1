"""Run one prefill worker: `python -m prefill_worker --settings settings.yaml`."""

from pdserve.config.processes import WorkerSettings
from pdserve.rpc.process import run_process
from prefill_worker.app import serve

if __name__ == "__main__":
    run_process(WorkerSettings, serve, __doc__)
