//! One host: run QEMU, layers, snapshots, migration, sensing.
