//! The nouns and the rules of Berth, pure.
//!
//! Nothing here does I/O, reads a clock, draws a random number or knows HTTP or SQL: time and entropy come in as
//! arguments. So every rule can be tested with a table, and the same rule serves the manager, the agents and the
//! command line.
//!
//! Read in this order: [`id`] and [`name`] (what things are called), [`time`], [`problem`] (how a refusal is said),
//! then the nouns: [`image`], [`host`], [`vm`], [`snapshot`], [`verification`], [`diff`], [`schedule`], [`repository`], [`migration`], [`operation`], and last the rules that
//! join them: [`access`] and [`placement`].

pub mod id;
pub mod name;
pub mod time;

pub mod problem;

pub mod diff;
pub mod host;
pub mod image;
pub mod migration;
pub mod operation;
pub mod repository;
pub mod schedule;
pub mod snapshot;
pub mod verification;
pub mod vm;

pub mod access;
pub mod placement;

#[cfg(test)]
mod diagram;

pub use id::{
    ApprovalId, GrantId, HostId, ImageId, LayerId, OperationId, PolicyId, RepositoryId, RoleId, ScheduleId,
    SegmentId, SnapshotId, TeamId, TokenId, UserId, VmId,
};
pub use problem::{Problem, ProblemCode};
pub use time::Timestamp;
