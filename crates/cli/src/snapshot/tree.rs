//! A VM's snapshots as a tree, with `NOW` under the one that the VM was last at.
//!
//! The list is whatever the manager gave: a snapshot whose parent is not in it stands at the root, and one that is its
//! own ancestor is still shown, once.

use std::collections::HashSet;

use super::verify;
use berth_model::snapshot::Snapshot;
use berth_model::vm::VmStatus;
use berth_model::{SnapshotId, Timestamp};

use crate::output::{Table, instant, word};
use crate::units;

const HEADERS: &[&str] = &["NAME", "KIND", "TAKEN", "PAUSED", "OWN", "SHARED", "HELD", "VERIFIED", "NOTE"];

/// The tree as a table, for people.
pub fn table(snapshots: &[Snapshot], status: &VmStatus, now_is: Timestamp) -> Table {
    let mut drawing = Drawing {
        snapshots,
        known: snapshots.iter().map(|snapshot| &snapshot.id).collect(),
        drawn: HashSet::new(),
        status,
        table: Table::new(HEADERS),
        now_is,
    };
    drawing.children(None, "");
    // What is left is in a circle: shown without one, rather than not at all.
    for snapshot in snapshots {
        if !drawing.drawn.contains(&snapshot.id) {
            drawing.node(snapshot, "", "", "");
        }
    }
    drawing.table
}

struct Drawing<'a> {
    snapshots: &'a [Snapshot],
    known: HashSet<&'a SnapshotId>,
    drawn: HashSet<&'a SnapshotId>,
    status: &'a VmStatus,
    table: Table,
    now_is: Timestamp,
}

impl<'a> Drawing<'a> {
    fn children(&mut self, parent: Option<&SnapshotId>, indent: &str) {
        let children: Vec<&'a Snapshot> =
            self.snapshots.iter().filter(|snapshot| self.parent_of(snapshot) == parent).collect();
        let now_is_here = self.now() == parent;
        let last = children.len() + usize::from(now_is_here);
        for (index, child) in children.into_iter().enumerate() {
            let (branch, below) = joints(parent.is_none(), index + 1 == last);
            self.node(child, indent, branch, below);
        }
        if now_is_here {
            let (branch, _) = joints(parent.is_none(), true);
            self.table.push(row([format!("{indent}{branch}NOW"), self.status.state.to_string()]));
        }
    }

    fn node(&mut self, snapshot: &'a Snapshot, indent: &str, branch: &str, below: &str) {
        if !self.drawn.insert(&snapshot.id) {
            return;
        }
        let name = format!("{indent}{branch}{}", snapshot.name);
        self.table.push(self.cells(snapshot, name));
        self.children(Some(&snapshot.id), &format!("{indent}{below}"));
    }

    fn cells(&self, snapshot: &Snapshot, name: String) -> Vec<String> {
        let facts = &snapshot.facts;
        let stored = facts.memory_stored_bytes.saturating_add(facts.disk_stored_bytes);
        let paused = match (facts.has_memory, facts.quiesced) {
            (true, _) => units::micros(facts.paused_us),
            (false, true) => "disk, frozen".to_owned(),
            (false, false) => "disk only".to_owned(),
        };
        let mut note = snapshot.note.clone();
        if let Some(expires_at) = snapshot.expires_at {
            let gap = if note.is_empty() { "" } else { "; " };
            note = format!("{note}{gap}until {}", instant(expires_at));
        }
        let held = match (self.status.baseline.as_ref() == Some(&snapshot.id), snapshot.pinned) {
            (true, _) => "baseline",
            (false, true) => "pinned",
            (false, false) => "",
        };
        let taken = instant(snapshot.created_at);
        let shared = match facts.memory_shared_bytes {
            0 => String::new(),
            bytes => units::bytes(bytes),
        };
        let own = units::bytes(stored);
        let verified = verify::cell(snapshot.verified.as_ref(), self.now_is);
        vec![name, word(&snapshot.kind), taken, paused, own, shared, held.to_owned(), verified, note]
    }

    fn parent_of(&self, snapshot: &'a Snapshot) -> Option<&'a SnapshotId> {
        snapshot.parent.as_ref().filter(|parent| self.known.contains(parent))
    }

    fn now(&self) -> Option<&'a SnapshotId> {
        self.status.at_snapshot.as_ref().filter(|at| self.known.contains(at))
    }
}

fn row(cells: [String; 2]) -> Vec<String> {
    let mut row = Vec::from(cells);
    row.resize(HEADERS.len(), String::new());
    row
}

/// How a line joins the one above, and what stands before the lines below it.
const fn joints(is_root: bool, is_last: bool) -> (&'static str, &'static str) {
    match (is_root, is_last) {
        (true, _) => ("", ""),
        (false, true) => ("└─ ", "   "),
        (false, false) => ("├─ ", "│  "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake;
    use berth_model::snapshot::{SnapshotFacts, SnapshotKind};
    use berth_model::verification::{Means, Verdict, Verification};
    use berth_model::vm::VmState;

    const NOW: Timestamp = Timestamp::from_millis(1_795_352_752_007);

    fn id(number: u8) -> SnapshotId {
        SnapshotId::from_entropy([number; 10])
    }

    fn snapshot(number: u8, name: &str, kind: SnapshotKind, parent: Option<u8>) -> Snapshot {
        Snapshot {
            id: id(number),
            vm: berth_model::VmId::from_entropy([0; 10]),
            name: name.parse().expect("a name"),
            kind,
            occasion: None,
            parent: parent.map(id),
            pinned: kind == SnapshotKind::Baseline,
            note: String::new(),
            facts: SnapshotFacts {
                has_memory: true,
                paused_us: 12_345,
                memory_stored_bytes: 410 << 20,
                ..SnapshotFacts::default()
            },
            created_at: Timestamp::from_millis(1_795_352_752_007 + u64::from(number) * 1000),
            expires_at: (kind == SnapshotKind::Undo).then(|| Timestamp::from_millis(1_795_439_152_007)),
            verified: None,
        }
    }

    fn status(at: Option<u8>, baseline: Option<u8>) -> VmStatus {
        let mut status = fake::vm("books").status;
        status.state = VmState::Running;
        status.at_snapshot = at.map(id);
        status.baseline = baseline.map(id);
        status
    }

    #[test]
    fn the_tree_shows_branches_and_where_the_vm_is() {
        let mut close = snapshot(2, "before-close", SnapshotKind::Manual, Some(1));
        close.note = "month end".into();
        close.facts.memory_stored_bytes = 12 << 20;
        close.facts.memory_shared_bytes = 410 << 20;
        let found = |verdict, detail: &str| {
            Some(Verification { at: NOW, by: Means::Hash, verdict, detail: detail.into() })
        };
        close.verified = found(Verdict::Bad, "pages.idx: it is missing");
        let mut baseline = snapshot(1, "baseline", SnapshotKind::Baseline, None);
        baseline.verified = found(Verdict::Good, "");
        let later = NOW.plus_millis(2 * 3600 * 1000);
        let snapshots = [
            baseline,
            close,
            snapshot(3, "undo-1", SnapshotKind::Undo, Some(2)),
            snapshot(4, "later", SnapshotKind::Manual, Some(1)),
        ];
        let expected = "\
NAME                KIND      TAKEN                 PAUSED   OWN      SHARED   HELD      VERIFIED     NOTE
baseline            baseline  2026-11-22 13:05:53Z  12.3 ms  410 MiB           baseline  good 2h ago
├─ before-close     manual    2026-11-22 13:05:54Z  12.3 ms  12 MiB 410 MiB            BAD: pages.idx: it is missing month end
│  ├─ undo-1        undo      2026-11-22 13:05:55Z  12.3 ms  410 MiB           -         until 2026-11-23 13:05:52Z
│  └─ NOW           running
└─ later            manual    2026-11-22 13:05:56Z  12.3 ms  410 MiB -";
        // The first column is as wide as its widest cell; the drawing is what counts here.
        let squeeze = |text: &str| text.lines().map(squeezed).collect::<Vec<_>>().join("\n");
        assert_eq!(squeeze(&table(&snapshots, &status(Some(2), Some(1)), later).render()), squeeze(expected));
    }

    fn squeezed(line: &str) -> String {
        let indent: String = line.chars().take_while(|c| "├└│─ ".contains(*c)).collect();
        let rest: Vec<&str> = line[indent.len()..].split_whitespace().collect();
        format!("{indent}{}", rest.join(" "))
    }

    #[test]
    fn a_vm_without_snapshots_is_now() {
        let drawn = table(&[], &status(None, None), NOW).render();
        assert_eq!(drawn.lines().map(squeezed).collect::<Vec<_>>()[1..], ["NOW running"]);
    }

    #[test]
    fn nonsense_is_shown_once_and_ends() {
        // Its own ancestor, a parent that is gone, and a VM that is at none of them.
        let snapshots = [
            snapshot(1, "a", SnapshotKind::Manual, Some(2)),
            snapshot(2, "b", SnapshotKind::Manual, Some(1)),
            snapshot(3, "c", SnapshotKind::Manual, Some(9)),
            snapshot(4, "d", SnapshotKind::Manual, Some(4)),
        ];
        let drawn = table(&snapshots, &status(Some(8), None), NOW).render();
        let names: Vec<String> = drawn.lines().skip(1).map(squeezed).collect();
        let first =
            |line: &String| line.split_whitespace().find(|word| word.is_ascii()).unwrap_or("").to_owned();
        let names: Vec<String> = names.iter().map(first).collect();
        assert_eq!(names, ["c", "NOW", "a", "b", "d"]);
    }
}
