"""Which resource and which node label stand for a GPU type of the catalogue."""

from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.domain.errors import LocalFault
from placement.hardware import find_gpu

NVIDIA_LABEL = "nvidia.com/gpu.product"
AMD_LABEL = "amd.com/gpu.device-id"

# Written by NVIDIA's GPU feature discovery: the product name with dashes for spaces.
_NVIDIA = {
    "a100_40g_sxm": ("NVIDIA-A100-SXM4-40GB",),
    "a100_pcie": ("NVIDIA-A100-80GB-PCIe",),
    "a100_sxm": ("NVIDIA-A100-SXM4-80GB",),
    "a10g": ("NVIDIA-A10G",),
    "a30": ("NVIDIA-A30",),
    "b200_sxm": ("NVIDIA-B200",),
    "b300_sxm": ("NVIDIA-B300-SXM6-AC",),
    "gb200": ("NVIDIA-GB200",),
    "gb300": ("NVIDIA-GB300",),
    "h100_nvl": ("NVIDIA-H100-NVL",),
    "h100_pcie": ("NVIDIA-H100-PCIe",),
    "h100_sxm": ("NVIDIA-H100-80GB-HBM3",),
    "h20": ("NVIDIA-H20",),
    "h200_sxm": ("NVIDIA-H200",),
    "l4": ("NVIDIA-L4",),
    "l40s": ("NVIDIA-L40S",),
    "rtx_pro_6000_server": ("NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition",),
    "v100_sxm": ("Tesla-V100-SXM2-32GB",),
}
# Written by AMD's node labeller: PCI device ids.
_AMD = {
    "mi250x": ("7408", "740c"),
    "mi300x": ("74a1",),
    "mi325x": ("74a5",),
    "mi355x": ("75a3",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """How a pod asks for one GPU type, and for nodes that have it."""

    resource: str
    label: str  # empty: of any node
    values: tuple[str, ...]


def accelerator(gpu: str, own_labels: Mapping[str, tuple[str, str]]) -> Accelerator:
    """Of a plan's GPU type; `own_labels` (type to label and value) win.

    Without a type, as in a cluster file, it is any NVIDIA GPU on any node. Raises `LocalFault` for
    a type that is neither in the catalogue nor given.
    """
    if gpu in own_labels:
        label, value = own_labels[gpu]
        return Accelerator(resource=_resource_of(label), label=label, values=(value,))
    if not gpu:
        return Accelerator(resource="nvidia.com/gpu", label="", values=())
    try:
        name = find_gpu(gpu).name
    except LocalFault as error:
        raise LocalFault(
            f"{error.message}; nodes with a GPU type of your own are named with "
            f"--gpu-label {gpu}=LABEL=VALUE"
        ) from None
    if name in _AMD:
        return Accelerator(resource="amd.com/gpu", label=AMD_LABEL, values=_AMD[name])
    if name in _NVIDIA:
        return Accelerator(resource="nvidia.com/gpu", label=NVIDIA_LABEL, values=_NVIDIA[name])
    raise LocalFault(
        f"no node label is known for GPU {name}: name its nodes with --gpu-label {name}=LABEL=VALUE"
    )


def parse_gpu_label(text: str) -> tuple[str, tuple[str, str]]:
    """`mygpu=nvidia.com/gpu.product=My-GPU` as type, label and value."""
    parts = text.split("=")
    if len(parts) != 3 or not all(parts):
        raise LocalFault(
            f"--gpu-label {text}: expected TYPE=LABEL=VALUE, such as "
            "h100_sxm=nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3"
        )
    return parts[0], (parts[1], parts[2])


def _resource_of(label: str) -> str:
    return "amd.com/gpu" if label.startswith("amd.com/") else "nvidia.com/gpu"
