//! A seeded cluster in one process: the real manager and agents over a fake QEMU.
//!
//! ```text
//!  manager (a thread) ──HTTP over memory──► agent (a thread each) ──QMP──► fake QEMU ──► oracle
//!                                              └──── HTTP over memory ────► agent
//! ```
//!
//! Each daemon has a thread and a runtime of its own, and is killed by dropping that: everything that it was doing ends
//! at its next wait, as with a process that is killed. Fake QEMUs ([`qemu`]) live in the world's runtime and outlive their
//! agents. Links between daemons ([`network`]) can be cut and healed. The [`oracle`] sees each guest go on and stand
//! still, and says what was wrong.
//!
//! Read in this order: [`oracle`] (what must hold), [`qemu`], [`launcher`] (how agents get it), [`network`], and
//! [`cluster`], which puts all together, and [`story`], which shakes it.

pub mod oracle;

pub mod fault;
pub mod qemu;

pub mod launcher;

pub mod network;

pub mod clock;

pub mod cluster;

pub mod settled;
pub mod story;

pub mod chance;

pub use cluster::{Plan, SimCluster};
