"""Programs around shmsock: servers, benchmarks, and the virtual machines its own tests run in."""
