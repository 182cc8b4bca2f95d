//! What bad input gets, on real processes: one error that says what was wrong, where, and what to do, and afterwards
//! everything is as it was.
//!
//! Each refusal is asked for twice, as a program asks and as a person does. Around them stands [`Stand`]: all that the
//! cluster knows and every file that it keeps, taken before and compared after.

mod damaged;
mod full;
mod hosts;
mod images;
mod names;
mod running;
mod stand;

use anyhow::{Context, Result, ensure};
use berth_e2e::{Cluster, Refusal};

pub use stand::Stand;

/// What a refusal must say.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The stable code.
    pub code: &'a str,
    /// The exit code.
    pub exit: i32,
    /// The field at fault.
    pub field: &'a str,
    /// The value that was given.
    pub value: &'a str,
    /// What its expectation must hold.
    pub expected: &'a str,
}

/// In the order in which one says it.
pub const fn wanted<'a>(
    code: &'a str,
    exit: i32,
    field: &'a str,
    value: &'a str,
    expected: &'a str,
) -> Wanted<'a> {
    Wanted { code, exit, field, value, expected }
}

/// Asks as a program and as a person, and holds both answers against what is wanted.
pub fn refused(cluster: &Cluster, words: &[&str], wanted: Wanted<'_>) -> Result<Refusal> {
    let refusal = refused_once(cluster, words, wanted)?;
    told(cluster, words, wanted)?;
    Ok(refusal)
}

/// Asks as a program.
pub fn refused_once(cluster: &Cluster, words: &[&str], wanted: Wanted<'_>) -> Result<Refusal> {
    let refusal = cluster.berth.refuses(words)?;
    let line = words.join(" ");
    let said = |field: &str| refusal.problem[field].as_str().unwrap_or_default().to_owned();
    let seen = (refusal.code().to_owned(), refusal.exit_code, said("field"), said("value"));
    let right = (wanted.code.to_owned(), wanted.exit, wanted.field.to_owned(), wanted.value.to_owned());
    ensure!(seen == right, "{line}: wanted {right:?}, and it said {}", refusal.text);
    ensure!(said("expected").contains(wanted.expected), "{line}: {wanted:?}, and it said {}", refusal.text);
    ensure!(!said("message").is_empty(), "{line}: no sentence: {}", refusal.text);
    ensure!(refusal.text.trim().lines().count() == 1, "{line}: one error, and it said {}", refusal.text);
    Ok(refusal)
}

/// Asks as a person: one error, that names the value and what to do about it.
fn told(cluster: &Cluster, words: &[&str], wanted: Wanted<'_>) -> Result<()> {
    let output = cluster.berth.command(words).output().context("asking as a person")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = words.join(" ");
    ensure!(output.status.code() == Some(wanted.exit), "{line} ended with {}: {text}", output.status);
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    ensure!(errors.len() == 1, "{line}: one error, and it said {text}");
    let (_, after) = text.split_once("error: ").unwrap_or_default();
    ensure!(after.contains(wanted.value), "{line}: it does not name '{}': {text}", wanted.value);
    ensure!(
        ["expected ", "needs ", "'berth ", "--help"].iter().any(|what| after.contains(what)),
        "{line}: it does not say what to do: {text}"
    );
    Ok(())
}
