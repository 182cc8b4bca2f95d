//! The door from outside: requests in, answers and records out, without a socket.

pub mod access;
mod audit;
mod coverage;
mod enrolment;
mod hangups;
mod nonsense;
mod reading;
pub(crate) mod support;
mod tokens;
mod uploads;
