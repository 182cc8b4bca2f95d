//! `berth snapshot restore --clone`: new VMs of a snapshot.

use berth_api::manager::{CloneSnapshot, SnapshotClone};
use berth_model::name::Name;
use clap::Args;
use futures_util::future::join_all;

use super::{BASELINE, Which, change_query, resolve, tell};
use crate::arguments::ChangeArguments;
use crate::exit::Failure;
use crate::lookup::{VmRef, parse_name};
use crate::session::Session;
use crate::wait;

/// What is to be made of a snapshot.
#[derive(Debug, Args)]
pub struct CloneArguments {
    /// Leave the VM as it is and make a new one of the snapshot, of this name
    #[arg(long = "clone", value_name = "NAME", value_parser = parse_name, conflicts_with = "no_undo")]
    name: Option<Name>,
    /// The new VM's segment, if it is to be another: everything is copied then
    #[arg(long, requires = "name")]
    segment: Option<String>,
    /// Start the new VM from the disk alone, as after a power cut
    #[arg(long, requires = "name", conflicts_with = "paused")]
    cold: bool,
    /// Make so many: NAME-1, NAME-2, …
    #[arg(long, requires = "name", value_parser = clap::value_parser!(u16).range(1..=1000))]
    count: Option<u16>,
}

impl CloneArguments {
    /// Whether a new VM is wanted.
    pub const fn is_wanted(&self) -> bool {
        self.name.is_some()
    }

    fn names(&self) -> Result<Vec<Name>, Failure> {
        let Some(name) = &self.name else { return Ok(Vec::new()) };
        let Some(count) = self.count else { return Ok(vec![name.clone()]) };
        let numbered = |number| {
            let text = format!("{name}-{number}");
            parse_name(&text).map_err(|expected| Failure::field("clone", &text, &expected))
        };
        (1..=count).map(numbered).collect()
    }
}

/// Makes them, all at once, and waits for each.
///
/// # Errors
/// When the manager refuses or can't be reached, and the first failure of an operation.
pub async fn run(
    session: &Session,
    vm: VmRef,
    snapshot: Option<String>,
    (arguments, paused): (CloneArguments, bool),
    change: ChangeArguments,
) -> Result<(), Failure> {
    let names = arguments.names()?;
    let which = Which { vm, snapshot: snapshot.unwrap_or_else(|| BASELINE.to_owned()) };
    let path = which.vm.snapshot_path(&resolve(session, &which).await?);
    let query = change_query(change);
    let begun = names.into_iter().map(async |name| {
        let CloneArguments { segment, cold, .. } = &arguments;
        let wish = CloneSnapshot { name, segment: segment.clone(), cold: *cold, paused };
        session.send::<SnapshotClone>(&path, &query, &wish).await
    });
    // All of them run by now: one that fails is told after those before it.
    for reply in join_all(begun).await {
        wait::carry_through_and_tell(session, change, reply?, tell).await?;
    }
    Ok(())
}
