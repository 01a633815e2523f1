"""Ask a process's health service once: `python -m pdserve.rpc.probe HOST:PORT [--service NAME]`.

For places that probe by command (Docker); Kubernetes asks by itself. Exits 0 for SERVING, else 1.
"""

import argparse
import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdserve.rpc.channels import DIRECT
from pdserve.rpc.health import READINESS


def main() -> None:
    """Probe and exit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--service", default=READINESS, help='"" is readiness')
    parser.add_argument("--timeout", type=float, default=2.0, metavar="S")
    arguments = parser.parse_args()
    sys.exit(probe(arguments.address, arguments.service, arguments.timeout))


def probe(address: str, service: str, timeout_s: float) -> int:
    """0 where the process says SERVING; 1 for anything else, with a line on stderr."""
    with grpc.insecure_channel(address, options=DIRECT) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            status = stub.Check(request, timeout=timeout_s).status
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return 1
    if status == health_pb2.HealthCheckResponse.SERVING:
        return 0
    print(
        f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}", file=sys.stderr
    )
    return 1


if __name__ == "__main__":
    main()
