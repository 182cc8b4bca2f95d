//! The door from outside: requests in, answers and records out, without a socket.

pub mod access;
mod audit;
mod classes;
mod clones;
mod coverage;
mod enrolment;
mod four_eyes;
mod hangups;
mod login;
mod login_walk;
mod matrix;
mod names;
mod nonsense;
mod quotas;
mod races;
mod reading;
mod repositories;
pub(crate) mod support;
mod tokens;
mod uploads;
pub(crate) mod world;
