//! The door from outside: requests in, answers and records out, without a socket.

pub mod access;
mod classes;
mod coverage;
mod enrolment;
mod four_eyes;
mod hangups;
mod matrix;
mod names;
mod nonsense;
mod quotas;
mod races;
mod reading;
pub(crate) mod support;
mod tokens;
mod uploads;
pub(crate) mod world;
