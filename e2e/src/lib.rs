//! A whole cluster of real processes on real QEMU, driven through the `berth` binary as a user drives it.
//!
//! Tests, the demo and the benches all stand on this, so what they show is what a user gets: no call goes around the
//! command line. What a guest must hold is asked of `guest-probe` inside it, over UDP.

pub mod berth;
pub mod cluster;
pub mod console;
pub mod guest;
pub mod process;

pub mod testing;

pub use berth::{Berth, Refusal};
pub use cluster::{Cluster, UpOptions};
pub use console::Console;
pub use guest::Guest;
