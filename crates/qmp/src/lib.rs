//! Talk to one QEMU: session, typed commands and the events in use.
