//! One agent on real QEMU: its promises about VMs, images, and what is left behind.

mod images;
mod lifecycle;
mod support;
