//! The handlers: one file a noun, and here the list of all of them.
//!
//! A handler is short: it turns a request that was let through into calls of the cluster, and the result into the
//! contract's reply. What a change needs and does stands in its workflow.

pub mod access;
pub mod approval;
pub mod audit;
pub mod enrol;
pub mod grant;
pub mod host;
pub mod image;
pub mod login;
pub mod operation;
pub mod own;
pub mod policy;
pub mod repository;
pub mod role;
pub mod schedule;
pub mod segment;
pub mod snapshot;
pub mod system;
pub mod team;
pub mod token;
pub mod user;
pub mod user_login;
pub mod vm;

pub mod console;

mod list;

use crate::door::Door;

/// Mounts every route of the contract.
pub fn mount(door: Door) -> Door {
    let door = system::mount(door);
    let door = access::mount(door);
    let door = enrol::mount(door);
    let door = host::mount(door);
    let door = segment::mount(door);
    let door = image::mount(door);
    let door = vm::mount(door);
    let door = console::mount(door);
    let door = snapshot::mount(door);
    let door = schedule::mount(door);
    let door = repository::mount(door);
    let door = operation::mount(door);
    let door = audit::mount(door);
    let door = user::mount(door);
    let door = login::mount(door);
    let door = own::mount(door);
    let door = user_login::mount(door);
    let door = team::mount(door);
    let door = role::mount(door);
    let door = grant::mount(door);
    let door = policy::mount(door);
    let door = approval::mount(door);
    token::mount(door)
}
