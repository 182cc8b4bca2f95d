//! What permissions and the audit cost: each measured by an example that stands on the real manager and a store on the
//! disk, several times over.

use anyhow::{Context, Result};

use super::Run;
use super::figures::Figures;
use super::fleet::{example, figure_in};

/// Takes one decision and a filtered list.
///
/// # Errors
/// When the example fails, or says no figure.
pub fn decisions(run: &Run, figures: &mut Figures) -> Result<()> {
    let said = several(run, "berth-sim", "permissions")?;
    add(figures, &said, "decision_p50_us", "decision_p50_us", "the median of a decision")?;
    add(figures, &said, "decision_p99_us", "decision_p99_us", "the 99th percentile of a decision")?;
    add(figures, &said, "filtered_list_ms", "filtered_list_p50_ms", "a filtered list, at the door")?;
    add(figures, &said, "filtered_list_p99_ms", "filtered_list_p99_ms", "its 99th percentile")
}

/// Takes how fast the audit is written, and what that adds to a request.
///
/// # Errors
/// When the example fails, or says no figure.
pub fn audit(run: &Run, figures: &mut Figures) -> Result<()> {
    let said = several(run, "berth-manager", "audit_rate")?;
    for (name, meaning) in [
        ("audit_appends_per_second", "durable records a second, sustained"),
        ("audit_added_latency_p99_ms", "what the audit adds to a request, 99th percentile"),
    ] {
        add(figures, &said, name, name, meaning)?;
    }
    Ok(())
}

/// Takes how long an export of a million records takes to be verified.
///
/// # Errors
/// When the example fails, or says no figure.
pub fn verify(run: &Run, figures: &mut Figures) -> Result<()> {
    let said = several(run, "berth-tlog", "verify_rate")?;
    let name = "audit_verify_million_seconds";
    add(figures, &said, name, name, "verifying an export of 1,000,000 records")
}

fn several(run: &Run, package: &str, name: &str) -> Result<Vec<String>> {
    (0..run.runs).map(|_| example(package, name)).collect()
}

fn add(figures: &mut Figures, said: &[String], name: &str, field: &str, meaning: &str) -> Result<()> {
    let found: Option<Vec<f64>> =
        said.iter().map(|text| text.lines().find_map(|line| figure_in(line, field))).collect();
    figures.add(name, meaning, &found.with_context(|| format!("an example says no {field}"))?);
    Ok(())
}
