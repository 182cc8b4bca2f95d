//! The project's own chores. Each subcommand is a module of its name; this file is the table of contents.

use anyhow::Result;
use clap::{Parser, Subcommand};

mod guest;

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
}

fn main() -> Result<()> {
    match Arguments::parse().chore {
        Chore::Guest(arguments) => guest::run(&arguments),
    }
}
