//! What the manager promises of its operations, whatever breaks and when.
//!
//! One program for all of it, since linking takes longer than running: `faults` fails and repeats every step of every
//! workflow, `death` kills the manager after every write, `story` goes through what people do, `clones` makes VMs from
//! snapshots, `migration` through what can become of a VM between two hosts, `hosts` through what hosts do by themselves,
//! `schedules` through runs by the clock, `verification` through what comes of snapshots that are read, and `trouble`
//! cancels, cuts off and restarts in every step.

#[path = "support/agent.rs"]
mod agent;
#[path = "support/scenario.rs"]
mod scenario;
#[path = "support/world.rs"]
mod world;

#[path = "workflow/clones.rs"]
mod clones;
#[path = "workflow/death.rs"]
mod death;
#[path = "workflow/faults.rs"]
mod faults;
#[path = "workflow/hosts.rs"]
mod hosts;
#[path = "workflow/migration.rs"]
mod migration;
#[path = "workflow/schedules.rs"]
mod schedules;
#[path = "workflow/story.rs"]
mod story;
#[path = "workflow/trouble.rs"]
mod trouble;
#[path = "workflow/verification.rs"]
mod verification;
