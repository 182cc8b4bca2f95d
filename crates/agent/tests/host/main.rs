//! One agent on real QEMU: its promises about VMs, images, and what is left behind.

mod full;
mod guest;
mod images;
mod killed;
mod lifecycle;
mod support;
