"""Four fake CPU devices for all tests; must be set before jax is imported, so here and by name."""

import os

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Un-awaited calls on fake devices can deadlock in a rendezvous on two cores.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
