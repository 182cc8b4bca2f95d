//! One cluster: the door, workflows, reconcilers, policy, audit, placement.
//!
//! A request comes in at the [`door`]: who asks ([`auth`]) and whether they may ([`policy`]) is settled and written
//! down ([`audit`]) before a handler ([`http`]) runs. What takes time becomes an operation ([`operations`]) that a
//! [`workflow`] carries out on the hosts' [`agents`]; the [`reconcile`] loops look after what nobody asked for. All of
//! it stands on the [`cluster`], which is the [`records`] and the handles to the world.
//!
//! Read in this order: [`mod@run`] (how it starts), the door and what it uses, the handlers, then the work.

pub mod config;
pub mod run;

pub mod audit;
pub mod auth;
pub mod door;
pub mod policy;
pub mod quota;
pub mod schedules;

pub mod http;

pub mod cluster;
pub mod records;

pub mod operations;
pub mod workflow;

pub mod agents;
pub mod reconcile;

pub mod clock;
pub mod digest;
pub mod metrics;

pub use config::ManagerConfig;
pub use run::{Manager, Parts, RunError, run};
