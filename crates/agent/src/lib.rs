//! One host: run QEMU, layers, snapshots, migration, sensing.
//!
//! Read in this order: [`config`] (what the agent is told), [`agent`] (what it starts with and where tasks go), [`http`]
//! (the contract's routes), then one VM's life: [`vm`], [`qemu`] (its command line), [`launcher`] (its process), and
//! what is done with it: [`snapshot`], [`migration`]. The rest are the things that these stand on: [`layout`] and
//! [`durable`] (files), [`fittings`], [`nvram`], [`disk`], [`image`], [`seed`], [`network`], [`console`], [`sandbox`].

pub mod config;
pub mod run;

pub mod agent;
pub mod http;
pub mod identity;
pub mod services;
pub mod task;

pub mod inventory;
pub mod metrics;
pub mod report;
pub mod vm;

pub mod migration;
pub mod snapshot;

pub mod launcher;
pub mod qemu;

pub mod backup;
pub mod console;
pub mod disk;
pub mod disks;
pub mod fittings;
pub mod image;
pub mod network;
pub mod nvram;
pub mod pool;
pub mod qcow2;
pub mod room;
pub mod seed;

pub mod clock;
pub mod durable;
pub mod layout;
pub mod sandbox;

#[cfg(test)]
mod testing;

pub use agent::{Agent, StartError};
pub use config::AgentConfig;
pub use identity::{Enrolment, enrol};
pub use run::{RunError, run, runtime};
