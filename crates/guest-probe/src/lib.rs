//! The probe that test guests run, and the client that asks it.
//!
//! A virtual machine that was moved or restored may look well and be wrong: one page of an old generation, one
//! file that was acknowledged and is gone. The probe exists to notice. Inside the guest it keeps memory and
//! files whose every byte it can predict, keeps the prediction apart from the data, and answers questions over
//! UDP and over a virtio-serial port with one line of JSON each. Its *nonce* is drawn once a start, so whoever
//! asks can tell a guest that went on from one that booted anew; its *tick* counts milliseconds and never steps
//! back while the same guest lives.
//!
//! The inside: [`pattern`] says what a page must hold, [`memory`] dirties pages at a set rate and verifies
//! them, [`files`] does the same for files, [`protocol`] reads requests, [`engine`] carries them out and
//! [`serve`] connects it to sockets and ports. [`netconf`] reads the guest's network settings.
//!
//! The outside: [`client`] asks, [`gap`] measures for how long nobody answered, [`image`] finds the test guest
//! that `cargo xtask guest` made.

pub mod client;
pub mod engine;
pub mod files;
pub mod gap;
pub mod image;
pub mod memory;
pub mod netconf;
pub mod pattern;
pub mod protocol;
pub mod serve;

/// UDP port on which the probe answers.
pub const UDP_PORT: u16 = 7007;

/// Name of the virtio-serial port that carries the probe's events and commands.
pub const PORT_NAME: &str = "dev.berth.probe";
