//! What the daemons cost: an agent's memory, and a list of two thousand VMs.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};
use berth_e2e::{Cluster, UpOptions};

use super::Run;
use super::figures::Figures;
use super::work::items;

/// How many VMs the agent looks after.
pub const VMS: u32 = 10;
const LIST: &str = "vm_list_2000_p99_ms";

/// Takes an agent's memory with ten small VMs that run and have their baselines.
///
/// # Errors
/// When the VMs don't come up.
pub fn agent_memory(run: &Run, figures: &mut Figures) -> Result<()> {
    let options = UpOptions { dir: run.dir.join("fleet"), hosts: 1, link_mbit: None, keep: false };
    let cluster = Cluster::up(run.berth()?, &options)?;
    cluster.import_guest("probe", "")?;
    let hosts = items(&cluster.berth.run(&["host", "list"])?)?;
    let host = hosts.first().and_then(|host| host["name"].as_str()).context("no host")?;
    let agent = cluster.daemon(host)?;
    let (empty, _) = resident_mb(agent.pid)?;
    for number in 0..VMS {
        cluster.create_guest(
            &format!("small-{number}"),
            "probe",
            &["--memory", "128MiB", "--disk", "64MiB"],
        )?;
    }
    let (now, peak) = resident_mb(agent.pid)?;
    figures.add("agent_resident_empty_mb", "an agent's resident memory without VMs", &[empty]);
    figures.add("agent_resident_mb", "the same with 10 VMs that run", &[now]);
    figures.add("agent_resident_peak_mb", "its peak so far, ten starts and baselines included", &[peak]);
    let (now, peak) = resident_mb(cluster.daemon("manager")?.pid)?;
    figures.add("manager_resident_mb", "the manager's resident memory then", &[now]);
    figures.add("manager_resident_peak_mb", "its peak", &[peak]);
    cluster.down()
}

/// A process's resident memory now and at its peak, in 10^6 bytes.
///
/// # Errors
/// When it is gone.
pub fn resident_mb(pid: u32) -> Result<(f64, f64)> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let field = |name: &str| -> Result<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line
            .and_then(|line| line.split_whitespace().next())
            .with_context(|| format!("{path} has no {name}"))?;
        Ok(kib.parse::<f64>()? * 1024.0 / 1_000_000.0)
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}

/// Takes the time of a list of two thousand VMs, from the simulated cluster: real manager, real HTTPS, hosts without
/// machines.
///
/// # Errors
/// When it fails or says no figure.
pub fn list(figures: &mut Figures) -> Result<()> {
    let text = example("berth-sim", "vm_list")?;
    text.lines().for_each(|line| println!("   {line}"));
    let said = |name: &str| text.lines().find_map(|line| figure_in(line, name));
    figures.add(
        LIST,
        "99th percentile of `vm list` with 2,000 VMs",
        &[said(LIST).context("it says no figure")?],
    );
    if let Some(median) = said("vm_list_2000_median_ms").or_else(|| said("vm_list_2000_p50_ms")) {
        figures.add("vm_list_2000_p50_ms", "its median", &[median]);
    }
    Ok(())
}

/// Runs an example of one of the crates, built for release; what it printed.
///
/// # Errors
/// When it fails.
pub fn example(package: &str, name: &str) -> Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let words = ["run", "--release", "--quiet", "--package", package, "--example", name];
    let output = Command::new(cargo).args(words).output().context("cargo can't be started")?;
    if !output.status.success() {
        bail!("the example {name} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The number that follows a name on a line, whatever stands between.
pub fn figure_in(line: &str, name: &str) -> Option<f64> {
    let rest = &line[line.find(name)? + name.len()..];
    let rest = rest.trim_start_matches(|letter: char| !letter.is_ascii_digit());
    let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(rest.len());
    rest[..end].trim_end_matches('.').parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_found_however_it_is_written() {
        assert_eq!(figure_in(r#"{"vm_list_2000_p99_ms": 12.5, "x": 3}"#, LIST), Some(12.5));
        assert_eq!(figure_in("vm_list_2000_p99_ms 31", LIST), Some(31.0));
        assert_eq!(figure_in("vm_list_2000_p99_ms=7.", LIST), Some(7.0));
        assert_eq!(figure_in("nothing here 5", LIST), None);
    }
}
