"""Start a router: `python -m router --settings router.yaml`."""

from pdserve.config.processes import RouterSettings
from pdserve.rpc.process import run_process
from router.app import serve

if __name__ == "__main__":
    run_process(RouterSettings, lambda settings: serve, "A pdserve router.")
