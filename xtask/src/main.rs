//! The project's own chores. Each subcommand is a module of its name; this file is the table of contents.

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod check;
mod demo;
mod guest;
mod qemu;
mod tidy;

/// The project's own chores.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Make the test guest from distribution packages, or find it made already.
    Guest(guest::Arguments),
    /// Find a QEMU of release 10 for the tests that need one, or fetch it; the system's stays as it is.
    Qemu,
    /// Show the main job with its figures.
    Demo(demo::Arguments),
    /// Take figures, beside the bars and the peers.
    Bench(bench::Arguments),
    /// The one gate: formatting, house rules, clippy, documents, tests.
    Check(check::Arguments),
    /// Only the house rules: sizes, names, arrows between crates, links.
    Tidy,
}

fn main() -> Result<()> {
    match Arguments::parse().chore {
        Chore::Guest(arguments) => guest::run(&arguments),
        Chore::Qemu => qemu::run(),
        Chore::Demo(arguments) => demo::run(&arguments),
        Chore::Bench(arguments) => bench::run(&arguments),
        Chore::Check(arguments) => check::run(&arguments),
        Chore::Tidy => tidy::run(),
    }
}
