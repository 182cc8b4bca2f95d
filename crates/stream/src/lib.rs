//! QEMU's migration stream: parse it, split it into memory pages and device state, rebuild it; no I/O.
