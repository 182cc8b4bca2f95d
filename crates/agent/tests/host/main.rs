//! One agent on real QEMU: its promises about VMs, images, and what is left behind.

mod fetch;
mod full;
mod guest;
mod images;
mod join;
mod killed;
mod lifecycle;
mod routes;
mod support;
