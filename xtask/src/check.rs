//! The one gate: what must hold before a change is pushed, in the order in which it fails fastest.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::tidy;

/// How to check.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Leave out the tests: whoever calls has run them already.
    #[arg(long)]
    no_tests: bool,
}

/// Runs every check and stops at the first that fails.
///
/// # Errors
/// When one fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    step("formatting", "cargo", &["fmt", "--all", "--check"], &[])?;
    println!("check: house rules");
    tidy::run()?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    step("clippy", "cargo", &clippy, &[])?;
    let documents = ["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"];
    step(
        "documentation",
        "cargo",
        &documents,
        &[("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links")],
    )?;
    if is_installed("cargo-deny") {
        step("licences and bans", "cargo", &["deny", "check", "licenses", "bans", "sources"], &[])?;
    } else {
        println!("check: licences and bans left out: cargo-deny is not installed");
    }
    if !arguments.no_tests {
        // Among them is the one that holds openapi/ against the code.
        step("tests", "make", &["test"], &[])?;
    }
    println!("check: all is well");
    Ok(())
}

fn step(what: &str, program: &str, words: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    println!("check: {what}");
    let mut command = Command::new(program);
    command.args(words).envs(environment.iter().copied());
    let status = command.status().with_context(|| format!("running {program}"))?;
    if !status.success() {
        bail!("{what} failed: {program} {}", words.join(" "));
    }
    Ok(())
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}
