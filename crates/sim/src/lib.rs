//! A seeded cluster in one process: the real manager and agents over a fake QEMU.
