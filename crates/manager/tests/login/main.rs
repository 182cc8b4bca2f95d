//! Logging in for real: a manager with a socket, Debian's OpenLDAP, and a certified OpenID Connect provider, all on the
//! loopback, each on a free port and with certificates that the test makes.
//!
//! Neither server is installed by the tests: `scripts/deps.sh` says what is missing.

mod directory;
mod provider;
mod support;

mod by_directory;
mod by_provider;
